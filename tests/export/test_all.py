"""The star import gives the familiar names, and loads what it needs only when it is used."""

from __future__ import annotations

import subprocess
import sys


def test_the_star_import_has_the_familiar_names():
    names: dict = {}
    exec("from fasterai.export.all import *", names)
    assert {"ONNXModel", "export_onnx", "export_program", "verify_onnx"} <= names.keys()
    assert not {"nn", "np", "torch"} & names.keys()


def test_importing_needs_none_of_the_extra():
    code = (
        "import sys\nsys.modules['onnx'] = sys.modules['onnxruntime'] = sys.modules['onnxscript'] = None\n"
        "import torch\nfrom fasterai.export.all import *\n"
        "try:\n    export_onnx(torch.nn.ReLU(), torch.zeros(1), 'm.onnx')\nexcept ImportError as error:\n    print(error)\n"
        "try:\n    ONNXModel('m.onnx')\nexcept ImportError as error:\n    print(error)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    first, second = result.stdout.splitlines()
    assert first == "ONNX needs onnx and onnxscript and onnxruntime: pip install '.[export]' in a checkout of fasterai"
    assert second == "ONNX needs onnxruntime: pip install '.[export]' in a checkout of fasterai"
