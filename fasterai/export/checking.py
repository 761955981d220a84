"""Steps that all export formats share: sample inputs, the model's outputs, and a file that is whole or absent."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fasterai.core.files import written_files
from fasterai.model.inputs import as_tuple
from fasterai.model.running import at_rest

__all__ = ["as_inputs", "check_place", "model_outputs", "require", "written"]


def require(*names: str) -> Any:
    """Import modules that the extra `export` brings, and return the last one named.

    Raises:
        ImportError: One is not installed.
    """
    try:
        return [importlib.import_module(name) for name in names][-1]
    except ImportError as error:
        raise ImportError(f"ONNX needs {' and '.join(names)}: pip install '.[export]' in a checkout of fasterai") from error


def as_inputs(sample: Any) -> tuple[Any, ...]:
    """Return a sample as the model's positional arguments, or refuse one without a tensor.

    Raises:
        TypeError: There is no tensor among them.
    """
    inputs = as_tuple(sample)
    if not any(isinstance(leaf, Tensor) for leaf in tree_leaves(inputs)):
        raise TypeError(
            f"sample must be a tensor or a tuple of the model's arguments, got {sample!r} ({type(sample).__name__})"
        )
    return inputs


def model_outputs(model: nn.Module, inputs: tuple[Any, ...]) -> list[Tensor]:
    """Return the model's outputs in eval mode as a flat list; its modes and the random generators stay unchanged.

    Raises:
        ValueError: It does not run on these inputs.
    """
    with at_rest(model):
        try:
            output = model(*inputs)
        except Exception as error:
            raise ValueError(f"sample must be arguments that the model runs on, got an error: {error}") from error
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


@contextmanager
def written(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary path of that name to write to; at a normal end its files are moved to where they belong.

    Raises:
        ValueError: The folder is not there.
    """
    check_place(path)
    with written_files(path) as place:
        yield place


def check_place(path: str | os.PathLike[str]) -> None:
    """Refuse a path that no file can be written to.

    Raises:
        ValueError: The folder is not there, or the path is a folder.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise ValueError(f"output_path must be in a folder that is there, got {str(path)!r}")
    if path.is_dir():
        raise ValueError(f"output_path must be a file, got the folder {str(path)!r}")
