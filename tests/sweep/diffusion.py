"""diffusers' networks, small: U-Nets, autoencoders and transformers of denoisers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["NAMES", "build"]

Built = tuple[nn.Module, tuple[Any, ...]]
NORM = {"norm_num_groups": 4}
UNET = {
    "sample_size": 16,
    "in_channels": 3,
    "out_channels": 3,
    "layers_per_block": 1,
    "block_out_channels": (16, 32),
    **NORM,
}
KL = {
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "latent_channels": 4,
    **NORM,
}
TWO_DOWN, TWO_UP = ("DownEncoderBlock2D",) * 2, ("UpDecoderBlock2D",) * 2
ATTENTION = {"num_attention_heads": 4, "attention_head_dim": 8, "num_layers": 2}


class Called(nn.Module):
    """A network called by the names of its arguments, which diffusers' transformers are."""

    def __init__(self, model: nn.Module, names: str, **more: Any) -> None:
        super().__init__()
        self.model, self.names, self.more = model, tuple(names.split()), more

    def forward(self, *values: Any) -> Any:
        return self.model(**dict(zip(self.names, values, strict=True)), **self.more, return_dict=False)


def _image(*shape: int) -> Tensor:
    return torch.randn(shape)


def _times(n: int = 2) -> Tensor:
    return torch.arange(1, n + 1) * 10


def _conditioned(d: Any, **more: Any) -> nn.Module:
    blocks = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    model: nn.Module = d.UNet2DConditionModel(**(UNET | blocks | {"cross_attention_dim": 16, "attention_head_dim": 4} | more))
    return model


def _control(d: Any) -> Built:
    keys = ("in_channels", "layers_per_block", "block_out_channels", "norm_num_groups")
    model = d.ControlNetModel(
        **{k: UNET[k] for k in keys},
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
        conditioning_embedding_out_channels=(8, 16),
    )
    return Called(model, "sample timestep encoder_hidden_states controlnet_cond"), (
        _image(2, 3, 16, 16), _times(), _image(2, 6, 16), _image(2, 3, 32, 32),
    )  # fmt: skip


def _positions(n: int) -> Tensor:
    return torch.stack([torch.zeros(n), torch.arange(n), torch.zeros(n)], 1)


def _flux(d: Any) -> Built:
    model = d.FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=16,
        pooled_projection_dim=16, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    names = "hidden_states encoder_hidden_states pooled_projections timestep"
    ids = {"img_ids": _positions(16), "txt_ids": _positions(6)}
    return Called(model, names, **ids), (_image(2, 16, 4), _image(2, 6, 16), _image(2, 16), torch.rand(2))


TABLE: dict[str, Callable[[Any], Built]] = {
    "UNet2D": lambda d: (
        d.UNet2DModel(
            **UNET, down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=8,
        ),
        (_image(2, 3, 16, 16), _times()),
    ),
    "UNet2D-resnet": lambda d: (
        d.UNet2DModel(
            **UNET, down_block_types=("ResnetDownsampleBlock2D",) * 2, up_block_types=("ResnetUpsampleBlock2D",) * 2,
        ),
        (_image(2, 3, 16, 16), _times()),
    ),
    "UNet2D-condition": lambda d: (_conditioned(d), (_image(2, 3, 16, 16), _times(), _image(2, 6, 16))),
    "UNet2D-linear": lambda d: (
        _conditioned(d, use_linear_projection=True),
        (_image(2, 3, 16, 16), _times(), _image(2, 6, 16)),
    ),
    "UNet1D": lambda d: (
        d.UNet1DModel(sample_size=32, in_channels=2, out_channels=2, extra_in_channels=64, block_out_channels=(32, 32, 64)),
        (_image(2, 2, 32), _times()),
    ),
    "UNet3D": lambda d: (
        d.UNet3DConditionModel(
            **UNET, down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"), up_block_types=("UpBlock3D",
            "CrossAttnUpBlock3D"),
            cross_attention_dim=16, attention_head_dim=4,
        ),
        (_image(2, 3, 4, 16, 16), _times(), _image(2, 6, 16)),
    ),
    "ControlNet": _control,
    "T2IAdapter": lambda d: (
        d.T2IAdapter(in_channels=3, channels=[16, 32], num_res_blocks=1, downscale_factor=4, adapter_type="full_adapter"),
        (_image(2, 3, 32, 32),),
    ),
    "AutoencoderKL": lambda d: (
        d.AutoencoderKL(**KL, down_block_types=TWO_DOWN, up_block_types=TWO_UP),
        (_image(2, 3, 16, 16),),
    ),
    "VQModel": lambda d: (
        d.VQModel(**(KL | {"latent_channels": 3}), down_block_types=TWO_DOWN, up_block_types=TWO_UP, num_vq_embeddings=16),
        (_image(2, 3, 16, 16),),
    ),
    "AutoencoderTiny": lambda d: (
        d.AutoencoderTiny(
            encoder_block_out_channels=(16, 16), decoder_block_out_channels=(16, 16), num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1),
        ),
        (_image(2, 3, 16, 16),),
    ),
    "AsymmetricAutoencoderKL": lambda d: (
        d.AsymmetricAutoencoderKL(
            in_channels=3, out_channels=3, down_block_types=TWO_DOWN, down_block_out_channels=(16, 32), up_block_types=TWO_UP,
            up_block_out_channels=(16, 32), norm_num_groups=4,
        ),
        (_image(2, 3, 16, 16),),
    ),
    "AutoencoderKLTemporal": lambda d: (
        Called(
            d.AutoencoderKLTemporalDecoder(
                in_channels=3, out_channels=3, down_block_types=TWO_DOWN, block_out_channels=(32, 64), latent_channels=4
            ),
            "sample",
            num_frames=2,
        ),
        (_image(2, 3, 16, 16),),
    ),
    "AutoencoderDC": lambda d: (
        d.AutoencoderDC(
            latent_channels=4, attention_head_dim=8, encoder_block_out_channels=(16, 32), decoder_block_out_channels=(16, 32),
            encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1),
            encoder_block_types=("ResBlock", "EfficientViTBlock"),
            decoder_block_types=("ResBlock", "EfficientViTBlock"), encoder_qkv_multiscales=((), (5,)),
            decoder_qkv_multiscales=((), (5,)),
        ),
        (_image(2, 3, 32, 32),),
    ),
    "AutoencoderOobleck": lambda d: (
        d.AutoencoderOobleck(
            encoder_hidden_size=16, downsampling_ratios=[2, 4], channel_multiples=[1, 2], decoder_channels=16,
            decoder_input_channels=8, audio_channels=2,
        ),
        (_image(2, 2, 64),),
    ),
    "DiT": lambda d: (
        Called(
            d.DiTTransformer2DModel(**ATTENTION, in_channels=4, sample_size=8, patch_size=2, num_embeds_ada_norm=100),
            "hidden_states timestep class_labels",
        ),
        (_image(2, 4, 8, 8), _times(), torch.tensor([1, 2])),
    ),
    "PixArt": lambda d: (
        Called(
            d.PixArtTransformer2DModel(
                **ATTENTION, in_channels=4, out_channels=4, sample_size=8, patch_size=2, cross_attention_dim=32,
                caption_channels=16, use_additional_conditions=False,
            ),
            "hidden_states encoder_hidden_states timestep",
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        ),
        (_image(2, 4, 8, 8), _image(2, 6, 16), _times()),
    ),
    "SD3": lambda d: (
        Called(
            d.SD3Transformer2DModel(
                **ATTENTION, sample_size=8, patch_size=2, in_channels=4, out_channels=4, joint_attention_dim=16,
                caption_projection_dim=32, pooled_projection_dim=16, pos_embed_max_size=8,
            ),
            "hidden_states encoder_hidden_states pooled_projections timestep",
        ),
        (_image(2, 4, 8, 8), _image(2, 6, 16), _image(2, 16), _times()),
    ),
    "Flux": _flux,
    "Sana": lambda d: (
        Called(
            d.SanaTransformer2DModel(
                **ATTENTION, in_channels=4, out_channels=4, sample_size=8, patch_size=1, num_cross_attention_heads=4,
                cross_attention_head_dim=8, cross_attention_dim=32, caption_channels=16,
            ),
            "hidden_states encoder_hidden_states timestep",
        ),
        (_image(2, 4, 8, 8), _image(2, 6, 16), _times()),
    ),
    "AuraFlow": lambda d: (
        Called(
            d.AuraFlowTransformer2DModel(
                sample_size=8, patch_size=2, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=8,
                num_attention_heads=4, joint_attention_dim=16, caption_projection_dim=32, out_channels=4, pos_embed_max_size=16,
            ),
            "hidden_states encoder_hidden_states timestep",
        ),
        (_image(2, 4, 8, 8), _image(2, 6, 16), _times()),
    ),
    "Transformer2D": lambda d: (
        d.Transformer2DModel(num_attention_heads=4, attention_head_dim=8, in_channels=16, norm_num_groups=4,
        cross_attention_dim=16),
        (_image(2, 16, 8, 8), _image(2, 6, 16)),
    ),
    "CogVideoX": lambda d: (
        Called(
            d.CogVideoXTransformer3DModel(
                **ATTENTION, in_channels=4, out_channels=4, time_embed_dim=8, text_embed_dim=16,
                sample_width=8, sample_height=8,
                sample_frames=9, patch_size=2, max_text_seq_length=6,
            ),
            "hidden_states encoder_hidden_states timestep",
        ),
        (_image(1, 3, 4, 8, 8), _image(1, 6, 16), _times(1)),
    ),
    "LTXVideo": lambda d: (
        Called(
            d.LTXVideoTransformer3DModel(
                **ATTENTION, in_channels=4, out_channels=4, cross_attention_dim=32, caption_channels=16,
            ),
            "hidden_states encoder_hidden_states timestep encoder_attention_mask",
            num_frames=2, height=4, width=4,
        ),
        (_image(2, 32, 4), _image(2, 6, 16), _times(), torch.ones(2, 6).bool()),
    ),
    "Wan": lambda d: (
        Called(
            d.WanTransformer3DModel(
                num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
                freq_dim=16, ffn_dim=32,
                num_layers=1,
            ),
            "hidden_states timestep encoder_hidden_states",
        ),
        (_image(1, 4, 2, 8, 8), _times(1), _image(1, 6, 16)),
    ),
    "StableAudioDiT": lambda d: (
        Called(
            d.StableAudioDiTModel(
                **ATTENTION, sample_size=8, in_channels=4, out_channels=4, num_key_value_attention_heads=2,
                cross_attention_dim=16,
                cross_attention_input_dim=16, time_proj_dim=16, global_states_input_dim=16,
            ),
            "hidden_states timestep encoder_hidden_states global_hidden_states",
            rotary_embedding=(torch.randn(9, 4), torch.randn(9, 4)),
        ),
        (_image(2, 4, 8), _times(), _image(2, 6, 16), _image(2, 1, 16)),
    ),
    "Prior": lambda d: (
        Called(
            d.PriorTransformer(**ATTENTION, embedding_dim=16, num_embeddings=6, additional_embeddings=4),
            "hidden_states timestep proj_embedding encoder_hidden_states",
        ),
        (_image(2, 16), _times(), _image(2, 16), _image(2, 6, 16)),
    ),
    "UVit2D": lambda d: (
        d.UVit2DModel(
            hidden_size=32, cond_embed_dim=16, micro_cond_encode_dim=4, micro_cond_embed_dim=20, encoder_hidden_size=16,
            vocab_size=32, codebook_size=31, in_channels=16, block_out_channels=16, num_hidden_layers=1, num_attention_heads=4,
            intermediate_size=64, sample_size=8,
        ),
        (torch.randint(0, 31, (2, 8, 8)), _image(2, 6, 16), _image(2, 16), torch.rand(2, 5)),
    ),
}  # fmt: skip
NAMES = tuple(TABLE)


def build(name: str) -> Built:
    """A network, and what it reads."""
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    return TABLE[name](diffusers)
