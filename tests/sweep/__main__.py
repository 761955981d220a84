"""Exact removal over many networks, as tables in Markdown.

`python -m tests.sweep [--dtype float64] [--zoo ZOO] [NAME ...]`. Without a zoo, all of them whose library is there.
A network passes if its outputs before and after agree to 1e-4 of their scale (1e-5 in float64) with the shapes unchanged. With
`--trained`, masks move during a training of some steps before the removal, and the loss has to go on falling after it.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from tests.sweep import vision
from tests.sweep.check import Inputs, Row, check, outputs
from tests.sweep.trained import trained

Check = Callable[[nn.Module, Inputs], Row]

#: Zoo -> the library, and the module of this folder that builds its networks.
ZOOS = {
    "torchvision": ("torchvision", "vision"),
    "detection": ("torchvision", "vision"),
    "detectors": ("torchvision", "detectors"),
    "video": ("torchvision", "video"),
    "timm": ("timm", "images"),
    "transformers": ("transformers", "texts"),
    "ultralytics": ("ultralytics", "yolo"),
    "segmentation": ("segmentation_models_pytorch", "segmentation"),
    "monai": ("monai", "medical"),
    "diffusers": ("diffusers", "diffusion"),
    "vit-pytorch": ("vit-pytorch", "vits"),
    "x-transformers": ("x-transformers", "languages"),
    "open_clip": ("open_clip_torch", "clips"),
    "torchaudio": ("torchaudio", "sounds"),
    "hand": ("torch", "hand"),
}


def names_of(zoo: str) -> tuple[str, ...]:
    """The networks of a zoo."""
    if zoo == "torchvision":
        return vision.CLASSIFIERS
    if zoo == "detection":
        return (*vision.SEGMENTATION, *vision.DETECTION)
    return tuple(_module(zoo).NAMES)


def build(zoo: str, name: str) -> tuple[nn.Module, Inputs]:
    """A network with random weights, and inputs."""
    torch.manual_seed(0)
    model, inputs = _module(zoo).build(name)
    return model, inputs


def _module(zoo: str) -> ModuleType:
    return importlib.import_module(f"tests.sweep.{ZOOS[zoo][1]}")


def row(zoo: str, name: str, dtype: torch.dtype, how: Check = check) -> Row:
    """What comes of a network, in float32 where its code insists on that; an exception is a failure."""
    try:
        model, inputs = build(zoo, name)
        wide = tree_map(lambda x: x.to(dtype) if _is_float(x) else x, inputs)
        try:
            outputs(model.to(dtype).eval(), wide)
        except RuntimeError:
            if dtype is torch.float32:
                raise
            model, wide = build(zoo, name)
            return replace(how(model, wide), why="float32 is written into its code")
        return how(model, wide)
    except Exception as error:
        return Row("failed", why=f"{type(error).__name__}: {error}")


def _is_float(x: object) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def line(name: str, found: Row) -> str:
    """A row in Markdown."""
    why = " ".join("; ".join(filter(None, (found.why, found.stays))).split()).replace("|", "/")[:240]
    if not found.groups:
        return f"| {name} | {found.verdict} | | | | | | | {why} |"
    return (
        f"| {name} | {found.verdict} | {found.moved:.0e} | {found.left:.3f} | {found.groups} | {found.stayed} "
        f"| {found.graph:.1f} s | {found.seconds:.1f} s | {why} |"
    )


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("names", nargs="*")
    parser.add_argument("--zoo", choices=tuple(ZOOS))
    parser.add_argument(
        "--limit", type=int, default=0, help="seconds of the processor after which a network counts as failed; 0 for none"
    )
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    parser.add_argument("--trained", action="store_true", help="train each network before and after the removal")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for zoo in [arguments.zoo] if arguments.zoo else [zoo for zoo in ZOOS if _is_there(zoo)]:
        names = [n for n in names_of(zoo) if not arguments.names or n in arguments.names]
        if names:
            table(zoo, names, getattr(torch, arguments.dtype), arguments.limit, trained if arguments.trained else check)


def _is_there(zoo: str) -> bool:
    return importlib.util.find_spec(ZOOS[zoo][0].removesuffix("_torch").replace("-", "_")) is not None


class _Late(BaseException):  # no code under test takes it for an error of its own
    pass


@contextmanager
def _within(seconds: int) -> Iterator[None]:
    """Raise `_Late` after some seconds of the processor."""

    def late(*_: object) -> None:
        raise _Late

    signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def limited(zoo: str, name: str, dtype: torch.dtype, seconds: int, how: Check = check) -> Row:
    """What comes of a network within a time."""
    try:
        with _within(seconds):
            return row(zoo, name, dtype, how)
    except _Late:
        return Row("failed", why=f"not done after {seconds} s")


def table(zoo: str, names: list[str], dtype: torch.dtype, limit: int = 0, how: Check = check) -> None:
    """Print one zoo's table, and how many passed."""
    versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in dict.fromkeys(("torch", ZOOS[zoo][0])))
    print(f"\n{zoo}: {versions}, {str(dtype).removeprefix('torch.')}, one thread, seconds of the processor\n")
    print("| network | removal | outputs moved by | parameters left | groups | stayed | graph | all | stays, and why |")
    print("|---|---|--:|--:|--:|--:|--:|--:|---|")
    verdicts = []
    for name in names:
        found = limited(zoo, name, dtype, limit, how)
        verdicts.append(found.verdict)
        print(line(name, found), flush=True)
    print("\n" + ", ".join(f"{verdicts.count(v)} {v}" for v in ("pass", "refused", "failed", "blind")) + f" of {len(names)}")


if __name__ == "__main__":
    main()
