from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as hooks

from fasterai.analyze.counting import count, rules
from tests.networks import Failing


class Function(nn.Module):
    """A function as a model."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


class Packed(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(4, 5)

    def forward(self, x, lengths):
        return self.lstm(nn.utils.rnn.pack_padded_sequence(x, lengths))[0].data


def zeros(*shape):
    return torch.zeros(shape)


def attend(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def quietly(model):
    return Function(lambda *x: model(*x, need_weights=False)[0])


X = zeros(2, 3, 8)
# Attention of 2 x 3 positions, 8 wide in 2 heads of 4: in 6*24*8, scores and values 2*2*3*3*(4+4), out 6*8*8.
ATTENTION = 1152 + 288 + 384
MODELS = {
    "linear": (nn.Linear(4, 3), (zeros(2, 5, 4),), 10 * 4 * 3),
    "linear without bias, one sample": (nn.Linear(4, 3, bias=False), (zeros(4),), 4 * 3),
    "conv1d": (nn.Conv1d(3, 5, 2), (zeros(2, 3, 7),), (2 * 5 * 6) * (3 * 2)),
    "conv2d, stride and padding": (nn.Conv2d(3, 5, 3, stride=2, padding=1), (zeros(1, 3, 8, 8),), (5 * 4 * 4) * (3 * 9)),
    "conv2d, 2 groups": (nn.Conv2d(4, 6, 3, groups=2), (zeros(2, 4, 5, 5),), (2 * 6 * 3 * 3) * (2 * 9)),
    "conv2d, depthwise": (nn.Conv2d(4, 4, 3, groups=4, padding=1), (zeros(1, 4, 8, 8),), (4 * 64) * 9),
    "conv2d, dilated": (nn.Conv2d(1, 1, 3, dilation=2), (zeros(1, 1, 5, 5),), 9),
    "conv3d": (nn.Conv3d(2, 3, 2), (zeros(1, 2, 3, 3, 3),), (3 * 8) * (2 * 8)),
    "transposed, 2 groups": (nn.ConvTranspose2d(4, 6, 3, groups=2), (zeros(2, 4, 5, 5),), (2 * 4 * 25) * (3 * 9)),
    "attention with weights": (nn.MultiheadAttention(8, 2, batch_first=True), (X, X, X), ATTENTION),
    "attention without weights": (quietly(nn.MultiheadAttention(8, 2, batch_first=True)), (X, X, X), ATTENTION),
    "encoder": (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), (X,), ATTENTION + 2 * 6 * 8 * 16),
    "inner products": (Function(torch.linalg.vecdot), (zeros(2, 1, 4), zeros(3, 4)), 2 * 3 * 4),
    "outer": (Function(lambda x, y: x.outer(y) + torch.outer(x, y)), (zeros(3), zeros(5)), 2 * 3 * 5),
    "kron": (Function(torch.kron), (zeros(2, 3), zeros(4, 5)), 2 * 3 * 4 * 5),
    "distances": (Function(torch.cdist), (zeros(2, 3, 4), zeros(2, 5, 4)), 2 * 3 * 5 * 4),
    "distances of many": (Function(torch.cdist), (zeros(30, 4), zeros(5, 4)), 30 * 5 * 4),
    "decoder": (nn.TransformerDecoderLayer(8, 2, 16, batch_first=True), (X, X), 2 * ATTENTION + 2 * 6 * 8 * 16),
    "grouped queries": (Function(attend), (zeros(2, 4, 3, 5), zeros(2, 2, 3, 5), zeros(2, 2, 3, 7)), 2 * 4 * 3 * 3 * (5 + 7)),
    "lstm": (nn.LSTM(4, 5, batch_first=True), (zeros(2, 3, 4),), 6 * 4 * 5 * (4 + 5)),
    "lstm, 2 layers, both ways": (
        nn.LSTM(4, 5, num_layers=2, bidirectional=True), (zeros(3, 2, 4),), 6 * 2 * (20 * (4 + 5) + 20 * (10 + 5))
    ),
    "lstm, packed": (Packed(), (zeros(3, 2, 4), torch.tensor([3, 1])), (3 + 1) * 4 * 5 * (4 + 5)),
    "gru": (nn.GRU(4, 5), (zeros(3, 2, 4),), 6 * 3 * 5 * (4 + 5)),
    "rnn": (nn.RNN(4, 5), (zeros(3, 2, 4),), 6 * 5 * (4 + 5)),
    "lstm cell": (nn.LSTMCell(4, 5), (zeros(3, 4),), 3 * 4 * 5 * (4 + 5)),
    "bilinear": (nn.Bilinear(3, 4, 5), (zeros(2, 3), zeros(2, 4)), 2 * 5 * 3 * 4),
    "einsum": (Function(lambda a, b: torch.einsum("bij,bjk->bik", a, b)), (zeros(2, 3, 4), zeros(2, 4, 5)), 2 * 3 * 4 * 5),
    "matrix times vector": (Function(torch.matmul), (zeros(2, 3, 4), zeros(4)), 2 * 3 * 4),
    "addmv": (Function(torch.addmv), (zeros(3), zeros(3, 4), zeros(4)), 3 * 4),
    "inner product": (Function(torch.dot), (zeros(4), zeros(4)), 4),
    "addbmm": (Function(torch.addbmm), (zeros(3, 5), zeros(2, 3, 4), zeros(2, 4, 5)), 2 * 3 * 4 * 5),
    "nothing that multiplies": (
        nn.Sequential(nn.BatchNorm2d(2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()), (zeros(1, 2, 4, 4),), 0
    ),
    "embedding": (nn.Embedding(5, 3), (torch.tensor([1, 2]),), 0),
}  # fmt: skip


@pytest.mark.parametrize("case", MODELS)
def test_macs_are_those_worked_out_by_hand(case):
    model, inputs, macs = MODELS[case]
    model.eval()
    with torch.no_grad():
        tallies, _, uncounted = count(model, inputs)
    assert sum(t.macs for t in tallies.values()) == macs
    assert uncounted == ()


A = (3, 4)
RULES = {
    "mv": (((3, 4), (4,)), 12),
    "addmv": (((3,), (3, 4), (4,)), 12),
    "dot": (((4,), (4,)), 4),
    "vdot": (((4,), (4,)), 4),
    "_int_mm": (((3, 4), (4, 5)), 60),
    "_addmm_activation": (((5,), (3, 4), (4, 5)), 60),
    "addbmm": (((3, 5), (2, 3, 4), (2, 4, 5)), 120),
    # 7 rows in groups, each row with one of 2 matrices of 4 x 5
    "_grouped_mm": (((7, 4), (2, 4, 5)), 7 * 4 * 5),
    # 7 columns in 2 groups, each column with one of the matrices of 3 x 4
    "_scaled_grouped_mm": (((2, 3, 4), (4, 7)), 3 * 4 * 7),
    "_trilinear": (((2, 3), (5, 3, 4), (2, 4), [1, 3], [0], [1, 2], [2, 3]), 2 * 5 * 3 * 4),
    "_scaled_dot_product_attention_math_for_mps": (((2, 4, 3, 5), (2, 4, 6, 5), (2, 4, 6, 7)), 2 * 4 * 3 * 6 * (5 + 7)),
    "_scaled_dot_product_fused_attention_overrideable": (((2, 4, 3, 5), (2, 4, 6, 5), (2, 4, 6, 7)), 2 * 4 * 3 * 6 * (5 + 7)),
    "_cdist_forward": (((2, 3, 4), (5, 4)), 2 * 3 * 5 * 4),
    "_euclidean_dist": (((3, 4), (5, 4)), 3 * 5 * 4),
    "mkldnn_rnn_layer": (((3, 2, 4), (20, 4), (20, 5), (20,), (20,)), 6 * 20 * (4 + 5)),
    # two layers; the vectors are biases
    "_cudnn_rnn": (((3, 2, 4), [(20, 4), (20, 5), (20,), (20,), (20, 5), (20, 5), (20,), (20,)]), 6 * 20 * (4 + 5 + 5 + 5)),
    "miopen_rnn": (((7, 4), [(20, 4), (20, 5), (20,)]), 7 * 20 * (4 + 5)),
}


@pytest.mark.parametrize("name", RULES)
def test_rules_follow_the_shapes(name):
    shapes, macs = RULES[name]
    operation = getattr(torch.ops.aten, name, None)
    if operation is None:
        pytest.skip("this torch has not got it")
    assert rules()[operation](*shapes, out_shape=None) == 2 * macs


def test_every_rule_has_a_case():
    assert {operation.__name__ for operation in rules()} <= set(RULES)


def test_grouped_products_are_counted_as_they_run():
    if not hasattr(torch, "_grouped_mm"):
        pytest.skip("this torch has not got it")
    pair = torch.zeros(2, 16, 16, dtype=torch.bfloat16)
    tallies, _, _ = count(Function(torch._grouped_mm), (pair, pair))
    assert tallies[""].macs == 2 * 16 * 16 * 16


class Nested(nn.Module):
    """A block with an own product, a layer that is called twice, and one that is called in a hidden module."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.unused = nn.Linear(4, 4)
        self.weight = nn.Parameter(torch.zeros(4, 6))
        self.hidden = [nn.Linear(4, 4)]  # a list is not registered

    def forward(self, x):
        return self.hidden[0](self.inner(self.inner(x))) @ self.weight


def test_each_module_has_its_own_share():
    tallies, _, _ = count(nn.Sequential(Nested(), nn.Linear(6, 2)), (zeros(3, 4),))
    assert tallies["0.inner"].macs == 2 * 3 * 4 * 4
    assert tallies["0.inner"].calls == 2
    assert tallies["0"].macs == 3 * 4 * 4 + 3 * 4 * 6  # the hidden layer's and its own
    assert tallies["0"].shape == (3, 6)
    assert (tallies["0.unused"].calls, tallies["0.unused"].shape) == (0, None)
    assert (tallies["1"].macs, tallies[""].macs) == (3 * 6 * 2, 0)


class Retry(nn.Module):
    """Multiplies by itself, then falls back on another layer when the first one fails."""

    def __init__(self):
        super().__init__()
        self.square = nn.Parameter(torch.zeros(4, 4))
        self.first, self.second = nn.Linear(5, 2), nn.Linear(4, 2)

    def forward(self, x):
        x = x @ self.square
        try:
            return self.first(x)
        except RuntimeError:
            return self.second(x)


def test_a_layer_that_fails_within_the_pass_does_not_shift_the_shares():
    tallies, _, _ = count(nn.Sequential(Retry()), (zeros(3, 4),))
    assert {name: t.macs for name, t in tallies.items()} == {"": 0, "0": 3 * 4 * 4, "0.first": 0, "0.second": 3 * 4 * 2}


CHAIN = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
MEMORY = {
    # Three outputs of 16 bytes, of which two are held at a time.
    "a chain": (CHAIN, zeros(1, 4), 48, 32),
    "two bytes each": (nn.Linear(4, 4, dtype=torch.bfloat16), torch.zeros(1, 4, dtype=torch.bfloat16), 8, 8),
    "an output that is kept": (Function(lambda x: (a := x + 1, b := a + 1, b + 1)), zeros(4), 48, 48),
    "in place": (nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True)), zeros(1, 4), 16, 16),
    "not in place": (nn.Sequential(nn.Linear(4, 4), nn.ReLU()), zeros(1, 4), 32, 32),
    "views": (Function(lambda x: x.view(2, 2).t().unsqueeze(0)), zeros(4), 0, 0),
    "what is let go is not held": (Function(lambda x: [None for _ in range(200) if (x + 1) is None]), zeros(4), 3200, 16),
}


@pytest.mark.parametrize("case", MEMORY)
def test_memory_is_that_of_new_outputs(case):
    model, x, made, peak = MEMORY[case]
    with torch.no_grad():
        tallies, most, _ = count(model, (x,))
    assert sum(t.made for t in tallies.values()) == made
    assert most == peak


def test_operations_without_a_rule_are_named():
    torchvision = pytest.importorskip("torchvision")
    _, _, uncounted = count(torchvision.ops.DeformConv2d(2, 3, 3), (zeros(1, 2, 5, 5), zeros(1, 18, 3, 3)))
    assert uncounted == ("torchvision::deform_conv2d",)
    _, _, uncounted = count(Function(lambda x: torch.fft.rfft(x).abs()), (zeros(4),))
    assert uncounted == ("aten::_fft_r2c",)
    assert count(Function(lambda x: torch.lgamma(x).softmax(0)), (zeros(4),))[2] == ()


def test_a_rule_of_the_users_own_counts():
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    @torch.library.custom_op("fasterai_tests::twice", mutates_args=())
    def twice(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    assert count(Function(twice), (zeros(4),))[2] == ("fasterai_tests::twice",)
    register_flop_formula(torch.ops.fasterai_tests.twice)(lambda shape, *_, **__: 2 * shape[0])
    try:
        tallies, _, uncounted = count(Function(twice), (zeros(4),))
    finally:
        del flop_registry[torch.ops.fasterai_tests.twice]
    assert (tallies[""].macs, uncounted) == (4, ())


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("model", [nn.Identity(), Failing()])
def test_no_global_hook_and_no_setting_is_left(model, enabled):
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(enabled)
    try:
        if isinstance(model, Failing):
            with pytest.raises(RuntimeError, match="not today"):
                count(model, (zeros(1),))
        else:
            count(model, (zeros(1),))
        assert torch.backends.mha.get_fastpath_enabled() is enabled
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
    assert not hooks._global_forward_hooks and not hooks._global_forward_pre_hooks
