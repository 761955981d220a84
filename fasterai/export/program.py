"""Programs of `torch.export`: files that torch runs without the model's source, compared with the model."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from fasterai.core.files import write_file
from fasterai.export.checking import as_inputs, check_place, model_outputs
from fasterai.model.exporting import exporting
from fasterai.model.names import unwrap
from fasterai.model.outputs import check_same
from fasterai.model.running import at_rest

__all__ = ["export_program"]


def export_program(model: nn.Module, sample: Any, path: str | os.PathLike[str]) -> Path:
    """Write a model, in eval mode, as a `torch.export` program, then load it, run it and compare it with the model.

    Args:
        model: The model, wrapped or not; it and its modes stay as they are.
        sample: A tensor, or a tuple of the model's positional arguments; the program takes inputs of these shapes.
        path: The file to write, customarily `.pt2`. It is replaced only once the new one has passed the check.

    Returns:
        The path of the file. `torch.export.load(path).module()` is the model.

    Raises:
        ValueError: The model cannot be exported, or what was written disagrees with it by more than 1e-5 of the outputs'
            scale; no file is left behind then.
    """
    check_place(path)
    # A tensor of a subclass, as fastai's batches are, would want that class when the file is read.
    model, inputs = unwrap(model), tree_map(_plain, as_inputs(sample))
    expected = model_outputs(model, inputs)
    content = io.BytesIO()  # where its own writing meets a full disk, torch ends the process
    with exporting(), at_rest(model):
        try:
            torch.export.save(torch.export.export(model, inputs, strict=False), content)
        except Exception as error:
            raise ValueError(f"model must be exportable by torch.export, got an error: {error}") from error
    content.seek(0)
    with torch.no_grad():
        loaded = torch.export.load(content).module()(*inputs)
    check_same(expected, [x for x in tree_leaves(loaded) if isinstance(x, torch.Tensor)], "program", "the program")
    write_file(path, lambda file: file.write(content.getbuffer()))
    return Path(path)


def _plain(x: Any) -> Any:
    return x.as_subclass(torch.Tensor) if isinstance(x, torch.Tensor) else x
