"""Masks of many networks are trained for some steps before a removal; the optimizer goes on and the loss falls.

`python -m tests.sweep --trained` does the same for whole zoos.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from tests.networks import Residual, perceptron
from tests.sweep import texts
from tests.sweep.trained import trained
from tests.transformer_nets import Design, Transformer

IMAGE = (4, 3, 16, 16)


def convolutions() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 12, 1)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5)),
    )


def torchvisions(name: str) -> nn.Module:
    from torchvision.models import convnext, vision_transformer

    if name == "vit":
        return vision_transformer.VisionTransformer(16, 8, 1, 2, 16, 24, num_classes=5)
    blocks = [convnext.CNBlockConfig(8, 12, 1), convnext.CNBlockConfig(12, None, 1)]
    return convnext.ConvNeXt(blocks, num_classes=5)


def timms() -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(img_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=2, num_classes=5)


def transformers_of(name: str) -> tuple[nn.Module, tuple[Any, ...]]:
    """Make one of the sweep's networks with a single layer."""
    import transformers

    config, model, sizes, kind = texts.TABLE[name]
    config = getattr(transformers, config)(**{**sizes, "num_hidden_layers": 1, "return_dict": True})
    return getattr(transformers, model)(config), texts.INPUTS[kind]()


def designed(design: Design) -> tuple[nn.Module, tuple[Any, ...]]:
    model = Transformer(design)
    return model, (model.inputs(4, 6),)


def of_image(make: Callable[[], nn.Module]) -> tuple[nn.Module, tuple[Any, ...]]:
    return make(), (torch.randn(IMAGE),)


NETWORKS: dict[str, Callable[[], tuple[nn.Module, tuple[Any, ...]]]] = {
    "perceptron": lambda: (perceptron(12, 16, 8, 4), (torch.randn(8, 12),)),
    "convolutions": lambda: of_image(convolutions),
    "a shortcut": lambda: of_image(Residual),
    "a ViT by hand": lambda: designed(Design(token=True, reads="patches", fused=True)),
    "a Llama by hand": lambda: designed(Design(heads=4, shared=2, norm="own rms", positions="rotary", tied=True, gated=True)),
    "a BERT by hand": lambda: designed(Design(pre=False)),
    "torchvision vit": lambda: of_image(partial(torchvisions, "vit")),
    "torchvision convnext": lambda: of_image(partial(torchvisions, "convnext")),
    "timm vit": lambda: of_image(timms),
    "transformers bert": lambda: transformers_of("bert-classifier"),
    "transformers vit": lambda: transformers_of("vit"),
    "transformers llama": lambda: transformers_of("llama"),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_masks_are_trained_then_half_goes_and_the_loss_goes_on_falling(name):
    torch.manual_seed(0)
    model, inputs = NETWORKS[name]()
    found = trained(model, inputs)
    assert found.verdict == "pass", found.why
    assert found.stayed == 0 and found.left < 0.75
