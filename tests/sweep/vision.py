"""torchvision's networks, with random weights and inputs."""

from __future__ import annotations

from typing import Any

import torch
import torchvision
from torch import Tensor, nn

__all__ = ["CLASSIFIERS", "DETECTION", "SEGMENTATION", "build"]

CLASSIFIERS = (
    *("alexnet", "vgg11_bn", "resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2", "densenet121", "squeezenet1_0"),
    *("googlenet", "inception_v3", "mobilenet_v2", "mobilenet_v3_small", "shufflenet_v2_x0_5", "mnasnet0_5", "efficientnet_b0"),
    *("efficientnet_v2_s", "regnet_x_400mf", "regnet_y_400mf", "convnext_tiny", "vit_b_16", "swin_t", "swin_v2_t", "maxvit_t"),
)
SEGMENTATION = ("fcn_resnet50", "deeplabv3_resnet50", "deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large")
DETECTION = (
    *("ssd300_vgg16", "ssdlite320_mobilenet_v3_large", "retinanet_resnet50_fpn", "fasterrcnn_resnet50_fpn"),
    "fasterrcnn_mobilenet_v3_large_320_fpn",
)


def build(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A network, of detectors its backbone, and an image."""
    if name in DETECTION:
        detector: Any = getattr(torchvision.models.detection, name)(weights=None, weights_backbone=None)
        side = 300 if "300" in name else 320 if "320" in name else 128
        return detector.backbone, (torch.randn(1, 3, side, side),)
    if name in SEGMENTATION:
        return getattr(torchvision.models.segmentation, name)(weights=None, weights_backbone=None), (torch.randn(1, 3, 96, 96),)
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    side = 299 if name == "inception_v3" else 224
    return getattr(torchvision.models, name)(weights=None, **options), (torch.randn(1, 3, side, side),)
