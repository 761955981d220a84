"""Removals repeated: plans that were carried out on one model are carried out on a fresh one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from fasterai.core.saved import (
    Check,
    check_parts,
    counts,
    equal_to,
    finite_tensors,
    fraction,
    list_of,
    mapping_of,
    text,
    texts,
    whole,
)
from fasterai.graph.inputs import InputCut
from fasterai.model.cuts import announce
from fasterai.prune.surgery.operate import Surgery
from fasterai.prune.surgery.plan import Plan, tensor_of, tensors_of
from fasterai.prune.surgery.rewriting import Rewrite
from fasterai.units.looks import check_looks

__all__ = ["GRADUAL_FORMAT", "Shapes", "read_state", "replay", "shapes_of"]

GRADUAL_FORMAT = "fasterai-gradual-1"
Shapes = dict[str, tuple[int, ...]]


def shapes_of(model: nn.Module) -> Shapes:
    """Return the shapes of a model's parameters and buffers, tied ones under their first name."""
    tensors = tensors_of(model)
    return {name: tuple(tensor_of(tensors, name).shape) for name in tensors}


def read_state(state: Mapping[str, Any]) -> tuple[list[Plan], Shapes]:
    """Read the plans and the shapes of the model from a `GradualPruner`'s state.

    Raises:
        ValueError: It is no such state, or a part of it is out of range.
        TypeError: A part is of the wrong type.
    """
    check_parts(state, "GradualPruner", PARTS, {"settings": mapping_of(text)})
    shapes = {name: tuple(shape) for name, shape in state["shapes"].items()}
    if state["pruner"]:
        earlier: dict[str, Check] = dict.fromkeys(("initial", "previous"), finite_tensors)
        check_parts(
            state["pruner"], "Pruner", {"original": mapping_of(whole), **earlier}, {"alone": texts, "looks": check_looks}
        )
        for part in ("initial", "previous"):
            for name, weight in state["pruner"][part].items():
                if tuple(weight.shape) != shapes.get(name):
                    raise ValueError(f"state's {part} weights must be of its shapes, got {tuple(weight.shape)} for {name}")
    return [_plan(data) for data in state["plans"]], shapes


def _plan(data: Mapping[str, Any]) -> Plan:
    """Read a plan, every number of which is one, and whose indices rise within what there was."""
    check_parts(data, "GradualPruner", PLAN, LATER)
    for name, d, kept in data["keep"]:
        shape = data["shapes"].get(name, ())
        if d >= len(shape) or not kept or kept[-1] >= shape[d] or any(a >= b for a, b in itertools.pairwise(kept)):
            raise ValueError(
                f"state's plans must keep rising indices of {name} along one of {tuple(shape)}, got {kept} along {d}"
            )
    return Plan.from_dict(data)


def _input(what: str, value: Any) -> None:
    InputCut.from_dict(value)


def _rewrite(what: str, value: Any) -> None:
    Rewrite.from_dict(value)


def _kept(what: str, value: Any) -> None:
    if not isinstance(value, list | tuple) or len(value) != 3 or not isinstance(value[0], str):
        raise TypeError(f"{what} must be [name, dimension, indices], got {value!r}")
    whole(what, value[1])
    counts(what, value[2])


def _attribute(what: str, value: Any) -> None:
    if not isinstance(value, list | tuple) or len(value) != 4 or not all(isinstance(x, str) for x in value[:2]):
        raise TypeError(f"{what} must be [module, attribute, value before, value after], got {value!r}")


def _factor(what: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{what} must be a number, got {value!r} ({type(value).__name__})")
    if not 0 < value < math.inf:
        raise ValueError(f"{what} must be a finite number above 0, got {value!r}")


def _pair(what: str, value: Any) -> None:
    counts(what, value)
    if len(value) != 2 or value[1] > value[0]:
        raise ValueError(f"{what} must be the channels at first and now, which are no more, got {value!r}")


def _dict(what: str, value: Any) -> None:
    if not isinstance(value, Mapping):
        raise TypeError(f"{what} must be a dict, got {value!r} ({type(value).__name__})")


PLAN: Mapping[str, Check] = {
    "shapes": mapping_of(counts),
    "keep": list_of(_kept),
    "attributes": list_of(_attribute),
    "slim": mapping_of(whole),
}


LATER: Mapping[str, Check] = {"scales": mapping_of(_factor), "inputs": list_of(_input), "rewrites": mapping_of(_rewrite)}
PARTS: Mapping[str, Check] = {
    "format": equal_to(GRADUAL_FORMAT),
    "plans": list_of(_dict),
    "shapes": mapping_of(counts),
    "channels": mapping_of(_pair),
    "done": fraction,
    "pruner": _dict,
}


def replay(
    model: nn.Module, plans: Sequence[Plan], shapes: Shapes, optimizer: Any, copies: Callable[[], Sequence[nn.Module]]
) -> list[list[Surgery]]:
    """Carry out those plans that a model has not had yet.

    Args:
        model: The model, as dense as it was at first or as after some of the plans; changed in place.
        plans: The plans that were carried out, in order.
        shapes: The shapes of the model after all of them.
        optimizer: The optimizer whose state is cut alike.
        copies: A function that returns the modules that are cut alike.

    Returns:
        For each plan the surgeries, to take them back.

    Raises:
        ValueError: The model is another one, or smaller than the state's. Nothing is changed then.
    """
    done: list[list[Surgery]] = []
    try:
        for plan in plans[_had(model, plans, shapes) :]:
            done.append([Surgery(other, plan) for other in copies()])
            done[-1].append(Surgery(model, plan, optimizer))
        _check_shapes(shapes_of(model), shapes)
    except BaseException:
        for surgery in reversed([s for surgeries in done for s in surgeries]):
            surgery.undo()
        raise
    for plan in plans[len(plans) - len(done) :]:
        announce(model, plan.cut)
    return done


def _had(model: nn.Module, plans: Sequence[Plan], shapes: Shapes) -> int:
    """Count the plans that were carried out on a model already, by its shapes."""
    own = shapes_of(model)
    expected = dict(shapes)
    for count in range(len(plans), -1, -1):
        if own == expected:
            return count
        if count:
            expected |= {name: tuple(shape) for name, shape in plans[count - 1].shapes.items()}
    _check_shapes(own, expected)
    raise AssertionError


def _check_shapes(own: Shapes, expected: Shapes) -> None:
    wrong = [name for name in [*expected, *own] if own.get(name) != expected.get(name)]
    if wrong:
        there, here = expected.get(wrong[0], "missing"), own.get(wrong[0], "missing")
        raise ValueError(
            f"state must be of this model as it was before anything was taken out, or of a smaller one, got one where "
            f"{wrong[0]} is {there}, here {here}; build the model anew"
        )
