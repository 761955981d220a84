"""torchvision's networks for videos, and for the movement between two images."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.video import mvit

__all__ = ["NAMES", "build"]

VIDEOS = ("r3d_18", "mc3_18", "r2plus1d_18", "s3d", "swin3d_t", "mvit_v1_b", "mvit_v2_s")
NAMES = (*VIDEOS, "raft_small")


def build(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A network, and a video or two images."""
    if name == "raft_small":
        model = torchvision.models.optical_flow.raft_small(weights=None)
        return model, (torch.randn(1, 3, 128, 128), torch.randn(1, 3, 128, 128), torch.tensor(2).item())
    frames, side = (16, 224) if name == "s3d" else (8, 64)
    with patch.object(mvit, "MViT", partial(_of_short_clips, mvit.MViT)):
        model = getattr(torchvision.models.video, name)(weights=None, num_classes=10)
    return model, (torch.randn(1, 3, frames, side, side),)


def _of_short_clips(make: Callable[..., nn.Module], **options: Any) -> nn.Module:
    """The network for small clips, of which it has a table of positions."""
    return make(**{**options, "spatial_size": (64, 64), "temporal_size": 8})
