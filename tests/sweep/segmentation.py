"""Networks of segmentation_models_pytorch: each architecture once, and encoders of each kind under a U-Net."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["NAMES", "build"]

ARCHITECTURES = (
    *("Unet", "UnetPlusPlus", "MAnet", "Linknet", "FPN", "PSPNet", "PAN", "DeepLabV3", "DeepLabV3Plus", "UPerNet", "Segformer"),
    "DPT",
)
ENCODERS = (
    *("resnet18", "resnext50_32x4d", "se_resnet50", "densenet121", "dpn68", "vgg11_bn", "efficientnet-b0", "mobilenet_v2"),
    *("xception", "inceptionv4", "mit_b0", "mobileone_s0", "timm-regnetx_002", "timm-res2net50_14w_8s", "timm-resnest14d"),
    *("timm-skresnet18", "timm-gernet_s", "tu-convnext_atto"),
)
NAMES = (*ARCHITECTURES, *(f"Unet/{encoder}" for encoder in ENCODERS[1:]))
OPTIONS: dict[str, dict[str, Any]] = {
    "DPT": {"encoder_name": "tu-vit_tiny_patch16_224", "encoder_depth": 4, "dynamic_img_size": True},
    "Unet/tu-convnext_atto": {"encoder_depth": 4, "decoder_channels": (64, 32, 16, 8)},
}


def build(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A network, and an image."""
    import segmentation_models_pytorch

    kind, _, encoder = name.partition("/")
    side = 128 if name == "PAN" else 64
    options = {"encoder_name": encoder or "resnet18", "encoder_weights": None, "classes": 3, **OPTIONS.get(name, {})}
    return getattr(segmentation_models_pytorch, kind)(**options), (torch.randn(2, 3, side, side),)
