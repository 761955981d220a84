"""vit-pytorch's transformers for images, small."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["NAMES", "build"]

PLAIN = {"image_size": 32, "patch_size": 8, "num_classes": 10, "dim": 32, "depth": 2, "heads": 4, "mlp_dim": 64}
HEAD = {**PLAIN, "dim_head": 16}
#: Name -> module, class, and settings.
TABLE: dict[str, tuple[str, str, dict[str, Any]]] = {
    "vit": ("vit", "ViT", HEAD),
    "simple_vit": ("simple_vit", "SimpleViT", HEAD),
    "deepvit": ("deepvit", "DeepViT", HEAD),
    "cait": ("cait", "CaiT", {**HEAD, "cls_depth": 1}),
    "t2t": ("t2t", "T2TViT", {"dim": 32, "image_size": 64, "depth": 2, "heads": 4, "mlp_dim": 64, "num_classes": 10}),
    "cct": (
        "cct",
        "CCT",
        {
            "img_size": 32,
            "embedding_dim": 32,
            "n_conv_layers": 1,
            "kernel_size": 3,
            "stride": 2,
            "padding": 1,
            "num_layers": 2,
            "num_heads": 4,
            "mlp_ratio": 2,
            "num_classes": 10,
            "positional_embedding": "learnable",
        },
    ),
    "cross_vit": (
        "cross_vit",
        "CrossViT",
        {
            "image_size": 64,
            "num_classes": 10,
            "depth": 2,
            "sm_dim": 32,
            "lg_dim": 48,
            "sm_patch_size": 16,
            "lg_patch_size": 32,
            "sm_enc_depth": 1,
            "sm_enc_heads": 4,
            "sm_enc_mlp_dim": 64,
            "sm_enc_dim_head": 16,
            "lg_enc_depth": 1,
            "lg_enc_heads": 4,
            "lg_enc_mlp_dim": 64,
            "lg_enc_dim_head": 16,
            "cross_attn_depth": 1,
        },
    ),
    "pit": (
        "pit",
        "PiT",
        {"image_size": 64, "patch_size": 8, "dim": 32, "num_classes": 10, "depth": (1, 1), "heads": 4, "mlp_dim": 64},
    ),
    "levit": (
        "levit",
        "LeViT",
        {
            "image_size": 64,
            "num_classes": 10,
            "stages": 2,
            "dim": (32, 48),
            "depth": 1,
            "heads": (2, 3),
            "mlp_mult": 2,
            "dim_key": 16,
        },
    ),
    "cvt": (
        "cvt",
        "CvT",
        {"num_classes": 10, "s1_emb_dim": 16, "s2_emb_dim": 32, "s2_depth": 1, "s3_emb_dim": 48, "s3_depth": 1},
    ),
    "twins_svt": (
        "twins_svt",
        "TwinsSVT",
        {
            "num_classes": 10,
            "s1_emb_dim": 16,
            "s2_emb_dim": 32,
            "s3_emb_dim": 48,
            "s4_emb_dim": 64,
            "s3_depth": 1,
            "s1_local_patch_size": 2,
            "s2_local_patch_size": 2,
            "s3_local_patch_size": 2,
            "s4_local_patch_size": 1,
            "s1_global_k": 4,
            "s2_global_k": 2,
            "s3_global_k": 1,
            "s4_global_k": 1,
        },
    ),
    "crossformer": (
        "crossformer",
        "CrossFormer",
        {
            "num_classes": 10,
            "dim": (32, 48, 64, 96),
            "depth": (1, 1, 1, 1),
            "global_window_size": (4, 2, 2, 1),
            "local_window_size": 2,
        },
    ),
    "regionvit": (
        "regionvit",
        "RegionViT",
        {"dim": (16, 32, 48, 64), "depth": (1, 1, 1, 1), "window_size": 2, "num_classes": 10, "tokenize_local_3_conv": False},
    ),
    "scalable_vit": (
        "scalable_vit",
        "ScalableViT",
        {
            "num_classes": 10,
            "dim": 16,
            "heads": (1, 2, 2, 4),
            "depth": (1, 1, 1, 1),
            "ssa_dim_key": (8, 8, 8, 8),
            "reduction_factor": (2, 2, 1, 1),
            "window_size": (2, 2, None, None),
        },
    ),
    "sep_vit": (
        "sep_vit",
        "SepViT",
        {"num_classes": 10, "dim": 16, "dim_head": 8, "heads": (1, 2, 2, 4), "depth": (1, 1, 1, 1), "image_size": 224},
    ),
    "max_vit": (
        "max_vit",
        "MaxViT",
        {"num_classes": 10, "dim_conv_stem": 16, "dim": 32, "dim_head": 16, "depth": (1, 1), "window_size": 4},
    ),
    "nest": (
        "nest",
        "NesT",
        {
            "image_size": 32,
            "patch_size": 4,
            "dim": 16,
            "heads": 2,
            "num_hierarchies": 2,
            "block_repeats": (1, 1),
            "num_classes": 10,
        },
    ),
    "mobile_vit": (
        "mobile_vit",
        "MobileViT",
        {
            "image_size": (64, 64),
            "dims": [32, 40, 48],
            "num_classes": 10,
            "kernel_size": 3,
            "patch_size": (2, 2),
            "channels": [16, 16, 24, 24, 32, 32, 40, 40, 48, 48, 64],
        },
    ),
    "xcit": (
        "xcit",
        "XCiT",
        {**HEAD, "cls_depth": 1, "local_patch_kernel_size": 3},
    ),
    "parallel_vit": ("parallel_vit", "ViT", {**HEAD, "num_parallel_branches": 2}),
    "learnable_memory": ("learnable_memory_vit", "ViT", HEAD),
    "vit_for_small_dataset": ("vit_for_small_dataset", "ViT", HEAD),
    "vit_with_patch_merger": ("vit_with_patch_merger", "ViT", {**HEAD, "patch_merge_layer": 1, "patch_merge_num_tokens": 8}),
    "patch_dropout": ("vit_with_patch_dropout", "ViT", {**HEAD, "patch_dropout": 0.25}),
    "rvt": ("rvt", "RvT", {**PLAIN}),
    "vit_1d": (
        "vit_1d",
        "ViT",
        {"seq_len": 32, "patch_size": 8, "num_classes": 10, "dim": 32, "depth": 2, "heads": 4, "mlp_dim": 64, "dim_head": 16},
    ),
    "vit_3d": ("vit_3d", "ViT", {**HEAD, "image_patch_size": 8, "frames": 4, "frame_patch_size": 2}),
    "simple_vit_3d": ("simple_vit_3d", "SimpleViT", {**HEAD, "image_patch_size": 8, "frames": 4, "frame_patch_size": 2}),
    "vivit": (
        "vivit",
        "ViViT",
        {
            **HEAD,
            "image_patch_size": 8,
            "frames": 4,
            "frame_patch_size": 2,
            "spatial_depth": 1,
            "temporal_depth": 1,
        },
    ),
    "qk_norm": ("simple_vit_with_qk_norm", "SimpleViT", HEAD),
    "register_tokens": ("simple_vit_with_register_tokens", "SimpleViT", HEAD),
    "value_residual": ("simple_vit_with_value_residual", "SimpleViT", HEAD),
    "with_fft": ("simple_vit_with_fft", "SimpleViT", {**HEAD, "freq_patch_size": 8}),
    "hyper_connections": ("simple_vit_with_hyper_connections", "SimpleViT", {**HEAD, "num_residual_streams": 2}),
    "simple_uvit": ("simple_uvit", "SimpleUViT", HEAD),
    "normalized_vit": ("normalized_vit", "nViT", HEAD),
    "look_vit": (
        "look_vit",
        "LookViT",
        {k: v for k, v in PLAIN.items() if k != "mlp_dim"} | {"highres_patch_size": 4, "patch_conv_kernel_size": 3},
    ),
    "jumbo_vit": ("jumbo_vit", "JumboViT", {**HEAD, "num_jumbo_cls": 1, "jumbo_cls_k": 2, "jumbo_ff_mult": 2}),
}
LEFT_OUT = {
    "sep_vit": ("image_size",),  # of its inputs alone
    "vit_3d": ("patch_size",),
    "simple_vit_3d": ("patch_size",),
    "vivit": ("patch_size", "depth"),
}
#: Inputs other than an image of 32 or 64 pixels.
VOLUMES = ("vit_3d", "simple_vit_3d", "vivit")
NAMES = tuple(TABLE)


def build(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A network, and an image, a sequence or a video."""
    module, kind, settings = TABLE[name]
    settings = {k: v for k, v in settings.items() if k not in LEFT_OUT.get(name, ())}
    model: nn.Module = getattr(importlib.import_module(f"vit_pytorch.{module}"), kind)(**settings)
    if name == "vit_1d":
        return model, (torch.randn(2, 3, 32),)
    if name in VOLUMES:
        return model, (torch.randn(2, 3, 4, 32, 32),)
    size = TABLE[name][2].get("image_size", 64 if "img_size" not in settings else 32)
    side = size[0] if isinstance(size, tuple) else size
    return model, (torch.randn(2, 3, side, side),)
