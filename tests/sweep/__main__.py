"""Exact removal over many networks, as tables in Markdown.

`python -m tests.sweep [--dtype float64] [--zoo torchvision|detection|timm|transformers] [NAME ...]`. Without a zoo, all.
A network passes if its outputs before and after agree to 1e-4 of their scale (1e-5 in float64) with the shapes unchanged.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import warnings
from types import ModuleType

import torch
from torch import nn

from tests.sweep import vision
from tests.sweep.check import Inputs, Row, check

ZOOS = {"torchvision": "torchvision", "detection": "torchvision", "timm": "timm", "transformers": "transformers"}


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
    return (vision if ZOOS[zoo] == "torchvision" else _module(zoo)).build(name)


def _module(zoo: str) -> ModuleType:
    return importlib.import_module({"timm": "tests.sweep.images", "transformers": "tests.sweep.texts"}[zoo])


def row(zoo: str, name: str, dtype: torch.dtype) -> Row:
    """What comes of a network; an exception is a failure."""
    try:
        model, inputs = build(zoo, name)
        return check(model.to(dtype), tuple(x.to(dtype) if x is not None and x.is_floating_point() else x for x in inputs))
    except Exception as error:
        return Row("failed", why=f"{type(error).__name__}: {error}")


def line(name: str, found: Row) -> str:
    """A row in Markdown."""
    why = " ".join(found.why.split()).replace("|", "/")[:200]
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
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for zoo in [arguments.zoo] if arguments.zoo else ZOOS:
        names = [n for n in names_of(zoo) if not arguments.names or n in arguments.names]
        if names:
            table(zoo, names, getattr(torch, arguments.dtype))


def table(zoo: str, names: list[str], dtype: torch.dtype) -> None:
    """Print one zoo's table, and how many passed."""
    versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in dict.fromkeys(("torch", ZOOS[zoo])))
    print(f"\n{zoo}: {versions}, {str(dtype).removeprefix('torch.')}, one thread, seconds of the processor\n")
    print("| network | removal | outputs moved by | parameters left | groups | stayed | graph | all | why |")
    print("|---|---|--:|--:|--:|--:|--:|--:|---|")
    verdicts = []
    for name in names:
        found = row(zoo, name, dtype)
        verdicts.append(found.verdict)
        print(line(name, found), flush=True)
    print("\n" + ", ".join(f"{verdicts.count(v)} {v}" for v in ("pass", "refused", "failed", "blind")) + f" of {len(names)}")


if __name__ == "__main__":
    main()
