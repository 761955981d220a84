"""Removal where sizes are written into code: modules run a traced copy of it, with the sizes put right."""

from __future__ import annotations

import copy
import io
import json
import pickle
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasterai.analyze.cost import cost
from fasterai.callbacks.plain import attach
from fasterai.graph.channels import channel_graph
from fasterai.prune.choice.budget import Budget
from fasterai.prune.gradual import GradualPruner
from fasterai.prune.pruner import Pruner
from fasterai.prune.removal import Removal, mask_channels_, remove
from fasterai.prune.small_files import load_small, save_small
from fasterai.prune.surgery.operate import Surgery, apply_plan_
from fasterai.prune.surgery.plan import Plan
from fasterai.prune.surgery.rewriting import Edit, Rewrite
from fasterai.prune.surgery.traced_copies import rewrite_of
from fasterai.prune.surgery.tracing import plain_class

# --- modules with sizes written into their code ---------------------------------------------------------------------------


class Attention(nn.Module):
    """As in many networks: the width of the input is taken for that of the heads."""

    def __init__(self, width: int = 12, heads: int = 4) -> None:
        super().__init__()
        self.count, self.qkv, self.proj = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.count, C // self.count).permute(2, 0, 3, 1, 4).unbind(0)
        scores = q @ k.transpose(-2, -1)
        if mask is not None:
            scores = scores + mask
        mixed = F.dropout(scores.softmax(-1), 0.0, self.training) @ v
        return self.proj(mixed.transpose(1, 2).reshape(B, N, C))


class Batched(Attention):
    """Batch and heads are one dimension, whose size differs with the batch."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        B, N, C = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, self.count, C // self.count).permute(2, 0, 3, 1, 4).unbind(0)
        q, k, v = (y.reshape(B * self.count, N, C // self.count) for y in (q, k, v))
        mixed = (torch.bmm(q, k.transpose(1, 2)).softmax(-1) @ v).view(B, self.count, N, C // self.count)
        return self.proj(mixed.permute(0, 2, 1, 3).reshape(B, N, C))


class Frozen(Attention):
    """The batch of two is written into the code as well."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x).reshape(2, -1, 3, self.count, 3).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj((F.softmax(q @ k.transpose(-2, -1), -1) @ v).transpose(1, 2).reshape(2, -1, 12))


class Branching(Attention):
    """Control flow by values, which a trace cannot follow."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(x) if x.mean() > -1e9 else x


class Parts(nn.Module):
    """Parts of unequal sizes go different ways, by a split and by slices."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(12, 15), nn.Linear(5, 12), nn.Linear(10, 12)
        self.d = nn.Linear(15, 12)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).tanh()
        few, many = y.split((5, 10), dim=-1)
        z = torch.cat([y[..., :4] * 2, y[..., 4:]], -1)
        return self.b(few) + self.c(many) + self.d(z)


class Spread(nn.Module):
    """A vector is spread over the places of each channel by a size."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.gate, self.b = nn.Linear(12, 10), nn.Linear(12, 10), nn.Linear(10, 12)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate(x.mean(1)).sigmoid().view(-1, 1, 10).expand(x.shape[0], x.shape[1], 10)
        return self.b(self.a(x) * gate)


class Net(nn.Module):
    """One such module beside a residual path, once or several times."""

    def __init__(self, make: Any, times: int = 1) -> None:
        super().__init__()
        self.first, self.part, self.last, self.times = nn.Linear(6, 12), make(), nn.Linear(12, 3), times

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).tanh()
        for _ in range(self.times):
            x = x + self.part(x)
        return self.last(x)


def built(make: Any, times: int = 1) -> Net:
    torch.manual_seed(0)
    return Net(make, times).double().eval()


X = torch.randn(2, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
OTHERS = [X, torch.randn(3, 8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))]


def masked(net: nn.Module, dice: int = 0, x: Tensor = X) -> tuple[Any, list[np.ndarray]]:
    """Half of the channels of each group are silent."""
    graph, order = channel_graph(net, (x,)), np.random.default_rng(dice)
    kept = [order.permutation(g.channels) >= g.channels // 2 for g in graph.groups]
    mask_channels_(net, graph, kept)
    return graph, kept


def halved(net: nn.Module, **options: Any) -> tuple[Removal, list[Tensor]]:
    masked(net)
    wanted = [net(x) for x in OTHERS]
    return remove(net, X, measure=False, **options), wanted


def agrees(net: nn.Module, wanted: list[Tensor]) -> bool:
    return all(torch.allclose(net(x), y, rtol=0, atol=1e-12) for x, y in zip(OTHERS, wanted, strict=True))


class Chosen(Parts):
    """Its forward is one of its methods, chosen when it is built."""

    def __init__(self) -> None:
        super().__init__()
        self.forward = self.in_parts  # type: ignore[method-assign]

    def in_parts(self, x: Tensor) -> Tensor:
        return Parts.forward(self, x).sin()


CASES = {
    "attention": (Attention, "part.qkv.weight", (12, 6)),
    "batch and heads": (Batched, "part.qkv.weight", (12, 6)),
    "parts": (Parts, "part.a.weight", None),
    "chosen": (Chosen, "part.a.weight", None),
    "spread": (Spread, "part.a.weight", (5, 6)),
}


@pytest.mark.parametrize(("name", "times"), [*((name, 1) for name in CASES), ("batch and heads", 2)])
def test_what_has_its_sizes_in_its_code_goes_as_well(name: str, times: int) -> None:
    make, weight, _ = CASES[name]
    net = built(make, times)
    parameters = dict(net.named_parameters())
    removal, wanted = halved(net)
    assert removal.refused == {} and list(removal.plan.rewrites) == ["part"]
    assert "part: its code had sizes written into it; it runs a traced copy now" in str(removal)
    assert agrees(net, wanted)
    assert all(p is parameters[n] for n, p in net.named_parameters()) and list(net.state_dict()) == list(parameters)
    shape = parameters[weight].shape
    assert shape[0] < 0.8 * make().get_parameter(weight.removeprefix("part.")).shape[0] and shape[1] == 6
    assert isinstance(net.part, make) and plain_class(net.part) is make and type(net.part).__name__ == f"Traced{make.__name__}"


def test_without_rewriting_it_stays_as_before() -> None:
    net = built(Attention)
    removal, wanted = halved(net, rewrite=False)
    assert [*removal.refused] == ["part.qkv.weight"] or "part.qkv.weight" in removal.refused
    assert "the model fails without them" in removal.refused["part.qkv.weight"]
    assert removal.plan.rewrites == {} and type(net.part) is Attention and agrees(net, wanted)
    parts = channel_graph(built(Parts), (X,), rewrite=False)
    assert "cuts it at fixed positions" in parts.pinned["part.a.weight", 0]


class Noting(Attention):
    """What it saw last is noted on the module, in each forward pass."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        self.seen = x.shape[1]
        return super().forward(x)


class Told(Attention):
    """It goes by a batch size that another module has told it."""

    batch = 2

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(x) * self.batch


class Telling(Net):
    def forward(self, x: Tensor) -> Tensor:
        self.part.batch = x.shape[0]
        return super().forward(x)


class Training(Attention):
    """In training it does something else."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(x) * 2 if self.training else super().forward(x)


class NoGradient(Attention):
    """A context that a trace does not see."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        with torch.no_grad():
            return super().forward(x)


ELSE = "does something else on other inputs"


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (Branching, "cannot be traced: TraceError"),
        (Noting, "notes something on the module"),
        (Told, ELSE),
        (Training, "does other operations in training"),
        (NoGradient, ELSE),
    ],
)
def test_what_a_trace_would_freeze_keeps_its_own_code(make: Any, why: str) -> None:
    torch.manual_seed(0)
    net = (Telling if make is Told else Net)(make).double().eval()
    removal, wanted = halved(net)
    assert f"no traced copy can run instead: its code {why}" in removal.refused["part.qkv.weight"]
    assert removal.plan.rewrites == {}
    assert type(net.part) is make and agrees(net, wanted)


class BranchingParts(Parts):
    """Slices in code that no trace can follow: at other places they would run, and take other channels."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.mean() > -1e9 else super().forward(x.flip(1))


@pytest.mark.parametrize("exact", [True, False])
def test_slices_are_put_right_or_stay_even_where_outputs_may_move(exact: bool) -> None:
    net = built(Parts)
    removal, wanted = halved(net, exact=exact)
    assert removal.refused == {} and agrees(net, wanted)
    other = built(BranchingParts)
    removal, wanted = halved(other, exact=exact)
    assert "cannot be traced: TraceError" in removal.refused["part.a.weight"] and agrees(other, wanted)


# --- what a traced copy is held to ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def slim() -> tuple[Net, Removal, list[Tensor]]:
    net = built(Attention)
    removal, wanted = halved(net)
    return net, removal, wanted


def test_copies_and_pickles_compute_the_same(slim: tuple[Net, Removal, list[Tensor]]) -> None:
    net, _, wanted = slim
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net)), copy.deepcopy(pickle.loads(pickle.dumps(net)))):
        assert agrees(other, wanted) and rewrite_of(other.part) == rewrite_of(net.part)
        assert other.part.qkv.weight is not net.part.qkv.weight
    assert plain_class(pickle.loads(pickle.dumps(net.part))) is Attention


def test_the_plan_is_data_and_does_the_same_to_a_fresh_model(slim: tuple[Net, Removal, list[Tensor]]) -> None:
    net, removal, wanted = slim
    plan = Plan.from_dict(json.loads(json.dumps(removal.plan.to_dict())))
    assert plan.rewrites == removal.plan.rewrites and "part: runs a traced copy of its code, 2 edits" in str(plan)
    fresh = built(Attention)
    apply_plan_(fresh, plan)
    fresh.load_state_dict(net.state_dict())
    assert agrees(fresh, wanted)
    other = replace(plan, rewrites={"part": Rewrite((("mask", None),), (Edit("reshape", "size", ("args", 9), None, 3),))})
    with pytest.raises(ValueError, match="plan must be for this model, got one with edits of part, but reshape has no"):
        apply_plan_(built(Attention), other)


def test_what_was_undone_is_as_before_and_what_was_done_again_too(slim: tuple[Net, Removal, list[Tensor]]) -> None:
    net = built(Attention)
    dense = [net(x) for x in OTHERS]
    surgery = Surgery(net, slim[1].plan)
    small, cls = [net(x) for x in OTHERS], type(net.part)
    surgery.undo()
    assert type(net.part) is Attention and agrees(net, dense)
    surgery.redo()
    assert type(net.part) is cls and agrees(net, small)


def test_a_small_file_brings_the_traced_copy_along(slim: tuple[Net, Removal, list[Tensor]], tmp_path: Path) -> None:
    net, _, wanted = slim
    save_small(tmp_path / "small.safetensors", net)
    loaded = load_small(tmp_path / "small.safetensors", built(Attention))
    assert agrees(loaded, wanted) and rewrite_of(loaded.part) == rewrite_of(net.part)
    fresh = built(Attention)
    fresh.part.__class__ = Batched
    with pytest.raises(ValueError, match="part is a Batched here and a Attention in the file"):
        load_small(tmp_path / "small.safetensors", fresh)


def test_a_second_removal_edits_the_code_anew(slim: tuple[Net, Removal, list[Tensor]]) -> None:
    net = copy.deepcopy(slim[0])
    masked(net, 3)
    wanted = [net(x) for x in OTHERS]
    removal = remove(net, X, measure=False)
    assert removal.removed["part.qkv.weight"] == (2, 1) and agrees(net, wanted)
    assert rewrite_of(net.part).edits[-1].after == 3


def test_a_forward_that_a_module_has_set_itself_comes_back() -> None:
    net = built(Chosen)
    dense, own = [net(x) for x in OTHERS], net.part.forward
    small = copy.deepcopy(net)
    removal, wanted = halved(small)
    for other in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        assert agrees(other, wanted) and "forward" not in vars(other.part)
    surgery = Surgery(net, removal.plan)
    assert "forward" not in vars(net.part)
    surgery.undo()
    assert net.part.forward == own and agrees(net, dense)
    net.part.forward = partial(own)  # as libraries that put hooks around it do
    with pytest.raises(ValueError, match="it has a forward that is no code of its class"):
        Surgery(net, removal.plan)


def test_it_trains_and_goes_on_in_other_modes(slim: tuple[Net, Removal, list[Tensor]]) -> None:
    net = copy.deepcopy(slim[0]).train()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = (net(X) - X[..., :3]).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] and net.part.qkv.weight.grad is not None


def test_hooks_stay(slim: tuple[Net, Removal, list[Tensor]]) -> None:
    net, heard = built(Attention), []
    net.part.register_forward_hook(lambda module, given, result: heard.append(result.shape))
    apply_plan_(net, slim[1].plan)
    net(X)
    assert heard == [(2, 5, 6)]


def test_exports_and_compiles(slim: tuple[Net, Removal, list[Tensor]]) -> None:
    torch._dynamo.reset()
    net, _, wanted = slim
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    program = torch.export.export(net, (X,), dynamic_shapes=({0: batch, 1: length},))
    assert agrees(program.module(), wanted)
    assert agrees(torch.compile(net, backend="eager", dynamic=True), wanted)
    file = io.BytesIO()
    torch.onnx.export(copy.deepcopy(net).float(), (X.float(),), file, dynamo=False)
    assert file.getbuffer().nbytes > 0


def test_the_pruner_takes_it_in_steps_and_leaves_it_if_asked() -> None:
    net = built(Attention)
    pruner = Pruner(net, 0.5, "local", "large_final", example_inputs=X, iterative_steps=2, round_to=1)
    first, second = pruner.prune_model(measure=False), pruner.prune_model(measure=False)
    assert first.refused == {} and second.refused == {}
    assert net.part.qkv.weight.shape == (18, 6) and [*second.plan.rewrites] == ["part"]
    stays = Pruner(built(Attention), 0.5, "local", "large_final", example_inputs=X, round_to=1, rewrite=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert "part.qkv.weight" in stays.prune_model(measure=False).refused


def test_a_budget_counts_heads_in() -> None:
    net = built(Attention)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pruner = Pruner(net, Budget(macs=0.35), "local", "large_final", example_inputs=X)
        removal = pruner.prune_model(measure=False)
    assert removal.refused == {} and net.part.proj.in_features < 12
    assert cost(net, X).macs <= 0.35 * cost(built(Attention), X).macs


def test_a_gradual_pruner_resumes_on_a_fresh_model() -> None:
    def begin() -> tuple[Net, Any, GradualPruner]:
        net = built(Attention)
        pruner = GradualPruner(net, 0.5, "local", "large_final", example_inputs=X, max_updates=1, round_to=1)
        return net, torch.optim.SGD(net.parameters(), lr=0.01), pruner

    net, optimizer, pruner = begin()
    with attach(optimizer, pruner, total_steps=2):
        for _ in range(2):
            optimizer.zero_grad()
            net(X).square().mean().backward()
            optimizer.step()
    fresh, _, resumed = begin()
    resumed.load_state_dict(copy.deepcopy(pruner.state_dict()))
    fresh.load_state_dict(net.state_dict())
    assert agrees(fresh, [net(x) for x in OTHERS]) and rewrite_of(fresh.part) == rewrite_of(net.part)
    assert net.part.qkv.weight.shape == (18, 6)


class InPart(nn.Module):
    """Code that adds to the first four of eight channels in place."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(5, 8), nn.Linear(8, 4), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x).relu()
        z = y.clone()
        z[:, :4] += self.b(y)
        return self.out(z)


def test_parts_that_are_written_in_place_get_shorter():
    net, x = InPart().double().eval(), torch.randn(3, 5, dtype=torch.float64)
    with torch.no_grad():
        for name in ("a", "b"):
            for tensor in getattr(net, name).parameters():
                tensor[[0, 2]] = 0.0
    wanted = net(x)
    assert remove(net, x, measure=False).refused == {}
    assert (net.a.out_features, net.b.out_features) == (6, 2)
    torch.testing.assert_close(net(x), wanted, rtol=0, atol=1e-12)
