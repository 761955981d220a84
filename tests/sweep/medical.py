"""monai's networks, small, for images and volumes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["NAMES", "build"]

FLAT = {"spatial_dims": 2, "in_channels": 1, "out_channels": 2}
STEPS: dict[str, Any] = {"channels": (8, 16, 32), "strides": (2, 2)}
IMAGE, VOLUME = (2, 1, 64, 64), (1, 1, 32, 32, 32)
#: Name -> class, settings, and the shape of what it reads.
TABLE: dict[str, tuple[str, dict[str, Any], tuple[int, ...]]] = {
    "UNet": ("UNet", {**FLAT, **STEPS, "num_res_units": 2}, IMAGE),
    "UNet-3d": ("UNet", {**FLAT, **STEPS, "spatial_dims": 3, "num_res_units": 1}, VOLUME),
    "UNet-batch": ("UNet", {**FLAT, **STEPS, "norm": "batch"}, IMAGE),
    "AttentionUnet": ("AttentionUnet", {**FLAT, **STEPS}, IMAGE),
    "BasicUNet": ("BasicUNet", {**FLAT, "features": (8, 8, 16, 16, 32, 8)}, IMAGE),
    "BasicUNetPlusPlus": ("BasicUNetPlusPlus", {**FLAT, "features": (8, 8, 16, 16, 32, 8)}, IMAGE),
    "DynUNet": (
        "DynUNet",
        {
            **FLAT,
            "kernel_size": [3, 3, 3],
            "strides": [1, 2, 2],
            "upsample_kernel_size": [2, 2],
            "filters": [8, 16, 32],
            "deep_supervision": False,
        },
        IMAGE,
    ),
    "DynUNet-res": (
        "DynUNet",
        {
            **FLAT,
            "kernel_size": [3, 3, 3],
            "strides": [1, 2, 2],
            "upsample_kernel_size": [2, 2],
            "filters": [8, 16, 32],
            "res_block": True,
            "norm_name": "batch",
        },
        IMAGE,
    ),
    "SegResNet": ("SegResNet", {**FLAT, "init_filters": 8}, IMAGE),
    "SegResNetDS": ("SegResNetDS", {**FLAT, "init_filters": 8, "blocks_down": (1, 1, 1)}, IMAGE),
    "VNet": ("VNet", FLAT, (1, 1, 64, 64)),
    "HighResNet": ("HighResNet", FLAT, (1, 1, 32, 32)),
    "UNETR": (
        "UNETR",
        {
            "in_channels": 1,
            "out_channels": 2,
            "img_size": 64,
            "feature_size": 8,
            "hidden_size": 32,
            "mlp_dim": 64,
            "num_heads": 4,
            "spatial_dims": 2,
        },
        IMAGE,
    ),
    "SwinUNETR": ("SwinUNETR", {"in_channels": 1, "out_channels": 2, "feature_size": 12, "spatial_dims": 2}, IMAGE),
    "ViT": (
        "ViT",
        {
            "in_channels": 1,
            "img_size": 32,
            "patch_size": 8,
            "hidden_size": 32,
            "mlp_dim": 64,
            "num_layers": 2,
            "num_heads": 4,
            "classification": True,
            "spatial_dims": 2,
        },
        (2, 1, 32, 32),
    ),
    "ViTAutoEnc": (
        "ViTAutoEnc",
        {
            "in_channels": 1,
            "img_size": 32,
            "patch_size": 4,
            "hidden_size": 32,
            "mlp_dim": 64,
            "num_layers": 2,
            "num_heads": 4,
            "spatial_dims": 2,
            "out_channels": 1,
        },
        (2, 1, 32, 32),
    ),
    "DenseNet": ("DenseNet", {**FLAT, "init_features": 8, "growth_rate": 8, "block_config": (2, 2)}, IMAGE),
    "SEResNet": (
        "SENet",
        {
            "spatial_dims": 2,
            "in_channels": 1,
            "block": "se_resnet_bottleneck",
            "layers": (1, 1, 1, 1),
            "groups": 1,
            "reduction": 8,
            "inplanes": 16,
            "num_classes": 2,
        },
        IMAGE,
    ),
    "EfficientNetBN": (
        "EfficientNetBN",
        {"model_name": "efficientnet-b0", "pretrained": False, "spatial_dims": 2, "in_channels": 1, "num_classes": 2},
        IMAGE,
    ),
    "ResNet": (
        "ResNet",
        {
            "block": "basic",
            "layers": (1, 1, 1, 1),
            "block_inplanes": (8, 16, 24, 32),
            "spatial_dims": 3,
            "n_input_channels": 1,
            "num_classes": 2,
        },
        VOLUME,
    ),
    "AHNet": (
        "AHNet",
        {"layers": (1, 1, 1, 1), "spatial_dims": 2, "in_channels": 1, "out_channels": 2, "psp_block_num": 0},
        IMAGE,
    ),
    "FlexibleUNet": (
        "FlexibleUNet",
        {"in_channels": 3, "out_channels": 2, "backbone": "resnet18", "decoder_channels": (32, 16, 8, 8, 8)},
        (1, 3, 64, 64),
    ),
    "MedNeXt": ("MedNeXt", {"spatial_dims": 2, "in_channels": 1, "out_channels": 2, "init_filters": 8}, IMAGE),
    "VarAutoEncoder": (
        "VarAutoEncoder",
        {**STEPS, "strides": (2, 2, 1), "spatial_dims": 2, "in_shape": (1, 32, 32), "latent_size": 8, "out_channels": 1},
        (2, 1, 32, 32),
    ),
    "AutoEncoder": ("AutoEncoder", {**FLAT, **STEPS, "strides": (2, 2, 1)}, IMAGE),
    "Regressor": ("Regressor", {"in_shape": (1, 32, 32), "out_shape": 1, **STEPS}, (2, 1, 32, 32)),
    "Classifier": ("Classifier", {"in_shape": (1, 32, 32), "classes": 2, **STEPS}, (2, 1, 32, 32)),
    "Generator": (
        "Generator",
        {"latent_shape": (8,), "start_shape": (16, 4, 4), "channels": (16, 8), "strides": (2, 1)},
        (2, 8),
    ),
    "VoxelMorphUNet": (
        "VoxelMorphUNet",
        {
            "spatial_dims": 2,
            "in_channels": 2,
            "unet_out_channels": 8,
            "channels": (8, 8, 8, 8, 8, 8),
            "final_conv_channels": (8, 8),
        },
        (1, 2, 32, 32),
    ),
    "LocalNet": (
        "LocalNet",
        {"spatial_dims": 2, "in_channels": 2, "out_channels": 2, "num_channel_initial": 8, "extract_levels": [0, 1]},
        (1, 2, 32, 32),
    ),
    "AutoencoderKL": (
        "AutoencoderKL",
        {
            **FLAT,
            "out_channels": 1,
            "num_res_blocks": 1,
            "channels": (16, 16),
            "attention_levels": (False, True),
            "latent_channels": 4,
            "norm_num_groups": 8,
        },
        (1, 1, 32, 32),
    ),
    "VQVAE": (
        "VQVAE",
        {
            **FLAT,
            "out_channels": 1,
            "channels": (16, 16),
            "num_res_layers": 1,
            "num_res_channels": (16, 16),
            "downsample_parameters": ((2, 4, 1, 1),) * 2,
            "upsample_parameters": ((2, 4, 1, 1, 0),) * 2,
            "num_embeddings": 16,
            "embedding_dim": 8,
        },
        (1, 1, 32, 32),
    ),
    "DiffusionModelUNet": (
        "DiffusionModelUNet",
        {
            **FLAT,
            "out_channels": 1,
            "num_res_blocks": 1,
            "channels": (16, 16),
            "attention_levels": (False, True),
            "norm_num_groups": 8,
            "num_head_channels": 8,
        },
        (1, 1, 32, 32),
    ),
    "PatchDiscriminator": (
        "PatchDiscriminator",
        {"spatial_dims": 2, "num_layers_d": 2, "channels": 8, "in_channels": 1, "out_channels": 1},
        IMAGE,
    ),
    "DecoderOnlyTransformer": (
        "DecoderOnlyTransformer",
        {"num_tokens": 20, "max_seq_len": 16, "attn_layers_dim": 32, "attn_layers_depth": 2, "attn_layers_heads": 4},
        (),
    ),
    "TorchVisionFCModel": (
        "TorchVisionFCModel",
        {"model_name": "resnet18", "num_classes": 2, "pretrained": False, "pool": None},
        (1, 3, 64, 64),
    ),
}
NAMES = tuple(TABLE)


def build(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A network, and an image or a volume."""
    from monai.networks import nets

    kind, settings, shape = TABLE[name]
    model: nn.Module = getattr(nets, kind)(**settings)
    if name == "DecoderOnlyTransformer":
        return model, (torch.randint(0, 20, (2, 12)),)
    more = (torch.randint(0, 100, (shape[0],)),) if name == "DiffusionModelUNet" else ()
    return model, (torch.randn(shape), *more)
