"""Removals repeated: plans that were carried out on one model are carried out on a fresh one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from fasterai.model.cuts import announce
from fasterai.prune.surgery.operate import Surgery
from fasterai.prune.surgery.plan import Plan, tensor_of, tensors_of

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
        ValueError: It is no such state.
    """
    keys = ("format", "plans", "shapes", "channels", "done", "pruner")
    missing = [key for key in keys if not isinstance(state, Mapping) or key not in state]
    if missing:
        raise ValueError(f"state must be what GradualPruner.state_dict() returned, got one without {', '.join(missing)}")
    if state["format"] != GRADUAL_FORMAT:
        raise ValueError(f"state's format must be {GRADUAL_FORMAT}, got {state['format']!r}")
    return [Plan.from_dict(p) for p in state["plans"]], {name: tuple(shape) for name, shape in state["shapes"].items()}


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
        announce(model, plan.keep)
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
