"""Traces of code that decides by sizes: ways, places, what is handed on, functions that are left whole elsewhere."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Graph, Interpreter, _symbolic_trace

from fasterai.prune.surgery.forks import Tree, cut_at, fork_at_end, holds_wholes, operations, traced_way
from fasterai.prune.surgery.rewriting import Edit
from fasterai.prune.surgery.tracing import UntraceableError


def whole(x: Tensor, n: int) -> Tensor:
    return x * n if x.shape[0] > 2 else x + n


torch.fx.wrap("whole")


class Deciding(nn.Module):
    """Two decisions by sizes, and a function that `torch.fx` leaves whole."""

    def forward(self, x: Tensor) -> Tensor:
        y = whole(x, 3)
        if x.shape[1] % 2:
            y = F.pad(y, (0, 1))
        return y.sin()


def ways(module: nn.Module, *decisions: tuple[Any, ...]) -> list[Graph]:
    return [traced_way(module, {}, False, way) for way in decisions]


def test_a_trace_ends_at_the_first_decision_that_it_is_not_given() -> None:
    first, second, last = ways(Deciding(), (), (True,), (True, False))
    assert [fork_at_end(graph) is None for graph in (first, second, last)] == [False, False, True]
    assert not any("mul" in node.name for node in first.nodes) and any("mul" in node.name for node in second.nodes)
    x = torch.randn(3, 4)
    assert torch.equal(Interpreter(nn.Module(), graph=last).run(x), Deciding()(x))
    assert str(cut_at(last, 0)) == str(first) and str(cut_at(last, 1)) == str(second)


def test_an_operation_has_the_same_name_on_all_ways() -> None:
    with_pad, without = (dict.fromkeys(n.name for n in g.nodes) for g in ways(Deciding(), (True, True), (True, False)))
    assert [name for name in with_pad if name not in without] == [name for name in with_pad if name.startswith("pad_at")]
    assert [name for name in without if name not in with_pad] == []
    (sin,) = (name for name in without if name.startswith("sin"))
    assert sin in {n.name for n in ways(Deciding(), (False, True))[0].nodes}


class Twice(nn.Module):
    """One place in the code, from two places."""

    def half(self, x: Tensor) -> Tensor:
        return x / 2

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] > 2:
            x = self.half(x) + 1
        return self.half(x)


def test_a_function_that_is_called_at_two_places_has_operations_of_two_names() -> None:
    both, one = ([n.name for n in g.nodes if "div" in n.name] for g in ways(Twice(), (True,), (False,)))
    assert len(both) == 2 and one == both[1:]


def test_functions_are_left_whole_for_others_as_before_even_where_a_trace_fails() -> None:
    before, function = list(_symbolic_trace._wrapped_fns_to_patch.items()), whole

    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("no way")

    ways(Deciding(), (True, True))
    with pytest.raises(UntraceableError, match="no way"):
        ways(Broken(), ())
    assert list(_symbolic_trace._wrapped_fns_to_patch.items()) == before and whole is function
    usual = torch.fx.Tracer().trace(Whole())
    assert holds_wholes(usual) and not holds_wholes(ways(Deciding(), (True, True))[0])


class Whole(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return whole(x, 3)


def test_a_trace_inside_of_another_goes_into_functions_too() -> None:
    found: list[Graph] = []

    class Outer(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            found.extend(ways(Whole(), (True,)))
            return whole(x, 3)

    outer = torch.fx.Tracer().trace(Outer())
    assert holds_wholes(outer) and not holds_wholes(found[0])


class ByValue(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class ByArgument(nn.Module):
    def forward(self, x: Any) -> Any:
        return x + 1 if x else x


def test_decisions_by_values_are_refused() -> None:
    with pytest.raises(UntraceableError, match="cannot be used as inputs to control flow"):
        ways(ByValue(), ())
    tree = Tree(ByArgument(), {}, (), [(True,)], False)
    assert tree.run(ByArgument(), (2,), {}) == 3
    with pytest.raises(UntraceableError, match="decides by the values of tensors"):
        tree.run(ByArgument(), (torch.ones(1),), {})


class Counting(nn.Module):
    """A whole number, and a walk over sizes."""

    def forward(self, x: Tensor) -> Tensor:
        side = int(x.shape[1] ** 0.5)
        total = 0
        for size in x.shape:
            total = total + size
        made = x.new_zeros(x.shape)
        made[:, :2] = side
        return made + total


def test_whole_numbers_and_walks_are_decisions_as_well() -> None:
    tree = Tree(Counting(), {}, (), [(3, 2)], False)
    for n in (9, 15, 4):  # 4 has another root: a way of its own, of the same operations
        x = torch.randn(2, n)
        assert torch.equal(tree.run(Counting(), (x,), {}), Counting()(x))


class Long(nn.Module):
    """A decision after a large tensor that is not used any more."""

    def forward(self, x: Tensor) -> Tensor:
        large = x.exp()
        y = large.sum(1)
        del large
        return y + 1 if x.shape[0] > 1 else y


def test_a_fork_hands_on_what_the_code_still_holds() -> None:
    (graph,) = ways(Long(), ())
    fork = fork_at_end(graph)
    assert fork is not None
    names = [node.name for node in fork.args[1]]
    assert any("sum" in name for name in names) and not any("exp" in name for name in names)
    tree, x = Tree(Long(), {}, (), [(True,), (False,)], False), torch.randn(1, 3)
    assert torch.equal(tree.run(Long(), (x,), {}), Long()(x))


def test_edits_are_made_on_each_way() -> None:
    module, x = Deciding(), torch.ones(3, 3)
    (graph,) = ways(module, (True, True))
    (pad,) = (node.name for node in graph.nodes if node.name.startswith("pad"))
    tree = Tree(module, {}, (Edit(pad, "size", ("args", 1, 1), 1, 2),), [(True, True)], False)
    assert tree.run(module, (x,), {}).shape == (3, 5) and tree.run(module, (torch.ones(3, 2),), {}).shape == (3, 2)
    with pytest.raises(ValueError, match="inputs must have sizes at which Deciding goes a way that its removal was checked on"):
        tree.run(module, (torch.ones(1, 3),), {})
    with pytest.raises(ValueError, match="nowhere is no operation"):
        Tree(module, {}, (Edit("nowhere", "size", ("args", 1), 1, 2),), [(True, True)], False)
    for wrong in ((True,), (True, True, True)):
        with pytest.raises(UntraceableError, match="decisions than"):
            Tree(module, {}, (), [wrong], False)


class Looping(nn.Module):
    """A decision that is taken several times: what is the first time on one way is the second on another."""

    def forward(self, x: Tensor) -> Tensor:
        for i in range(2):
            if x.shape[i] > 2:
                x = x * (i + 2)
        return x


def test_a_loop_of_decisions_takes_only_ways_that_were_checked() -> None:
    tree = Tree(Looping(), {}, (), [(True, True)], False)
    assert torch.equal(tree.run(Looping(), (torch.ones(3, 3),), {}), torch.full((3, 3), 6.0))
    with pytest.raises(ValueError, match="a decision is taken several times"):
        tree.run(Looping(), (torch.ones(1, 3),), {})


def test_modes_are_compared_without_what_nobody_reads() -> None:
    class Unread(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if not self.training:
                _ = x.shape[1]
            return x.sin() if x.shape[0] else x

    eval_mode, training = (traced_way(Unread(), {}, mode, (True,)) for mode in (False, True))
    assert operations(eval_mode) == operations(training)


def test_a_trace_keeps_no_module_alive() -> None:
    module = Deciding()
    tree, gone = Tree(module, {}, (), [(True, True)], False), weakref.ref(module)
    del module
    gc.collect()
    assert gone() is None and tree is not None


class ByDims(nn.Module):
    """A recipe for each number of dimensions, as einops' layers have."""

    def __init__(self) -> None:
        super().__init__()
        self.recipes = {2: (0, 1), 3: (0, 2, 1)}

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(self.recipes[x.dim()]).reshape(x.shape[0], self.recipes[x.ndim][-1] * 4, -1)


def test_things_looked_up_by_the_number_of_dimensions_are_decisions() -> None:
    (graph,) = ways(ByDims(), (3, 3))
    x = torch.randn(2, 5, 4)
    assert fork_at_end(graph) is None
    assert torch.equal(Interpreter(nn.Module(), graph=graph).run(x), ByDims()(x))
    tree = Tree(ByDims(), {}, [], [(3, 3), (2, 2)], False)
    for inputs in (x, torch.randn(3, 8)):
        assert torch.equal(tree.run(ByDims(), (inputs,), {}), ByDims()(inputs))


class Cyclic(nn.Module):
    """A size in a cycle, which Python collects at some time or other: here in the first trace alone."""

    traces = 0

    def forward(self, x: Tensor) -> Tensor:
        box = [x.shape[0] < 3]
        box.append(box)  # type: ignore[arg-type]
        del box
        Cyclic.traces += 1
        if Cyclic.traces == 1:
            gc.collect()
        y = x * 2 if x.shape[1] > 4 else x
        return y + 1 if x.shape[1] > 2 else y


def test_what_is_held_by_chance_is_not_handed_on() -> None:
    gc.disable()
    try:
        tree = Tree(Cyclic(), {}, [], [(True, True), (False, True), (False, False)], False)
    finally:
        gc.enable()
    for width in (6, 3, 2):
        x = torch.randn(2, width)
        assert torch.equal(tree.run(Cyclic(), (x,), {}), Cyclic()(x))
