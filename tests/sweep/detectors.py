"""torchvision's whole detectors, from a list of images to boxes, labels and scores, with random weights and small images."""

from __future__ import annotations

from typing import Any

import torch
import torchvision
from torch import Tensor, nn

__all__ = ["NAMES", "build"]

NAMES = (
    *("fasterrcnn_mobilenet_v3_large_320_fpn", "ssdlite320_mobilenet_v3_large", "ssd300_vgg16", "fasterrcnn_resnet50_fpn"),
    *("retinanet_resnet50_fpn", "fcos_resnet50_fpn", "maskrcnn_resnet50_fpn", "keypointrcnn_resnet50_fpn"),
)
#: Few boxes, all of them shown: scores of random weights are low.
FEW = {"box_score_thresh": 0.0, "rpn_pre_nms_top_n_test": 60, "rpn_post_nms_top_n_test": 30, "box_detections_per_img": 10}
ALL = {"score_thresh": 0.0, "topk_candidates": 40, "detections_per_img": 20}


def build(name: str) -> tuple[nn.Module, tuple[list[Tensor]]]:
    """A detector of 5 classes, and two images of different sizes."""
    options: dict[str, Any] = dict(FEW if "rcnn" in name else ALL)
    if not name.startswith("ssd"):
        options |= {"min_size": 64, "max_size": 96}
    if name.startswith("keypoint"):
        options |= {"num_keypoints": 4}
    else:
        options |= {"num_classes": 5}
    model = getattr(torchvision.models.detection, name)(weights=None, weights_backbone=None, **options)
    return model, ([torch.rand(3, 64, 80), torch.rand(3, 72, 64)],)
