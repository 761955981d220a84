"""ONNX files: written by torch.onnx, run in onnxruntime, and compared with the model."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fasterai.core.checks import check_choice, check_count
from fasterai.display import one_line
from fasterai.export.checking import as_inputs, model_outputs, require, written
from fasterai.model.exporting import exporting
from fasterai.model.inputs import batch_of
from fasterai.model.names import unwrap
from fasterai.model.outputs import check_same
from fasterai.model.running import at_rest

__all__ = ["ONNXModel", "export_onnx", "verify_onnx"]

#: A single ONNX file holds less than 2 GiB; larger weights go into a file beside it.
SINGLE_FILE = 2**31 - 2**26
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


def export_onnx(
    model: nn.Module,
    sample: Any,
    output_path: str | os.PathLike[str],
    *,
    opset_version: int = 18,
    quantize: bool = False,
    optimize: bool = True,
    dynamic_batch: bool = True,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
) -> Path:
    """Write a model, in eval mode, as an ONNX file that has been run and compared with it.

    Args:
        model: The model, wrapped or not; it and its modes stay as they are.
        sample: A tensor, or a tuple of the model's positional arguments; batched in dimension 0.
        output_path: The file to write. It is replaced only once the new one has passed the check.
        opset_version: The version of ONNX's operators.
        quantize: Must be False: quantisation is not part of this library.
        optimize: Let the exporter fold constants and remove what is not used.
        dynamic_batch: True for a file that runs on any batch size, which is checked with another one than the sample's.
        input_names: Names of the inputs in the file.
        output_names: Names of the outputs in the file.

    Returns:
        The path of the file.

    Raises:
        ImportError: The extra `export` is not installed.
        ValueError: The model cannot be exported, or what was written disagrees with it by more than 1e-4 of the outputs'
            scale; no file is left behind then.
    """
    if quantize:
        raise ValueError(f"quantize must be False, got {quantize!r}: quantisation is not part of this library")
    check_count("opset_version", opset_version)
    require("onnx", "onnxscript", "onnxruntime")
    model, inputs = unwrap(model), as_inputs(sample)
    expected = model_outputs(model, inputs)
    if dynamic_batch:
        size = _batch_size(inputs)
        other = batch_of(inputs, size + 1, size)
        expected_of_other = _of_another_batch(model, other)
    with written(output_path) as place:
        # Some versions of the exporter take a batch of one for a constant.
        traced = batch_of(inputs, max(2, size), size) if dynamic_batch else inputs
        options = {"opset_version": opset_version, "optimize": optimize}
        names = {"input_names": _names(input_names), "output_names": _names(output_names)}
        _write(model, traced, place, dynamic_batch, **options, **names)
        _check_opset(place, opset_version)
        exported = ONNXModel(place)
        check_same(expected, exported.outputs(inputs), "onnx", "the ONNX file")
        if dynamic_batch:
            _check_other_batch(exported, other, expected_of_other)
    return Path(output_path)


def _names(names: Sequence[str] | None) -> list[str] | None:
    if isinstance(names, str):
        raise TypeError(f"input_names and output_names must be lists of names, got {names!r}")
    return None if names is None else list(names)


def _batch_size(inputs: tuple[Any, ...]) -> int:
    """Return the size of dimension 0, which all tensors of the sample share.

    Raises:
        ValueError: They do not.
    """
    sizes = {len(x) for x in inputs if isinstance(x, Tensor) and x.dim()}
    if len(sizes) != 1 or sizes == {0}:
        shown = ", ".join(str(size) for size in sorted(sizes)) or "none"
        raise ValueError(f"sample must have one batch size in dimension 0, got {shown}; or pass dynamic_batch=False")
    return sizes.pop()


def _of_another_batch(model: nn.Module, inputs: tuple[Any, ...]) -> list[Tensor]:
    try:
        return model_outputs(model, inputs)
    except ValueError as error:
        size = _batch_size(inputs)
        raise ValueError(f"dynamic_batch must be False for a model that does not run on a batch of {size}: {error}") from error


def _check_other_batch(exported: ONNXModel, inputs: tuple[Any, ...], expected: list[Tensor]) -> None:
    """Check a file on a batch of another size.

    The exporter silently fixes a branch on the batch size to the branch that the sample takes.
    """
    try:
        check_same(expected, exported.outputs(inputs), "onnx", "the ONNX file")
    except ValueError as error:
        raise ValueError(f"dynamic_batch must be False for a model that depends on its batch size: {error}") from error


def _check_opset(place: Path, asked: int) -> None:
    """Check the version of a file: where the exporter cannot convert, it keeps its own version with only a log line."""
    opsets = require("onnx").load(str(place), load_external_data=False).opset_import
    got = next(opset.version for opset in opsets if opset.domain in ("", "ai.onnx"))
    if got != asked:
        raise ValueError(f"opset_version must be one that the exporter reaches for this model, got {asked}; it wrote {got}")


def _write(model: nn.Module, inputs: tuple[Any, ...], place: Path, dynamic_batch: bool, **options: Any) -> None:
    batch = torch.export.Dim("batch")
    shapes = tuple({0: batch} if isinstance(x, Tensor) and x.dim() else None for x in inputs) if dynamic_batch else None
    size = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    with exporting(), at_rest(model), open(os.devnull, "w") as silence:
        try:
            with contextlib.redirect_stdout(silence), warnings.catch_warnings():
                warnings.filterwarnings("ignore", "# The axis name")  # of a second input with the same batch
                torch.onnx.export(
                    model,
                    inputs,
                    place,
                    dynamo=True,
                    verbose=False,
                    dynamic_shapes=shapes,
                    external_data=size > SINGLE_FILE,
                    **options,
                )
        except OSError:
            raise
        except Exception as error:
            repair = "; a model that fixes its batch size needs dynamic_batch=False" if dynamic_batch else ""
            raise ValueError(f"model must be exportable to ONNX, got an error: {error}{repair}") from error


class ONNXModel:
    """ONNX file that can be called like a model.

    Attributes:
        path: The file.
        session: The `onnxruntime.InferenceSession`.
    """

    def __init__(self, path: str | os.PathLike[str], device: str = "cpu") -> None:
        """Load a file.

        Args:
            path: The file.
            device: `cpu` or `cuda`.

        Raises:
            ImportError: The extra `export` is not installed.
            ValueError: There is no such file, it is no ONNX file, or onnxruntime has not got the device.
        """
        runtime = require("onnxruntime")
        provider = PROVIDERS[check_choice("device", device, PROVIDERS)]
        if provider not in runtime.get_available_providers():
            raise ValueError(f"device must be one that onnxruntime was built for, got {device!r}")
        if not Path(path).is_file():
            raise ValueError(f"path must be an ONNX file, got {str(path)!r}")
        self.path = Path(path)
        try:
            self.session = runtime.InferenceSession(str(path), providers=[provider])
        except Exception as error:
            raise ValueError(f"path must be an ONNX file that onnxruntime reads, got {str(path)!r}: {error}") from error

    def __repr__(self) -> str:
        return one_line(f"<ONNXModel: {self.path.name}>")

    def outputs(self, inputs: tuple[Any, ...]) -> list[Tensor]:
        """Run the file, and return all outputs as a flat list.

        Raises:
            ValueError: The number of inputs is not that of the file.
        """
        known = [node.name for node in self.session.get_inputs()]
        given = [x for x in inputs if isinstance(x, Tensor | np.ndarray)]
        if len(given) != len(known):
            raise ValueError(f"inputs must be {len(known)} ({', '.join(known)}), got {len(given)}")
        arrays = {n: x.detach().cpu().numpy() if isinstance(x, Tensor) else x for n, x in zip(known, given, strict=True)}
        try:
            outputs = self.session.run(None, arrays)
        except Exception as error:
            raise ValueError(f"inputs must be such as {self.path.name} takes, got an error: {error}") from error
        return [torch.from_numpy(np.asarray(y, order="C")) for y in outputs]

    def __call__(self, *inputs: Any) -> Any:
        """Return one output as a tensor, several as a tuple; inputs are tensors or arrays."""
        outputs = self.outputs(inputs)
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def warmup(self, sample: Any, n: int = 10) -> None:
        """Run the file `n` times, so that a measurement afterwards is not slowed by first runs."""
        for _ in range(check_count("n", n)):
            self.outputs(as_inputs(sample))


def verify_onnx(
    model: nn.Module, onnx_path: str | os.PathLike[str], sample: Any, rtol: float = 1e-3, atol: float = 1e-5
) -> bool:
    """Tell if a file computes what a model computes in eval mode: `|difference| <= atol + rtol * |model's output|`.

    Raises:
        ImportError: The extra `export` is not installed.
        ValueError: There is no such file, or it or the model does not run on the sample.
    """
    inputs = as_inputs(sample)
    expected, got = model_outputs(unwrap(model), inputs), ONNXModel(onnx_path).outputs(inputs)
    if [a.shape for a in expected] != [b.shape for b in got]:
        return False
    pairs = zip(expected, got, strict=True)
    return all(torch.allclose(b.double(), a.cpu().double(), rtol=rtol, atol=atol) for a, b in pairs)
