"""Weights from a file, loaded into a classifier of torchvision, whichever program wrote them."""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fasterai.cli.errors import UsageError
from fasterai.cli.networks import depends_on_size, make_classifier

__all__ = ["Fitted", "Weights", "fit_weights", "load_classifier", "load_tensors", "read_weights"]

#: Where trainers keep the weights inside of what they save.
INSIDE = ("state_dict", "model", "model_state_dict")
#: Classifiers that only training runs; torchvision's pretrained googlenet and inception_v3 have them.
AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")
#: Names in torchvision's own older files, of densenets and vision transformers: pattern -> name of today.
RENAMED = {
    r"(.*denselayer\d+\.(?:norm|conv))\.([12]\..*)": r"\1\2",
    r"(.*encoder_layer_\d+\.mlp\.)linear_1(\..*)": r"\g<1>0\2",
    r"(.*encoder_layer_\d+\.mlp\.)linear_2(\..*)": r"\g<1>3\2",
}
MOST_PROBLEMS = 3


@dataclass(frozen=True)
class Weights:
    """Content of a file of weights.

    Attributes:
        path: The file.
        tensors: Name -> parameter or buffer.
        classes: The classes' names in the order of the outputs, if the file tells them.
        argument: The argument that named it, for messages.
    """

    path: Path
    tensors: Mapping[str, Tensor]
    classes: tuple[str, ...] | None = None
    argument: str = "WEIGHTS"


@dataclass(frozen=True)
class Fitted:
    """Weights under the names and in the shapes of a classifier of torchvision.

    Attributes:
        tensors: Name -> parameter or buffer.
        classes: The number of classes that they are of.
        heads: Names of the tensors whose shapes follow the number of classes.
        left_out: Names of tensors that were left out, of auxiliary classifiers.
    """

    tensors: Mapping[str, Tensor]
    classes: int
    heads: tuple[str, ...]
    left_out: tuple[str, ...]


def read_weights(path: Path, argument: str = "WEIGHTS") -> Weights:
    """Read a state dict from a file of `torch.save` or safetensors; messages name the argument that the path comes from.

    Raises:
        UsageError: There is no such file, or it holds no state dict.
    """
    if path.is_dir():
        inside = path / "sparse.safetensors"
        raise UsageError(f"{argument} must be a file, got the folder {path}{f'; pass {inside}' if inside.exists() else ''}")
    if not path.is_file():  # a pipe would be waited for without end
        problem = "is no regular file" if path.exists() else "does not exist"
        raise UsageError(f"{argument} must be a file, got {path}, which {problem}")
    return _read_safetensors(path, argument) if path.suffix == ".safetensors" else _read_saved(path, argument)


def _read_safetensors(path: Path, argument: str) -> Weights:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), "pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except SafetensorError as error:
        raise UsageError(f"{argument} must be a file of safetensors, got {path} ({error})") from error
    if header.get("format", "").startswith("fasterai-small"):
        raise UsageError(f"{argument} must be of a network of full size, got {path}, which holds a small one already")
    return Weights(path, tensors, _classes(header, path, argument), argument)


def _classes(header: Mapping[str, str], path: Path, argument: str) -> tuple[str, ...] | None:
    if "classes" not in header:
        return None
    try:
        classes = json.loads(header["classes"])
    except (ValueError, RecursionError):
        classes = None
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise UsageError(f"{argument} must name its classes in a list of text, got {header['classes'][:60]!r} in {path}")
    return tuple(classes)


def _read_saved(path: Path, argument: str) -> Weights:
    try:
        found: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken or foreign file can fail in any of zip, pickle and torch
        raise UsageError(
            f"{argument} must be a state dict that torch.save wrote, got {path} ({type(error).__name__}); "
            "write it by torch.save(model.state_dict(), path)"
        ) from error
    for name in INSIDE:
        if isinstance(found, Mapping) and isinstance(found.get(name), Mapping):
            found = found[name]
    tensors = {str(n): x for n, x in found.items() if isinstance(x, Tensor)} if isinstance(found, Mapping) else {}
    if not tensors:
        raise UsageError(f"{argument} must be a state dict, got {path}, which holds a {type(found).__name__} without tensors")
    return Weights(path, tensors, argument=argument)


def load_classifier(arch: str, weights: Weights, image_size: int) -> tuple[nn.Module, int, list[str]]:
    """Make a network of torchvision with these weights; the number of classes is read off them.

    Returns:
        The network in eval mode, its number of classes, and names of tensors that were left out, of auxiliary classifiers.

    Raises:
        UsageError: The weights are of another network.
    """
    fitted = fit_weights(arch, weights, image_size)
    network = make_classifier(arch, fitted.classes, image_size).eval()
    load_tensors(network, fitted.tensors)
    return network, fitted.classes, list(fitted.left_out)


def fit_weights(arch: str, weights: Weights, image_size: int) -> Fitted:
    """Find the tensors of a network of torchvision among weights, whatever was put before their names.

    Raises:
        UsageError: The weights are of another network, or hold infinite numbers or NaN.
    """
    few, more = (_shapes(arch, count, image_size) for count in (2, 3))
    tensors = _with_names_of_today(_without_prefix(weights.tensors, few))
    left_out = [name for name in tensors if name.startswith(AUXILIARY) and name not in few]
    tensors = {name: x for name, x in tensors.items() if name not in left_out}
    heads = [name for name in few if few[name] != more[name]]
    counts = [len(tensors[name]) for name in heads if name in tensors and tensors[name].dim()]
    classes = counts[0] if counts else 2
    if problems := _problems(tensors, _shapes(arch, classes, image_size)):
        rest = f"; and {len(problems) - MOST_PROBLEMS} more" if len(problems) > MOST_PROBLEMS else ""
        size = f" (of {image_size}x{image_size} images; --image-size changes its shapes)" if depends_on_size(arch) else ""
        raise UsageError(
            f"--arch must be the network that {weights.argument} are of, got {arch!r}{size}, for which in {weights.path} "
            f"{'; '.join(problems[:MOST_PROBLEMS])}{rest}"
        )
    if infinite := [name for name, x in tensors.items() if not x.float().isfinite().all()]:
        raise UsageError(f"{weights.argument} must be finite, got {weights.path}, where {infinite[0]} holds infinity or NaN")
    if weights.classes is not None and len(weights.classes) != classes:
        raise UsageError(
            f"{weights.argument} must name each of its {classes} classes, got {len(weights.classes)} names in {weights.path}"
        )
    return Fitted(tensors, classes, tuple(heads), tuple(left_out))


def load_tensors(network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load tensors that `fit_weights` has found into a network; those that it has and they lack stay as they are."""
    state = OrderedDict(tensors)
    state._metadata = network.state_dict()._metadata  # type: ignore[attr-defined] # MNASNet asks for its version, as files have none
    network.load_state_dict(state, strict=False)  # what older files lack is the count of batches, as checked


def _with_names_of_today(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = dict(tensors)
    for pattern, name in RENAMED.items():
        found = {re.sub(f"^{pattern}$", name, before): x for before, x in found.items()}
    return found


def _shapes(arch: str, classes: int, image_size: int) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(x.shape) for name, x in make_classifier(arch, classes, image_size).state_dict().items()}


def _without_prefix(tensors: Mapping[str, Tensor], known: Mapping[str, Any]) -> dict[str, Tensor]:
    """Remove what wrappers put before the names, such as `module.` or `_orig_mod.`."""
    found = dict(tensors)
    while not found.keys() & known.keys():
        first = {name.partition(".")[0] for name in found}
        if len(first) != 1 or not all("." in name for name in found):
            break
        found = {name.partition(".")[2]: x for name, x in found.items()}
    return found


def _problems(tensors: Mapping[str, Tensor], wanted: Mapping[str, tuple[int, ...]]) -> list[str]:
    wrong = [
        f"{name} is {_by(x.shape)} instead of {_by(wanted[name])}"
        for name, x in tensors.items()
        if name in wanted and tuple(x.shape) != wanted[name]
    ]
    missing = [f"{n} is missing" for n in wanted if n not in tensors and not n.endswith("num_batches_tracked")]
    return [*wrong, *missing, *(f"{name} is too many" for name in tensors if name not in wanted)]


def _by(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a number"
