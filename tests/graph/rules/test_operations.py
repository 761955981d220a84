"""Every operation of the networks of the sweep, in the forms in which they call it: its rule against torch itself.

The calls stand in `operations.json`, which `python -m tests.sweep.operations` writes. One dimension of one tensor gets labels,
and of it channel after channel other values: what of the result differs then must carry that channel's label, or be pinned.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves, tree_map

from fasterai.graph.labels import FIXED, FREE
from fasterai.graph.rules import RULES, Trace, Value, unknown
from tests.sweep.operations import Call, form, merged, read

CALLS = read()
#: Forms that no network of the sweep has happened to use.
MORE: list[Call] = [
    ["aten._conj.default", ["@complex64 2x3"], {}],
    ["aten._fft_c2c.default", ["@complex64 2x3x4", [1], 0, True], {}],
    ["aten._fft_c2r.default", ["@complex64 2x3x4", [1, 2], 0, 6], {}],
    ["aten._fft_r2c.default", ["@float32 2x3x4", [2], 0, True], {}],
    ["aten.angle.default", ["@complex64 2x3"], {}],
    ["aten.bilinear.default", ["@float32 2x3x4", "@float32 2x3x5", "@float32 6x4x5"], {}],
    ["aten.broadcast_tensors.default", [["@float32 2x1", "@float32 3", "@float32 2x3"]], {}],
    ["aten.cat.default", [["@float32 2x3", "@float32 2x5"]], {"dim": -1}],
    ["aten.cdist.default", ["@float32 2x3x4", "@float32 2x5x4"], {}],
    ["aten.cumprod.default", ["@float32 2x3", 1], {}],
    ["aten.chunk.default", ["@float32 6x4"], {"chunks": 3}],
    ["aten.complex.default", ["@float32 2x3", "@float32 2x3"], {}],
    ["aten.dot.default", ["@float32 3", "@float32 3"], {}],
    ["aten.embedding_bag.padding_idx", ["@float32 6x3", "@int64 4", "@int64 4", False, 1, False, None, False, None], {}],
    ["aten.fft_fft.default", ["@float32 2x3x4"], {"dim": 1}],
    ["aten.fft_fftn.default", ["@float32 2x3x4", [3, 4]], {}],
    ["aten.fft_fftshift.default", ["@float32 2x3x4", [-1]], {}],
    ["aten.fft_irfft2.default", ["@complex64 2x3x4"], {"dim": [0, -1]}],
    ["aten.fft_rfft2.default", ["@float32 2x3x4", [4, 8]], {}],
    ["aten.flatten.using_ints", ["@float32 2x3x4x5", -3, -2], {}],
    ["aten.grid_sampler.default", ["@float32 2x3x4x4", "@float32 2x5x5x2", 0, 0, False], {}],
    ["aten.index.Tensor", ["@float32 3x4x5", [None, "@bool 4x5"]], {}],
    ["aten.index.Tensor", ["@float32 3x4x5", [None, "@int64 2x3", None]], {}],
    ["aten.index.Tensor", ["@float32 3x4x5", ["@int64 2", None, "@int64 2"]], {}],
    ["aten.linalg_vector_norm.default", ["@float32 2x3x4", 2, [-1], True], {"dtype": "=torch.float64"}],
    ["aten.linalg_vector_norm.default", ["@float32 2x3x4", 1], {}],
    ["aten.logsumexp.default", ["@float32 2x3x4", [-2]], {}],
    ["aten.max.dim", ["@float32 2x3x4", -2], {"keepdim": True}],
    ["aten.mean.dim", ["@float32 2x3x4", None], {"keepdim": True}],
    ["aten.movedim.intlist", ["@float32 2x3x4", [-1, 0], [0, -1]], {}],
    ["aten.mv.default", ["@float32 2x3", "@float32 3"], {}],
    ["aten.narrow.default", ["@float32 6x4", 0, 1, 3], {}],
    ["aten.outer.default", ["@float32 2", "@float32 3"], {}],
    ["aten.permute.default", ["@float32 2x3x4x5", [0, -1, -3, -2]], {}],
    ["aten.pixel_shuffle.default", ["@float32 2x8x3x3", 2], {}],
    ["aten.polar.default", ["@float32 2x3", "@float32 2x3"], {}],
    ["aten.rsub.Scalar", ["@float32 2x3", 1.0, 2], {}],
    ["aten.select.int", ["@float32 2x3x4"], {"dim": -2, "index": -1}],
    ["aten.slice.Tensor", ["@float32 6x4", 0], {"start": -4, "end": 9223372036854775807, "step": 2}],
    ["aten.split.Tensor", ["@float32 7x4", 3], {"dim": -2}],
    ["aten.squeeze.dims", ["@float32 2x1x4x1", [-1, 0]], {}],
    ["aten.sum.dim_IntList", ["@float32 2x3x4", []], {}],
    ["aten.swapdims.default", ["@float32 2x3x4", -1, 0], {}],
    ["aten.tril.default", ["@float32 2x3x4"], {}],
    ["aten.triu.default", ["@float32 3x4", 1], {}],
    ["aten.unfold.default", ["@float32 2x7x3", 1, 3, 2], {}],
    ["aten.unflatten.int", ["@float32 2x12x3", -2, [3, -1]], {}],
    ["aten.vdot.default", ["@float32 3", "@float32 3"], {}],
    ["aten.view_as_complex.default", ["@float32 3x4x2"], {}],
    ["aten.view_as_real.default", ["@complex64 3x4"], {}],
    ["aten.where.ScalarSelf", ["@bool 2x3", 1.0, "@float32 2x3"], {}],
]
#: They only move numbers: each keeps its label wherever it goes, and none is pinned where one dimension alone has labels.
MOVES = frozenset(
    {
        *("alias", "clone", "contiguous", "detach", "expand", "expand_as", "flatten", "lift_fresh_copy", "movedim", "numpy_T"),
        *("permute", "repeat", "reshape", "swapaxes", "swapdims", "transpose", "t", "unflatten", "unsqueeze", "view"),
    }
)
#: What they hand on is pinned by their names: what becomes of a channel, few networks ask.
WITHOUT_A_RULE = frozenset({"diff", "histc", "meshgrid", "item"})
#: Their results hold whatever stood in memory before.
UNSET = frozenset({"empty", "empty_like", "new_empty"})


@cache
def operation(name: str) -> Any:
    """The operation of a name such as `aten.view.default`."""
    packet, _, overload = name.removeprefix("aten.").rpartition(".")
    return getattr(getattr(torch.ops.aten, packet), overload)


def short(name: str) -> str:
    return name.split(".")[1]


def given(value: Any, dice: torch.Generator, fill: int = 0) -> Any:
    """What a written argument stands for; whole numbers are all alike, so that they may be used as indices."""
    if isinstance(value, list):
        return [given(v, dice, fill) for v in value]
    if not isinstance(value, str) or value[:1] not in "@=":
        return value
    if value[0] == "=":
        return eval(value[1:], {"torch": torch, "cpu": torch.device("cpu")})
    dtype, _, sizes = value[1:].partition(" ")
    shape = tuple(map(int, sizes.split("x"))) if sizes else ()
    kind = getattr(torch, dtype)
    if kind.is_floating_point:
        return (torch.rand(shape, generator=dice, dtype=torch.float64) + 0.5).to(kind)
    return torch.rand(shape, generator=dice) > 0.5 if kind is torch.bool else torch.full(shape, fill, dtype=kind)


class Run:
    """A call of an operation on real tensors, as a node of a program whose inputs they are."""

    def __init__(self, call: Call) -> None:
        self.op, self.rule = operation(call[0]), RULES.get(short(call[0]), unknown)
        self.result: Any = None
        for fill in (0, 1):  # some divide by whole numbers, or count by them
            self.arguments = given(call[1], torch.Generator().manual_seed(0), fill)
            self.keywords = {k: given(v, torch.Generator().manual_seed(1), fill) for k, v in call[2].items()}
            self.tensors = [x for x in tree_leaves([self.arguments, self.keywords]) if isinstance(x, Tensor)]
            try:
                self.result = self.computed(self.tensors)
                break
            except (RuntimeError, IndexError):
                if fill:
                    raise
        graph = fx.Graph()
        self.nodes = [graph.placeholder(f"x{i}") for i in range(len(self.tensors))]
        for node, x in zip(self.nodes, self.tensors, strict=True):
            node.meta["val"] = x
        self.node = graph.call_function(self.op, *self.put(self.nodes))
        self.node.meta["val"] = self.result

    def put(self, what: list[Any]) -> tuple[Any, Any]:
        """The arguments and keywords with other things in the places of the tensors."""
        rest = iter(what)
        return tree_map(lambda a: next(rest) if isinstance(a, Tensor) else a, (tuple(self.arguments), self.keywords))

    def computed(self, tensors: list[Tensor]) -> Any:
        torch.manual_seed(0)
        arguments, keywords = self.put([x.clone() for x in tensors])
        return self.op(*arguments, **keywords)

    def followed(self, trace: Trace, values: list[Value]) -> list[Value]:
        """The values that the rule gives to the results."""
        arguments, keywords = self.put(values)
        made = self.rule(trace, self.node, *arguments, **keywords)
        return [v for v in (made if isinstance(made, list) else [made]) if isinstance(v, Value)]

    @property
    def results(self) -> list[Tensor]:
        return [x for x in tree_leaves(self.result) if isinstance(x, Tensor)]


def labelled(trace: Trace, x: Tensor) -> tuple[Any, ...]:
    return tuple(trace.labels.new(n) if n > 1 else FREE for n in x.shape)


def kinds_of_inputs(run: Run) -> Iterator[tuple[Trace, list[Value]]]:
    """All tensors with labels, as parameters and as results of others; without labels; and with sizes that fit or stay."""
    for exact in (True, False):
        trace = Trace({}, exact)
        yield trace, [Value(tuple(x.shape), labelled(trace, x)) for x in run.tensors]
    trace = Trace({})
    places = [tuple((f"w{i}", d) for d in range(x.dim())) for i, x in enumerate(run.tensors)]
    yield trace, [Value(tuple(x.shape), labelled(trace, x), p, True) for x, p in zip(run.tensors, places, strict=True)]
    for kind in (FIXED, FREE):
        yield Trace({}), [Value(tuple(x.shape), (kind,) * x.dim()) for x in run.tensors]


def fits(values: list[Value], results: list[Tensor]) -> None:
    """Each result has the dimensions that the rule says, and a label for each index of those that have labels."""
    assert [v.shape for v in values] == [tuple(x.shape) for x in results]
    for value in values:
        sizes = [d.size if isinstance(d, np.ndarray) else n for d, n in zip(value.dims, value.shape, strict=True)]
        assert sizes == list(value.shape) and len(value.dims) == len(value.shape)


def carries(run: Run, i: int, d: int) -> None:
    """What a channel changes carries its label, or the channel is pinned."""
    trace, x = Trace({}), run.tensors[i]
    labels = trace.labels.new(x.shape[d])
    values = [Value(tuple(t.shape), (FREE,) * t.dim()) for t in run.tensors]
    values[i] = Value(tuple(x.shape), tuple(labels if e == d else FIXED for e in range(x.dim())))
    made = [] if short(str(run.op)) in UNSET else run.followed(trace, values)
    found = trace.labels.components()
    of = found.of[labels]
    is_move = short(str(run.op)) in MOVES and not i  # what comes after the first tensor lends its sizes
    assert not (is_move and set(of.tolist()) & set(found.pinned)), found.pinned
    for number in dict.fromkeys([int(of[0]), int(of[-1])]):
        if number in found.pinned:
            continue
        changed = list(differing(run, i, d, np.flatnonzero(of == number)))
        for value, differs in zip(made, changed, strict=False):
            marked = torch.zeros(value.shape, dtype=torch.bool)
            for e, dim in enumerate(value.dims):
                if isinstance(dim, np.ndarray):
                    marked.index_fill_(e, torch.as_tensor(np.flatnonzero(found.numbers(dim) == number)), True)
            assert not bool((differs & ~marked).any()), f"{run.op} lets {i}.{d} out"
            assert not is_move or torch.equal(differs, marked)


def differing(run: Run, i: int, d: int, channels: Any) -> Iterator[Tensor]:
    """Where the results differ once some channels of a tensor have other values."""
    other = run.tensors[i].clone()
    part = other.index_select(d, torch.as_tensor(channels))
    other.index_copy_(d, torch.as_tensor(channels), ~part if part.dtype is torch.bool else part + 1)
    tensors = [other if j == i else x for j, x in enumerate(run.tensors)]
    try:
        again = [x for x in tree_leaves(run.computed(tensors)) if isinstance(x, Tensor)]
    except (RuntimeError, IndexError):  # numbers that were indices
        return
    for before, after in zip(run.results, again, strict=True):
        if before.shape == after.shape:  # else the values say how large the result is
            yield (before != after) & ~(before.isnan() & after.isnan())


def grouped(calls: list[Call]) -> dict[str, list[Call]]:
    found: dict[str, list[Call]] = {}
    for call in calls:
        found.setdefault(short(call[0]), []).append(call)
    return found


GROUPED = grouped([*CALLS, *MORE])


@pytest.mark.parametrize("name", sorted(GROUPED.keys() - {"_assert_tensor_metadata"}))
def test_a_rule_knows_the_dimensions_of_what_torch_makes_and_where_its_channels_go(name: str) -> None:
    for call in GROUPED[name]:
        run = Run(call)
        for trace, values in kinds_of_inputs(run):
            fits(run.followed(trace, values), run.results)
        for i, x in enumerate(run.tensors):
            for d in (d for d, n in enumerate(x.shape) if n > 1):
                carries(run, i, d)


def test_every_operation_of_the_networks_has_a_rule() -> None:
    assert {name for name in grouped(CALLS) if name not in RULES} <= WITHOUT_A_RULE


def test_a_rule_that_moves_labels_wrongly_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RULES, "transpose", lambda trace, node, x, a, b: Value(tuple(node.meta["val"].shape), x.dims))
    with pytest.raises(AssertionError):
        fits(*found_in(["aten.transpose.int", ["@float32 2x3", 0, 1], {}]))
    with pytest.raises(AssertionError, match=r"lets 0\.0 out"):
        carries(Run(["aten.transpose.int", ["@float32 3x3", 0, 1], {}]), 0, 0)


def found_in(call: Call) -> tuple[list[Value], list[Tensor]]:
    run = Run(call)
    trace, values = next(kinds_of_inputs(run))
    return run.followed(trace, values), run.results


def test_of_calls_of_one_form_the_smallest_is_kept() -> None:
    calls: list[Call] = [["aten.relu.default", [f"@float32 {n}x3"], {}] for n in (5, 2, 9)]
    assert merged(calls) == [calls[1]]
    assert form("@float32 2x3") == form("@float64 7x1") != form("@int64 2x3") and form([1, -1]) != form([1, 2])
