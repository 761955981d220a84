"""open_clip's networks of two towers, small: an image and a text each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["NAMES", "build"]

TEXT = {"context_length": 16, "vocab_size": 99, "width": 64, "heads": 4, "layers": 2}
VIT = {"layers": 2, "width": 64, "head_width": 16, "patch_size": 8, "image_size": 32}
#: Name -> its class, the settings of the image's tower, those of the text's, and further ones.
TABLE: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "vit": ("CLIP", VIT, TEXT, {}),
    "vit-quickgelu": ("CLIP", VIT, TEXT, {"quick_gelu": True}),
    "vit-scaled": ("CLIP", {**VIT, "ls_init_value": 0.1}, {**TEXT, "ls_init_value": 0.1}, {}),
    "vit-average": ("CLIP", {**VIT, "pool_type": "avg"}, TEXT, {}),
    "vit-attention-pool": ("CLIP", {**VIT, "attentional_pool": True, "attn_pooler_queries": 8}, TEXT, {}),
    "vit-patch-dropout": ("CLIP", {**VIT, "patch_dropout": 0.5}, TEXT, {}),
    "vit-last-token": ("CLIP", VIT, {**TEXT, "pool_type": "last", "no_causal_mask": False}, {}),
    "RN": ("CLIP", {"layers": (1, 1, 1, 1), "width": 16, "head_width": 64, "image_size": 64}, TEXT, {}),
    "convnext": (
        "CLIP",
        {"timm_model_name": "convnext_atto", "timm_pool": "", "timm_proj": "linear", "image_size": 64},
        TEXT,
        {},
    ),
    "siglip": (
        "CustomTextCLIP",
        {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "map", "timm_proj": "none", "image_size": 224},
        {**TEXT, "width": 192, "no_causal_mask": True, "proj_bias": True, "pool_type": "last"},
        {"init_logit_bias": -10},
    ),
    "custom-text": ("CustomTextCLIP", VIT, TEXT, {}),
    "coca": (
        "CoCa",
        {**VIT, "attentional_pool": True, "attn_pooler_heads": 4, "output_tokens": True},
        {**TEXT, "embed_cls": True, "output_tokens": True},
        {"multimodal_cfg": {**TEXT, "mlp_ratio": 4, "dim_head": 16, "n_queries": 16}, "embed_dim": 64},
    ),
    "vit-image": ("image", VIT, {}, {}),
}
NAMES = (*TABLE, "RN50", "ViT-B-32")


def build(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A network, an image and a text."""
    import open_clip
    from open_clip import coca_model, model

    if name not in TABLE:
        whole: nn.Module = open_clip.create_model(name, pretrained=None)
        return whole, (torch.randn(1, 3, 224, 224), torch.randint(1, 999, (1, 77)))
    kind, image, text, further = TABLE[name]
    more = dict(further)
    side = image["image_size"]
    if kind == "image":
        return model._build_vision_tower(32, model.CLIPVisionCfg(**image)), (torch.randn(1, 3, side, side),)
    made = getattr(coca_model if kind == "CoCa" else model, kind)
    embed = 192 if name == "siglip" else more.pop("embed_dim", 32)
    whole = made(embed, vision_cfg=image, text_cfg=text, **more)
    if kind == "CoCa":
        nn.init.normal_(whole.text_decoder.text_projection, std=0.1)  # its library leaves it uninitialised
    return whole, (torch.randn(1, 3, side, side), torch.randint(1, 98, (1, 16)))
