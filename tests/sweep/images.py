"""timm's families: one small network of each, built without weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["NAMES", "build"]

#: Networks that take images of any size.
CONVOLUTIONAL = (
    *("resnet18", "seresnet18", "resnext26ts", "ecaresnet26t", "resnet26d", "skresnet18", "res2net50_14w_8s", "resnest14d"),
    *("resnetv2_18", "resnetv2_50x1_bit", "nfnet_l0", "eca_nfnet_l0", "tresnet_m", "selecsls42", "repvgg_a0"),
    *("densenet121", "rdnet_tiny", "dla34", "dpn48b", "hrnet_w18_small", "vovnet39a", "ese_vovnet19b_dw", "cspresnet50"),
    *("cspdarknet53", "darknet17", "regnetx_002", "regnety_002", "rexnet_100", "efficientnet_b0", "efficientnetv2_rw_t"),
    *("tf_efficientnet_b0", "mixnet_s", "mnasnet_small", "mobilenetv2_050", "mobilenetv3_small_050", "mobilenetv4_conv_small"),
    *("mobilenetv4_hybrid_medium", "fbnetc_100", "lcnet_050", "tinynet_e", "ghostnet_050", "ghostnetv2_100"),
    *("repghostnet_050", "hardcorenas_a", "hgnetv2_b0", "inception_v3", "inception_v4", "inception_resnet_v2", "xception41"),
    *("legacy_xception", "legacy_seresnet18", "convnext_atto", "convnextv2_atto", "convmixer_768_32"),
    *(
        "inception_next_atto",
        "starnet_s1",
        "repvit_m0_9",
        "mambaout_femto",
        "fasternet_t0",
        "poolformer_s12",
        "edgenext_xx_small",
    ),
    *("gernet_s", "mobileone_s0", "lambda_resnet26t", "swiftformer_xs", "lcnetv2_base"),
)
#: Networks whose images have one size.
SIZED = (
    *("vit_tiny_patch16_224", "vit_small_patch16_dinov3", "vit_relpos_small_patch16_224", "deit_tiny_patch16_224"),
    *("deit_tiny_distilled_patch16_224", "deit3_small_patch16_224", "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"),
    *(
        "swinv2_cr_tiny_ns_224",
        "cait_xxs24_224",
        "coat_lite_tiny",
        "coat_tiny",
        "convit_tiny",
        "mixer_s16_224",
        "resmlp_12_224",
    ),
    *(
        "gmixer_12_224",
        "gmlp_ti16_224",
        "pvt_v2_b0",
        "twins_svt_small",
        "twins_pcpvt_small",
        "levit_128s",
        "xcit_nano_12_p16_224",
    ),
    *("volo_d1_224", "efficientformer_l1", "efficientformerv2_s0", "fastvit_t8", "mobilevit_xxs", "mobilevitv2_050"),
    *("caformer_s18", "convformer_s18", "beit_base_patch16_224", "beitv2_base_patch16_224", "eva02_tiny_patch14_224"),
    *("crossvit_tiny_240", "davit_tiny", "focalnet_tiny_srf", "gcvit_xxtiny", "hiera_tiny_224", "maxvit_tiny_rw_224"),
    *("coatnet_nano_rw_224", "mvitv2_tiny", "nest_tiny", "nextvit_small", "pit_ti_224", "sequencer2d_s", "tiny_vit_5m_224"),
    *(
        "tnt_s_patch16_224",
        "visformer_tiny",
        "efficientvit_b0",
        "efficientvit_m0",
        "vitamin_small_224",
        "samvit_base_patch16_224",
    ),
    *("shvit_s1",),
)
#: The smallest network of each further file of timm's `models/`, as `python -m tests.sweep.images` finds it.
OF_FILES = (
    *(
        "cpubone_nano",
        "csatv2",
        "cspnext_tiny",
        "deepseek_vit_412m",
        "efficientvim_m1",
        "gemma4_vit_167m_enc",
        "sam2_hiera_tiny",
    ),
    *("iformer_t", "lowformer_b0", "mobilenetv5_base", "naflexvit_base_patch16_parfac_gap", "nasnetalarge", "pnasnet5large"),
    *("qwen3_vit_88m", "vgg11", "vit_tiny_r_s16_p8_224"),
)
#: Networks with less of their depth or width, as theirs is large.
REDUCED: dict[str, dict[str, object]] = {
    "vit_small_patch16_dinov3": {"depth": 4},
    "vit_relpos_small_patch16_224": {"depth": 4},
    "deit3_small_patch16_224": {"depth": 4},
    "cait_xxs24_224": {"depth": 4},
    "xcit_nano_12_p16_224": {"depth": 4},
    "beit_base_patch16_224": {"depth": 3, "embed_dim": 192, "num_heads": 3},
    "beitv2_base_patch16_224": {"depth": 3, "embed_dim": 192, "num_heads": 3},
    "eva02_tiny_patch14_224": {"depth": 4},
    "samvit_base_patch16_224": {"depth": 3, "embed_dim": 192, "num_heads": 3, "global_attn_indexes": (2,), "img_size": 224},
    "sequencer2d_s": {"layers": (1, 1, 1, 1)},
    "tnt_s_patch16_224": {"depth": 3},
    "deepseek_vit_412m": {"depth": 2, "embed_dim": 128, "num_heads": 2, "img_size": 112},
    "gemma4_vit_167m_enc": {"depth": 2, "embed_dim": 128, "num_heads": 2, "img_size": 96},
    "qwen3_vit_88m": {"depth": 2, "embed_dim": 128, "num_heads": 2, "img_size": 64},
    "naflexvit_base_patch16_parfac_gap": {"depth": 2, "embed_dim": 128, "num_heads": 2},
    "vgg11": {"mlp_ratio": 0.125},
}
#: Sides of images other than the network's own.
SIDES = {
    "csatv2": 128,
    "gemma4_vit_167m_enc": 96,
    "qwen3_vit_88m": 64,
    "deepseek_vit_412m": 112,
    "mobilenetv5_base": 128,
    "nasnetalarge": 96,
    "pnasnet5large": 96,
    "naflexvit_base_patch16_parfac_gap": 128,
    "sam2_hiera_tiny": 224,
}
NAMES = (*CONVOLUTIONAL, *SIZED, *OF_FILES)


def build(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A network, and an image."""
    import timm

    model: nn.Module = timm.create_model(name, pretrained=False, num_classes=10, **REDUCED.get(name, {}))
    size = REDUCED.get(name, {}).get("img_size") or model.pretrained_cfg["input_size"][-1]  # type: ignore[index]
    side = SIDES.get(name, min(128, size) if name in CONVOLUTIONAL else size)
    return model, (torch.randn(1, 3, side, side),)


def files() -> dict[str, list[str]]:
    """timm's networks by the file that they are of."""
    import timm
    from timm.models._registry import _model_to_module

    found: dict[str, list[str]] = {}
    for name in timm.list_models():
        found.setdefault(_model_to_module[name], []).append(name)
    return found


def smallest(names: list[str]) -> str:
    """The network with the fewest parameters, the first by name where several have as few."""
    import timm

    with torch.device("meta"):
        sizes = {name: sum(p.numel() for p in timm.create_model(name, num_classes=10).parameters()) for name in sorted(names)}
    return min(sizes, key=lambda name: sizes[name])


if __name__ == "__main__":
    for file, names in sorted(files().items()):
        if not set(names) & {*CONVOLUTIONAL, *SIZED}:
            print(f"{file}: {smallest(names)}")
