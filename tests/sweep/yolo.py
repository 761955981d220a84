"""Ultralytics' networks, from their configurations, without weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["NAMES", "build"]

NAMES = (
    *("yolov3-tinyu", "yolov5n", "yolov5n6", "yolov6n", "yolov8n", "yolov8n-p2", "yolov8n-p6", "yolov8n-ghost", "yolov9t"),
    *("yolov10n", "yolo11n", "yolo12n", "yolo26n", "yolov8n-cls", "yolo11n-cls", "yolov8n-seg", "yolo11n-seg", "yolo26n-seg"),
    *("yolov8n-pose", "yolo11n-pose", "yolov8n-obb", "yolo11n-obb", "yolo26n-obb", "yolov9c-seg", "rtdetr-l"),
)
#: Name -> the configuration, where it is called otherwise.
FILES = {"yolov3-tinyu": "yolov3-tiny", "yolov5n6": "yolov5n-p6"}


def build(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A network as its library builds it for training, and an image."""
    import ultralytics

    kind = ultralytics.RTDETR if name.startswith("rtdetr") else ultralytics.YOLO
    model: nn.Module = kind(f"{FILES.get(name, name)}.yaml").model
    side = 128 if "p6" in FILES.get(name, name) or name.startswith("rtdetr") else 64
    return model.requires_grad_(True), (torch.rand(1, 3, side, side),)
