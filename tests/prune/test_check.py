"""How much may go: everything sound, found in few trial runs, and nothing else."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fasterai.graph.channels import channel_graph
from fasterai.model.outputs import movement
from fasterai.prune import check
from fasterai.prune.check import largest_sound
from fasterai.prune.removal import remove, silent_channels

X = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))


class Shifted(nn.Module):
    """Some of the silent channels are not: something is added to them behind the layer."""

    def __init__(self, channels: int, bad: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(5, channels), nn.Linear(channels, 3)
        shift = torch.zeros(channels)
        shift[list(bad)] = 0.5
        self.shift = nn.Buffer(shift)

    def forward(self, x: Tensor) -> Tensor:
        return self.b((self.a(x) + self.shift).relu())


def shifted(channels: int, silent: Any, bad: Any) -> Shifted:
    net = Shifted(channels, bad)
    with torch.no_grad():
        net.a.weight[list(silent)], net.a.bias[list(silent)] = 0, 0
        net.b.weight.abs_().add_(0.1)
    return net.double()


def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with each trial."""
    counted: list[int] = []
    original = check._Trials._run

    def counting(self: Any, *arguments: Any) -> Any:
        counted.append(1)
        return original(self, *arguments)

    monkeypatch.setattr(check._Trials, "_run", counting)
    return counted


@pytest.mark.parametrize("bad", [(3,), (0, 31), (7, 8, 9)])
def test_the_silent_channels_of_a_group_go_without_those_that_are_not(bad: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    silent = range(32)
    net, x = shifted(40, silent, bad), X.double()
    with torch.no_grad():
        wanted = net(x)
    counted = runs(monkeypatch)
    removal = remove(net, x, measure=False)
    assert removal.removed == {"a.weight": (40, 8 + len(bad))}
    assert removal.stayed == {"a.weight": bad}
    listed = ", ".join(map(str, bad))
    assert f"{len(bad)} of its 32 silent channels stay ({listed}): the outputs would move by" in removal.refused["a.weight"]
    assert "not tried" not in removal.refused["a.weight"]
    assert len(counted) <= 1 + 2 * 5 * len(bad)  # log2(32) = 5
    assert net.a.weight.shape == (8 + len(bad), 5)
    with torch.no_grad():
        torch.testing.assert_close(net(x), wanted, rtol=1e-12, atol=1e-12)


@settings(max_examples=20, deadline=None)
@given(st.sets(st.integers(0, 15), min_size=1), st.sets(st.integers(0, 15), max_size=4))
def test_what_goes_is_silent_and_what_is_silent_goes(silent: set[int], bad: set[int]) -> None:
    net, x = shifted(20, silent, bad), X.double()
    graph = channel_graph(net, (x,))
    sound = largest_sound(net, graph, [~s for s in silent_channels(net, graph)], (x,))
    (kept,) = sound.kept
    assert not set(np.flatnonzero(~kept)) - (silent - bad)
    if len(silent) <= 8 or len(silent & bad) <= 1:  # else the bound may be reached
        assert set(np.flatnonzero(~kept)) == silent - bad
        assert set(sound.stayed.get("a.weight", ())) == silent & bad


def test_where_all_fail_the_search_ends_early_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    net = shifted(64, range(48), range(48))
    counted = runs(monkeypatch)
    removal = remove(net, X.double(), measure=False)
    assert removal.removed == {}
    assert len(removal.stayed["a.weight"]) == 48
    assert len(counted) == 1 + check.GIVE_UP
    assert "it is not silent; 48 of them were not tried alone, after 15 trial runs" in removal.refused["a.weight"]


def test_many_bad_channels_cost_no_more_than_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    bad = set(range(64, 128, 3))
    net, x = shifted(130, range(128), bad), X.double()
    counted = runs(monkeypatch)
    removal = remove(net, x, measure=False)
    assert len(counted) == 1 + 8 * (1 + 7)  # log2(128) = 7
    assert bad <= set(removal.stayed["a.weight"])
    assert removal.removed["a.weight"][1] <= 2 + 64  # the half that is sound has gone
    assert "were not tried alone, after 64 trial runs" in removal.refused["a.weight"]


def test_the_last_channel_of_a_group_stays_where_all_are_to_go() -> None:
    net, x = shifted(8, range(8), ()), X.double()
    graph = channel_graph(net, (x,))
    assert [kept.tolist() for kept in largest_sound(net, graph, [np.zeros(8, np.bool_)], (x,)).kept] == [[False] * 7 + [True]]


class HardCoded(nn.Module):
    """A size in its code, so that nothing of the group can go unless the code is rewritten."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 32), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu().view(-1, 32))


def test_where_the_model_fails_its_channels_are_not_tried_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    net = HardCoded()
    with torch.no_grad():
        net.b.weight[:, :16] = 0
    counted = runs(monkeypatch)
    with pytest.warns(UserWarning, match="nothing was removed"):
        removal = remove(net, X, rewrite=False)
    assert "the model fails without them: RuntimeError" in removal.refused["a.weight"]
    assert removal.stayed == {"a.weight": tuple(range(16))}
    assert len(counted) == 2  # as it is, and with the model's own numbers changed
    with torch.no_grad():
        wanted = net(X)
    assert remove(net, X, measure=False).removed == {"a.weight": (32, 16)}
    torch.testing.assert_close(net(X), wanted)


class OwnWidth(nn.Module):
    """Keeps the width of its stream as a number."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden_dim = 8
        self.a, self.b = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu().view(-1, self.hidden_dim))


def test_a_models_own_width_follows_where_the_model_needs_it() -> None:
    net = OwnWidth()
    with torch.no_grad():
        net.b.weight[:, 2] = 0
    removal = remove(net, X)
    assert removal.removed == {"a.weight": (8, 7)}
    assert net.hidden_dim == 7
    assert ("", "hidden_dim", 8, 7) in removal.plan.attributes


def test_the_difference_is_that_of_the_whole_that_goes() -> None:
    net = shifted(16, range(8), (2,)).float()
    graph = channel_graph(net, (X,))
    with torch.no_grad():
        wanted = net(X)
    removal = remove(net, X, measure=False)
    with torch.no_grad():
        moved = float((net(X) - wanted).abs().max() / wanted.abs().max())
    assert len(graph.groups) == 1
    assert removal.difference <= 1e-5
    assert removal.difference >= moved or math.isclose(removal.difference, moved, rel_tol=0.5)


class Whole(nn.Module):
    """Its output is whole numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).sigmoid()).argmax(1)


def test_outputs_of_whole_numbers_are_compared_as_well() -> None:
    torch.manual_seed(0)
    net = Whole()
    with torch.no_grad():
        net.a.weight[2], net.a.bias[2] = 0, 0
        net.b.weight[:, 2] = torch.tensor([0.0, 0.0, 50.0])
        net.b.bias.copy_(torch.tensor([9.0, 0.0, 0.0]))
        wanted = net(X)
    removal = remove(net, X)
    assert list(removal.refused) == ["a.weight"]
    assert torch.equal(net(X), wanted)


class Counting(nn.Module):
    """Counts its calls, and writes into its input."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 8), nn.Linear(8, 3)
        self.calls = nn.Buffer(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.b(self.a(x.relu_()).relu())


def test_neither_buffers_nor_inputs_are_changed_by_the_trials() -> None:
    net, x = Counting(), X.clone()
    with torch.no_grad():
        net.b.weight[:, 2] = 0
    remove(net, x)
    assert net.calls == 0
    assert torch.equal(x, X)


def test_what_is_rounding_in_float32_is_told_by_float64() -> None:
    """Neighbouring channels cancel, far larger than the outputs: added up in other blocks, the rounding is another one."""
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(5, 2048), nn.Linear(2048, 40)).eval(), torch.randn(50, 5)
    with torch.no_grad():
        for parameter in (net[0].weight, net[0].bias):
            parameter[1024:] = parameter[:1024]
            parameter[100:700] = 0
            parameter[1124:1724] = 0
        net[1].weight[:, :1024] = 100 * torch.rand(40, 1024)
        net[1].weight[:, 1024:] = 0.1 * torch.rand(40, 1024) - net[1].weight[:, :1024]
    before = net(x)
    removal = remove(net, x, measure=False)
    moved = float((net(x) - before).abs().max() / before.abs().max())
    assert moved > 1e-5, "else this shows nothing"
    assert removal.removed == {"0.weight": (2048, 848)}
    assert removal.refused == {}
    assert removal.difference >= moved


def test_what_moves_in_float64_too_stays() -> None:
    net, x = shifted(12, range(4), {2}), X
    with torch.no_grad():
        net.b.weight.mul_(1e-4)  # the outputs are far larger than what the channel that is not silent adds to them
    removal = remove(net.float(), x.float(), measure=False)
    assert 2 in removal.stayed.get("a.weight", ())


def test_rounding_is_told_beside_what_moves_far() -> None:
    """One group is not silent by far, the other only rounds: that one goes."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = nn.Linear(8, 1024), nn.Linear(1024, 4), nn.Linear(8, 16), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.b(torch.relu(self.a(x))), self.d(torch.sigmoid(self.c(x)))

    torch.manual_seed(0)
    net, x = Both().eval(), torch.randn(64, 8)
    with torch.no_grad():
        # Every other channel is silent: without these, the others are added up in other blocks, on any processor.
        net.a.weight[::2], net.a.bias[::2] = 0, 0
        net.c.weight[:8], net.c.bias[:8] = 0, 0
        net.a.weight[513::2], net.a.bias[513::2] = net.a.weight[1:512:2], net.a.bias[1:512:2]
        net.b.weight[:, 1:512:2] = 1e3 * torch.randn(4, 256)
        net.b.weight[:, 513::2] = torch.randn(4, 256) - net.b.weight[:, 1:512:2]
    removal = remove(net, x, measure=False)
    assert removal.difference > 1e-5, "else this shows nothing"
    assert removal.removed == {"a.weight": (1024, 512)}
    assert list(removal.refused) == ["c.weight"]


class Padded(nn.Module):
    """Four silent channels; `between` stands between them and what reads them, and gets what is padding."""

    def __init__(self, between: Any, outside: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.between, self.outside = nn.Linear(5, 8), nn.Linear(8, 3), between, outside
        with torch.no_grad():
            self.a.weight[:4], self.a.bias[:4] = 0, 0
        self.double()

    def forward(self, x: Tensor, padding: Tensor) -> tuple[Tensor, Tensor]:
        y = self.b(self.between(self.a(x), padding[:, None]))
        return y, y.masked_fill(padding[:, None], self.outside)


@pytest.mark.parametrize("outside", [0.0, -1e9, -1.7e308, -math.inf])
def test_a_huge_filler_hides_no_movement(outside: float) -> None:
    net = Padded(lambda y, padding: y.sigmoid(), outside)
    net.forward = lambda x, padding: Padded.forward(net, x, padding)[1]  # type: ignore[assignment]
    removal = remove(net, (X.double(), torch.tensor([True, False, False, True])), measure=False)
    assert removal.removed == {}
    assert "the outputs would move by" in removal.refused["a.weight"]


@pytest.mark.parametrize(
    ("before", "after", "difference"),
    [
        ([4.0, 2.0], [4.0, 1.0], 0.25),
        ([4.0, 2.0], [4.0, 8.0], 1.5),
        ([1e6, 2.0], [1e6, 1.0], 1e-6),  # once: it is an output, not a filler
        ([1e6, 1e6, 2.0], [1e6, 1e6, 1.0], 0.5),
        ([-1e6, -1e6, 2.0], [-1e6, -1e6, 1.0], 0.5),
        ([1e6, 1e6, 2.0], [1e6, 0.0, 2.0], 1.0),  # one of the two moves, the other stands once
        ([2000.0, 2000.0, 2.0], [2000.0, 2000.0, 1.0], 1 / 2000),  # not more than 1,000 times as large
        ([2001.0, 2001.0, 2.0], [2001.0, 2001.0, 1.0], 0.5),
        ([math.inf, 2.0], [math.inf, 1.0], 0.5),
        ([3.0, 2.0], [3.0, math.nan], math.inf),
        ([math.nan, 2.0], [math.nan, 2.0], math.inf),
        ([], [], 0.0),
    ],
)
def test_how_far_outputs_move_as_a_share_of_their_scale(before: list[float], after: list[float], difference: float) -> None:
    found = movement(torch.tensor(before, dtype=torch.float64), torch.tensor(after, dtype=torch.float64)).share
    assert found == pytest.approx(difference, rel=1e-12)


def test_masks_that_the_inputs_leave_empty_are_tried_filled() -> None:
    inputs = X.double(), torch.zeros(4, dtype=torch.bool)
    assert remove(Padded(lambda y, padding: y.masked_fill(padding, -1.0)), inputs, measure=False).removed == {}
    harmless = Padded(lambda y, padding: y.masked_fill(padding, 0.0))
    assert remove(harmless, inputs, measure=False).removed == {"a.weight": (8, 4)}


def test_lengths_that_the_inputs_do_not_have_are_tried() -> None:
    class Positions(nn.Module):
        """The first position adds nothing, those behind it do."""

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(5, 8, bias=False), nn.Linear(8, 3)
            with torch.no_grad():
                self.a.weight[:4] = 0

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x) + torch.arange(x.shape[1], dtype=x.dtype)[:, None])

    assert remove(Positions().double(), X.double()[:, None], measure=False).removed == {}


def test_a_model_that_overflows_on_large_numbers_is_judged_by_the_others() -> None:
    net = Padded(lambda y, padding: y.relu())
    net.forward = lambda x: (net.b(net.a(x).relu()), (100 * x).exp() / (100 * x).exp().sum(1, keepdim=True))  # type: ignore[assignment]
    assert net(X.double())[1].isfinite().all()
    assert net(X.double() * 30)[1].isnan().any()
    assert remove(net, X.double(), measure=False).removed == {"a.weight": (8, 4)}


def test_what_comes_alive_at_large_numbers_alone_is_not_silent() -> None:
    class Late(nn.Module):
        """A constant that is added to silent channels is heard where numbers are large."""

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(5, 8), nn.Linear(8, 3)
            with torch.no_grad():
                self.a.weight[:4], self.a.bias[:4] = 0, 0

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x) + (x.abs().amax(1, keepdim=True) - 20).relu())

    assert remove(Late().double(), X.double(), measure=False).removed == {}


def test_padding_changes_nothing_about_heads() -> None:
    """torch's fused attention zeroes what is padding; the slim one computes what torch's does in training."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 4, 16, batch_first=True, dropout=0.0)
    encoder = nn.TransformerEncoder(layer, 2).eval()
    x, padding = torch.randn(3, 6, 8), torch.zeros(3, 6, dtype=torch.bool)
    padding[0, 4:] = True
    with torch.no_grad():
        for one in encoder.layers:
            one.self_attn.in_proj_weight.view(3, 4, 2, 8)[:, :2] = 0
            one.self_attn.in_proj_bias.view(3, 4, 2)[:, :2] = 0
            one.self_attn.out_proj.weight.view(8, 4, 2)[:, :2] = 0

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = encoder

        def forward(self, x: Tensor, padding: Tensor) -> Tensor:
            return self.encoder(x, src_key_padding_mask=padding)

    model = Masked().eval()
    wanted = model(x, padding)  # with gradients: not the fused kernel
    removal = remove(model, (x, padding), measure=False)
    heads = {f"encoder.layers.{i}.self_attn.in_proj_weight": (4, 2) for i in range(2)}
    assert (removal.removed, removal.refused) == (heads, {})
    torch.testing.assert_close(model(x, padding), wanted, rtol=0, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(model(x, padding)[~padding], wanted[~padding].detach(), rtol=0, atol=1e-5)


def test_trials_see_the_weights_that_are_there_under_autocast() -> None:
    net = shifted(16, range(8), ()).float()
    with torch.autocast("cpu", torch.bfloat16):
        net(X)  # its weights are cast, and the casts kept
        removal = remove(net, X, measure=False)
        assert removal.removed == {"a.weight": (16, 8)}
        assert net(X).shape == (4, 3)


@pytest.mark.parametrize("seed", range(3))
def test_rounding_of_half_precision_is_decided_in_float64(seed: int) -> None:
    torch.manual_seed(seed)
    net = nn.Sequential(*(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.ReLU(), nn.Conv2d(64, 8, 1), nn.Softmax(1)))
    with torch.no_grad():
        for maker, reader in ((net[0], net[2]), (net[2], net[4])):
            maker.weight[::2], maker.bias[::2], reader.weight[:, ::2] = 0, 0, 0
    net = net.bfloat16().eval()
    removal = remove(net, torch.randn(2, 3, 16, 16).bfloat16(), measure=False)
    assert (removal.removed, removal.refused) == ({"0.weight": (64, 32), "2.weight": (64, 32)}, {})


class Insists(nn.Module):
    """Its code asks for float32, and enlarges rounding to a ten-thousandth of the outputs' scale."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 64), nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        return (self.b(self.a(x).relu().float()) * 1e3).sin()


@torch.no_grad()
def test_rounding_is_told_from_movement_where_the_code_insists_on_float32() -> None:
    torch.manual_seed(0)
    model, x = Insists().eval(), torch.randn(4, 6)
    with pytest.raises(RuntimeError, match="dtype"):
        copy.deepcopy(model).double()(x.double())
    graph, keep = channel_graph(model, (x,)), np.arange(64) % 2 == 0
    model.a.weight[1::2] = model.a.bias[1::2] = 0
    sound = largest_sound(model, graph, [keep], (x,))
    assert 1e-5 < sound.difference < 1e-2 and not sound.refused
    model.a.bias[1] = 1e-6  # not silent: it moves the outputs no further than rounding does
    assert largest_sound(model, graph, [keep], (x,)).stayed == {"a.weight": (1,)}
