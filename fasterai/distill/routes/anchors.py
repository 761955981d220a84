"""Anchors of a route: checkpoints of a teacher, read from what any trainer writes, and loaded into one network in turn."""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fasterai.core.checks import not_one_of
from fasterai.display import Brief
from fasterai.model.names import plain_name, unwrap
from fasterai.model.supported import network_in

__all__ = ["Anchor", "find_files", "fit_tensors", "load_anchor_"]

#: Where trainers keep the weights inside of what they save: fasterai and Lightning, fastai, others.
INSIDE = ("state_dict", "model", "model_state_dict")
SUFFIXES = (".ckpt", ".pt", ".pth", ".safetensors")
#: Files of weights in a folder that is one checkpoint, as of Hugging Face.
IN_FOLDERS = ("model.safetensors", "pytorch_model.bin")
MOST_PROBLEMS = 3


@dataclass(frozen=True, repr=False)
class Anchor(Brief):
    """Checkpoint of a teacher: a file, a state dict, or a network itself.

    Attributes:
        name: What it is called in tables and messages.
        source: Where its weights are.
    """

    name: str
    source: Path | Mapping[str, Any] | nn.Module = field(repr=False)

    def tensors(self) -> Mapping[str, Tensor]:
        """Return its parameters and buffers by name; those of a file are read when they are used.

        Raises:
            ValueError: It holds none, or cannot be read.
            OSError: There is no such file.
        """
        if isinstance(self.source, nn.Module):
            return _own(self.source)
        if isinstance(self.source, Mapping):
            return _inside(self.source, self.name)
        return read_tensors(self.source)


def read_tensors(path: Path) -> Mapping[str, Tensor]:
    """Read parameters and buffers of a file of torch or of safetensors, whichever trainer wrote it."""
    if path.is_dir():
        path = next((path / name for name in IN_FOLDERS if (path / name).is_file()), path / IN_FOLDERS[0])
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), "pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        except SafetensorError as error:
            raise ValueError(f"checkpoints must be files of weights, got {path} ({error})") from error
    try:
        with _fastai_lists():
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except OSError:
        raise
    except Exception as error:  # a broken or foreign file can fail in any of zip, pickle and torch
        raise ValueError(
            f"checkpoints must be files of weights that torch.load(path, weights_only=True) reads, got {path} "
            f"({type(error).__name__}); write them by torch.save(model.state_dict(), path)"
        ) from error
    return _inside(found, str(path))


def _fastai_lists() -> AbstractContextManager[object]:
    """Let `torch.load` read the plain list of fastcore in which fastai's `learn.save` writes the optimizer."""
    try:
        from fastcore.foundation import L
    except ImportError:
        return nullcontext()
    return torch.serialization.safe_globals([L])


def _inside(found: Any, what: str) -> Mapping[str, Tensor]:
    for name in INSIDE:
        if isinstance(found, Mapping) and isinstance(found.get(name), Mapping):
            found = found[name]
    tensors = {str(n): x for n, x in found.items() if isinstance(x, Tensor)} if isinstance(found, Mapping) else {}
    if not tensors:
        raise ValueError(
            f"checkpoints must hold a state dict, got {what}, which holds a {type(found).__name__} without tensors"
        )
    return tensors


def find_files(folder: Path) -> Iterator[Path]:
    """Find the checkpoints of a folder, in the order of the numbers in their names."""
    for path in sorted(folder.iterdir(), key=_in_order):
        is_file = path.suffix in SUFFIXES and not path.name.startswith(".")
        if is_file if path.is_file() else any((path / name).is_file() for name in IN_FOLDERS):
            yield path


def _in_order(path: Path) -> list[tuple[int, str]]:
    parts = re.split(r"(\d+)", path.stem)
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]


def load_anchor_(model: nn.Module, anchor: Anchor) -> None:
    """Write an anchor's values into a network, whose tensors stay the same objects.

    Raises:
        ValueError: It is of another network.
    """
    own = _own(model)
    with torch.no_grad():
        for name, value in fit_tensors(own, anchor).items():
            own[name].copy_(value)
    torch.clear_autocast_cache()  # it holds casts of the weights as they were


def fit_tensors(own: Mapping[str, Tensor] | nn.Module, anchor: Anchor) -> dict[str, Tensor]:
    """Find the tensors of a network in an anchor, whatever wrappers have put before their names.

    Args:
        own: The network, or its tensors by name.
        anchor: The anchor.

    Raises:
        ValueError: It is of another network; names and shapes that differ are named.
    """
    own = _own(own) if isinstance(own, nn.Module) else own
    found = {plain_name(name): x for name, x in anchor.tensors().items()}
    parts = [{n.removeprefix(p): x for n, x in found.items() if n.startswith(p)} for p in _prefixes(found, list(own))]
    part, problems = min(((one, _problems(own, one)) for one in parts), key=lambda pair: len(pair[1]))
    if problems:
        rest = f"; and {len(problems) - MOST_PROBLEMS} more" if len(problems) > MOST_PROBLEMS else ""
        raise ValueError(
            f"checkpoints must be of the network that the route is given, got {anchor.name}, "
            f"where {'; '.join(problems[:MOST_PROBLEMS])}{rest}"
        )
    return {name: part[name] for name in own if name in part}


def check_anchors(anchors: Sequence[Anchor], model: nn.Module) -> None:
    """Refuse anchors of another network, before anything is trained."""
    own = _own(model)
    for one in anchors:
        fit_tensors(own, one)


def _own(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a network's state dict themselves."""
    state = unwrap(model).state_dict(keep_vars=True)
    return {plain_name(name): x for name, x in state.items() if isinstance(x, Tensor)}


def _prefixes(found: Mapping[str, Any], wanted: Sequence[str]) -> list[str]:
    """List what may stand before the names, such as `module.`; nothing comes first."""
    tails = [f".{name}" for name in wanted[:2]]
    return list(dict.fromkeys(["", *(n[: 1 - len(tail)] for tail in tails for n in found if n.endswith(tail))]))


def _problems(own: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> list[str]:
    held = {id(own[name]) for name in found if name in own}
    wrong = [
        f"{name} is {_by(x)} instead of {_by(own[name])}"
        for name, x in found.items()
        if name in own and x.shape != own[name].shape
    ]
    counts = "num_batches_tracked"  # which older files lack
    missing = [f"{name} is missing" for name, x in own.items() if id(x) not in held and not name.endswith(counts)]
    return [*wrong, *missing, *(f"{name} is too many" for name in found if name not in own)]


def _by(x: Tensor) -> str:
    return "x".join(map(str, x.shape)) or "a number"


def as_anchor(given: Any, number: int) -> Anchor:
    """Return an anchor of what a user gives: a path, a state dict, what holds one, or a network.

    Raises:
        TypeError: It is none of these.
        ValueError: There is no such file.
    """
    if isinstance(given, Anchor):
        return given
    if isinstance(given, str | os.PathLike):
        path = Path(given)
        if not path.exists():
            raise ValueError(f"checkpoints must be files, got {path}, which does not exist")
        return Anchor(path.name, path)
    if isinstance(given, Mapping | nn.Module):
        return Anchor(f"anchor {number}", given)
    raise not_one_of("checkpoints", "paths, state dicts or networks", given, network_in(given))
