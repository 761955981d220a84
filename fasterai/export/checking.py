"""What every format does alike: sample inputs, the model's outputs, the comparison, and a file that is whole or absent."""

from __future__ import annotations

import importlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fasterai.model.running import evaluating, undisturbed

__all__ = ["as_inputs", "check_same", "model_outputs", "require", "with_batch", "written"]


def require(*names: str) -> Any:
    """The last of the modules named, all of which the extra `export` brings.

    Raises:
        ImportError: One is not installed.
    """
    try:
        return [importlib.import_module(name) for name in names][-1]
    except ImportError as error:
        raise ImportError(f"ONNX needs {' and '.join(names)}: pip install 'fasterai[export]'") from error


def as_inputs(sample: Any) -> tuple[Any, ...]:
    """The model's positional arguments.

    Raises:
        TypeError: There is no tensor among them.
    """
    inputs = tuple(sample) if isinstance(sample, tuple | list) else (sample,)
    if not any(isinstance(leaf, Tensor) for leaf in tree_leaves(inputs)):
        raise TypeError(
            f"sample must be a tensor or a tuple of the model's arguments, got {sample!r} ({type(sample).__name__})"
        )
    return inputs


def with_batch(inputs: tuple[Any, ...], size: int) -> tuple[Any, ...]:
    """The same inputs with another batch size, the items repeated in turn; what is no tensor stays."""

    def take(x: Any) -> Any:
        return x[torch.arange(size, device=x.device) % len(x)] if isinstance(x, Tensor) and x.dim() else x

    return tuple(take(x) for x in inputs)


def model_outputs(model: nn.Module, inputs: tuple[Any, ...]) -> list[Tensor]:
    """What the model computes in eval mode, as a flat list; its modes and the random generators stay as they are.

    Raises:
        ValueError: It does not run on these inputs.
    """
    with torch.no_grad(), evaluating(model), undisturbed(model):
        try:
            output = model(*inputs)
        except Exception as error:
            raise ValueError(f"sample must be arguments that the model runs on, got an error: {error}") from error
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def check_same(expected: Sequence[Tensor], got: Sequence[Tensor], tolerance: float, what: str) -> None:
    """Outputs agree to a share of their largest magnitude.

    Raises:
        ValueError: They do not.
    """
    if len(expected) != len(got):
        raise ValueError(f"{what} must give {len(expected)} outputs as the model does, got {len(got)}")
    for i, (a, b) in enumerate(zip(expected, got, strict=True)):
        if a.shape != b.shape:
            raise ValueError(f"{what} must give output {i} the shape {tuple(a.shape)}, got {tuple(b.shape)}")
        if not a.numel():
            continue
        a, b = a.detach().cpu().double(), b.detach().cpu().double()
        difference, scale = (a - b).abs().max().item(), a.abs().max().item()
        if not difference <= tolerance * scale:
            raise ValueError(
                f"{what} must agree with the model to {tolerance:g} of the outputs' scale, got a difference of "
                f"{difference:.3g} in output {i} at a scale of {scale:.3g}"
            )


@contextmanager
def written(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A place to write a file of that name; it and what lies beside it move to where they belong if all goes well.

    Raises:
        ValueError: The folder is not there.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise ValueError(f"output_path must be in a folder that is there, got {str(path)!r}")
    if path.is_dir():
        raise ValueError(f"output_path must be a file, got the folder {str(path)!r}")
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        place = Path(folder) / path.name
        yield place
        for file in sorted(Path(folder).iterdir(), key=lambda file: file == place):  # the file itself comes last
            file.replace(path.parent / file.name)
