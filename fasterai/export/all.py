"""For notebooks: `from fasterai.export.all import *`. Re-exports only."""

from fasterai.export.onnx import ONNXModel, export_onnx, verify_onnx
from fasterai.export.program import export_program

__all__ = ["ONNXModel", "export_onnx", "export_program", "verify_onnx"]
