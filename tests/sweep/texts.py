"""Networks of the transformers library: tiny configurations, built without weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["NAMES", "build"]

ENCODER = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
DECODER = {**ENCODER, "use_cache": False, "max_position_embeddings": 64}
GROUPED = {**DECODER, "num_key_value_heads": 2}
IMAGE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "image_size": 32}
STAGES = {"depths": [1, 1, 1, 1]}
#: Name -> configuration, model, its sizes, kind of input.
TABLE: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "bert": ("BertConfig", "BertModel", ENCODER, "text"),
    "bert-classifier": ("BertConfig", "BertForSequenceClassification", ENCODER, "text"),
    "roberta": ("RobertaConfig", "RobertaModel", ENCODER, "text"),
    "distilbert": (
        "DistilBertConfig",
        "DistilBertModel",
        {"vocab_size": 99, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64},
        "text",
    ),
    "albert": ("AlbertConfig", "AlbertModel", {**ENCODER, "embedding_size": 16}, "text"),
    "electra": ("ElectraConfig", "ElectraModel", {**ENCODER, "embedding_size": 16}, "text"),
    "mpnet": ("MPNetConfig", "MPNetModel", ENCODER, "text"),
    "deberta-v2": ("DebertaV2Config", "DebertaV2Model", ENCODER, "text"),
    "modernbert": ("ModernBertConfig", "ModernBertModel", {**ENCODER, "pad_token_id": 0}, "text"),
    "gpt2": (
        "GPT2Config",
        "GPT2LMHeadModel",
        {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4, "use_cache": False},
        "text",
    ),
    "gpt-neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", DECODER, "text"),
    "gpt-neo": (
        "GPTNeoConfig",
        "GPTNeoForCausalLM",
        {
            "vocab_size": 99,
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "intermediate_size": 64,
            "attention_types": [[["global", "local"], 1]],
            "use_cache": False,
            "max_position_embeddings": 64,
        },
        "text",
    ),
    "opt": ("OPTConfig", "OPTForCausalLM", {**DECODER, "ffn_dim": 64, "word_embed_proj_dim": 32}, "text"),
    "bloom": (
        "BloomConfig",
        "BloomForCausalLM",
        {"vocab_size": 99, "hidden_size": 32, "n_layer": 2, "n_head": 4, "use_cache": False},
        "text",
    ),
    "falcon": ("FalconConfig", "FalconForCausalLM", {**DECODER, "num_kv_heads": 4}, "text"),
    "llama": ("LlamaConfig", "LlamaForCausalLM", GROUPED, "text"),
    "mistral": ("MistralConfig", "MistralForCausalLM", GROUPED, "text"),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", GROUPED, "text"),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**GROUPED, "head_dim": 8}, "text"),
    "gemma": ("GemmaConfig", "GemmaForCausalLM", {**GROUPED, "head_dim": 8}, "text"),
    "phi": ("PhiConfig", "PhiForCausalLM", DECODER, "text"),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", {**GROUPED, "num_local_experts": 4}, "text"),
    "t5": (
        "T5Config",
        "T5Model",
        {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "use_cache": False},
        "pair",
    ),
    "t5-encoder": (
        "T5Config",
        "T5EncoderModel",
        {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "use_cache": False},
        "text",
    ),
    "bart": (
        "BartConfig",
        "BartModel",
        {
            "vocab_size": 99,
            "d_model": 32,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 64,
            "decoder_ffn_dim": 64,
            "use_cache": False,
            "max_position_embeddings": 64,
        },
        "pair",
    ),
    "whisper": (
        "WhisperConfig",
        "WhisperModel",
        {
            "vocab_size": 99,
            "d_model": 32,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 64,
            "decoder_ffn_dim": 64,
            "use_cache": False,
            "num_mel_bins": 8,
            "max_source_positions": 16,
            "max_target_positions": 64,
            "decoder_start_token_id": 1,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        "sound",
    ),
    "wav2vec2": (
        "Wav2Vec2Config",
        "Wav2Vec2Model",
        {
            **ENCODER,
            "conv_dim": [16, 16],
            "conv_stride": [5, 2],
            "conv_kernel": [10, 3],
            "num_feat_extract_layers": 2,
            "num_conv_pos_embeddings": 8,
            "num_conv_pos_embedding_groups": 2,
            "apply_spec_augment": False,
        },
        "wave",
    ),
    "vit": ("ViTConfig", "ViTForImageClassification", {**IMAGE, "patch_size": 8}, "image"),
    "deit": ("DeiTConfig", "DeiTForImageClassification", {**IMAGE, "patch_size": 8}, "image"),
    "dinov2": ("Dinov2Config", "Dinov2Model", {**IMAGE, "patch_size": 8}, "image"),
    "beit": ("BeitConfig", "BeitForImageClassification", {**IMAGE, "patch_size": 8}, "image"),
    "clip-vision": ("CLIPVisionConfig", "CLIPVisionModel", {**IMAGE, "patch_size": 8}, "image"),
    "siglip-vision": ("SiglipVisionConfig", "SiglipVisionModel", {**IMAGE, "patch_size": 8}, "image"),
    "swin": (
        "SwinConfig",
        "SwinForImageClassification",
        {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4},
        "image",
    ),
    "convnext": ("ConvNextConfig", "ConvNextForImageClassification", {"hidden_sizes": [16, 24, 32, 40], **STAGES}, "image"),
    "resnet": (
        "ResNetConfig",
        "ResNetForImageClassification",
        {"embedding_size": 16, "hidden_sizes": [16, 24, 32, 40], **STAGES},
        "image",
    ),
    "mobilenet-v2": ("MobileNetV2Config", "MobileNetV2ForImageClassification", {"depth_multiplier": 0.35}, "image"),
    "mobilevit": (
        "MobileViTConfig",
        "MobileViTForImageClassification",
        {"hidden_sizes": [32, 32, 32], "image_size": 64},
        "picture",
    ),
    "segformer": (
        "SegformerConfig",
        "SegformerForSemanticSegmentation",
        {"hidden_sizes": [16, 16, 32, 32], "num_attention_heads": [1, 2, 2, 4], "decoder_hidden_size": 32, **STAGES},
        "picture",
    ),
    "poolformer": (
        "PoolFormerConfig",
        "PoolFormerForImageClassification",
        {"hidden_sizes": [16, 16, 32, 32], **STAGES},
        "picture",
    ),
}
NAMES = tuple(TABLE)


def build(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A network, and what it reads."""
    import transformers

    transformers.logging.set_verbosity_error()
    configuration, model, sizes, kind = TABLE[name]
    config = getattr(transformers, configuration)(**sizes)
    config.return_dict = True
    return getattr(transformers, model)(config), INPUTS[kind]()


def _tokens() -> Tensor:
    return torch.randint(3, 99, (2, 12))


def _text() -> tuple[Tensor, ...]:
    return (_tokens(),)


INPUTS: dict[str, Any] = {
    "text": _text,
    "pair": lambda: (_tokens(), None, _tokens()),
    "image": lambda: (torch.randn(2, 3, 32, 32),),
    "picture": lambda: (torch.randn(1, 3, 64, 64),),
    "sound": lambda: (torch.randn(1, 8, 32), None, _tokens()[:1]),
    "wave": lambda: (torch.randn(1, 400),),
}
