"""torchaudio's networks, small."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

__all__ = ["NAMES", "build"]

Built = tuple[nn.Module, tuple[Any, ...]]


def _models() -> Any:
    """torchaudio's models; it refuses to be imported beside a torch of another CUDA, which nothing here needs."""
    with patch.object(torch.version, "cuda", None):
        import torchaudio
    return torchaudio.models


def _wav2vec2(models: Any, **more: Any) -> nn.Module:
    settings = {
        "extractor_mode": "group_norm",
        "extractor_conv_layer_config": [(16, 10, 5), (16, 3, 2)],
        "extractor_conv_bias": False,
        "encoder_embed_dim": 32,
        "encoder_projection_dropout": 0.0,
        "encoder_pos_conv_kernel": 8,
        "encoder_pos_conv_groups": 2,
        "encoder_num_layers": 2,
        "encoder_num_heads": 4,
        "encoder_attention_dropout": 0.0,
        "encoder_ff_interm_features": 64,
        "encoder_ff_interm_dropout": 0.0,
        "encoder_dropout": 0.0,
        "encoder_layer_norm_first": False,
        "encoder_layer_drop": 0.0,
        "aux_num_out": 10,
    }
    model: nn.Module = models.wav2vec2_model(**(settings | more))
    return model


def _lengths(n: int) -> Tensor:
    return torch.tensor([n, n])


def _tacotron(models: Any) -> Built:
    model = models.Tacotron2(n_symbol=20, symbol_embedding_dim=16, encoder_embedding_dim=16, n_mels=8, attention_rnn_dim=16,
                             decoder_rnn_dim=16, prenet_dim=8, attention_hidden_dim=8, attention_location_n_filter=4,
                             postnet_embedding_dim=16)  # fmt: skip
    return model, (torch.randint(0, 20, (2, 6)), _lengths(6), torch.randn(2, 8, 5), _lengths(5))


TABLE: dict[str, Callable[[Any], Built]] = {
    "Wav2Letter": lambda m: (m.Wav2Letter(num_classes=10, input_type="mfcc", num_features=16), (torch.randn(1, 16, 64),)),
    "ConvTasNet": lambda m: (
        m.ConvTasNet(enc_num_feats=32, msk_num_feats=16, msk_num_hidden_feats=32, msk_num_layers=2, msk_num_stacks=2),
        (torch.randn(2, 1, 400),),
    ),
    "DeepSpeech": lambda m: (m.DeepSpeech(n_feature=8, n_hidden=32, n_class=10), (torch.randn(2, 1, 12, 8),)),
    "wav2vec2": lambda m: (_wav2vec2(m), (torch.randn(2, 400),)),
    "wav2vec2-layer-norm": lambda m: (
        _wav2vec2(m, extractor_mode="layer_norm", encoder_layer_norm_first=True),
        (torch.randn(2, 400),),
    ),
    "WaveRNN": lambda m: (
        m.WaveRNN(
            upsample_scales=[2, 2],
            n_classes=16,
            hop_length=4,
            n_res_block=2,
            n_rnn=16,
            n_fc=16,
            n_freq=8,
            n_hidden=16,
            n_output=16,
        ),
        (torch.randn(2, 1, 32), torch.randn(2, 1, 8, 12)),
    ),
    "Tacotron2": _tacotron,
    "Conformer": lambda m: (
        m.Conformer(input_dim=16, num_heads=4, ffn_dim=32, num_layers=2, depthwise_conv_kernel_size=7),
        (torch.randn(2, 10, 16), _lengths(10)),
    ),
    "Emformer": lambda m: (
        m.Emformer(input_dim=16, num_heads=4, ffn_dim=32, num_layers=2, segment_length=4, right_context_length=1),
        (torch.randn(2, 9, 16), _lengths(9)),
    ),
    "HDemucs": lambda m: (m.HDemucs(sources=["a", "b"], channels=16, depth=4, nfft=256), (torch.randn(1, 2, 4096),)),
    "SquimObjective": lambda m: (
        m.squim_objective_model(
            feat_dim=16, win_len=8, d_model=16, nhead=4, hidden_dim=16, num_blocks=1, rnn_type="LSTM", chunk_size=7
        ),
        (torch.randn(1, 256),),
    ),
}
NAMES = tuple(TABLE)


def build(name: str) -> Built:
    """A network, and a sound or its frequencies."""
    return TABLE[name](_models())
