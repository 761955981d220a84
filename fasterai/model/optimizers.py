"""State that an optimizer keeps for a parameter, cut along with the parameter."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, MutableMapping, Sequence
from itertools import combinations, product
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from fasterai.core.checks import warn
from fasterai.model.cuts import check_trains, kept_slices

__all__ = ["averages_of", "check_optimizer", "check_trained", "clear_entries_", "cut_entry", "states_of", "strange_keys"]

#: Where wrappers of optimizers (fastai's, Lightning's, Accelerate's, timm's) hold what they wrap.
INNER = ("opt", "optimizer", "_optimizer", "optimizers", "_base_optimizer")
STEP_SIZES = frozenset({"step_size"})  # of each weight (Rprop): no memory of gradients, and never 0
Kept = Mapping[int, np.ndarray[Any, np.dtype[np.int64]]]  # dimension of a parameter -> the indices that stay


def states_of(optimizer: Any) -> list[MutableMapping[Any, Any]]:
    """List the states (parameter -> entry) of an optimizer, of what it wraps, or of several in a list; each once."""
    return list({id(state): state for one in _unwrapped(optimizer) if (state := _state(one)) is not None}.values())


def averages_of(optimizer: Any) -> dict[Tensor, Tensor]:
    """Return parameter -> average that an optimizer keeps apart from its state, as fastai's Lookahead its slow weights."""
    return {
        parameter: average
        for one in _unwrapped(optimizer)
        for averages, group in zip(getattr(one, "slow_weights", None) or (), _groups(one), strict=False)
        for average, parameter in zip(averages, group["params"], strict=False)
    }


def check_optimizer(optimizer: Any) -> None:
    """Refuse an optimizer whose state cannot be cut; several in a list, and None, are allowed.

    Raises:
        TypeError: It keeps no state by parameter.
        ValueError: It keeps one state for all parameters at once, as LBFGS does.
    """
    found = list(_unwrapped(optimizer))
    if found and not states_of(optimizer):
        kind = type(optimizer).__name__
        raise TypeError(f"optimizer must be torch's or fastai's, with a state for each parameter, got {optimizer!r} ({kind})")
    if any(isinstance(one, torch.optim.LBFGS) for one in found):
        raise ValueError(
            "optimizer must keep a state for each parameter, got LBFGS, which has one for all; make a new one after the removal"
        )


def check_trained(model: nn.Module, optimizer: Any) -> None:
    """Refuse an optimizer, or several, that train another model.

    Raises:
        ValueError: They hold none of the model's parameters.
    """
    check_trains(
        optimizer,
        model.parameters(),
        "the model that channels go from",
        f"the parameters of this {type(model).__name__}",
    )


@torch.no_grad()
def clear_entries_(optimizer: Any, places: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Set what an optimizer, or several in a list, keeps for single weights to zero: momentum, moments, slow averages.

    What is kept for many weights at once (counts of steps, factored moments, preconditioners) or in codes is unchanged.

    Args:
        optimizer: The optimizer, wrapped or not.
        places: (parameter, bool of its shape: True = clear).
    """
    averages = averages_of(optimizer)
    for state in states_of(optimizer):
        shared = strange_keys(state) | STEP_SIZES
        for parameter, where in places:
            kept = [value for key, value in (state.get(parameter) or {}).items() if key not in shared]
            for value in (*kept, averages.get(parameter)):
                if isinstance(value, Tensor) and value.shape == parameter.shape and value.is_floating_point():
                    value.masked_fill_(where, 0.0)


def _groups(optimizer: Any) -> Iterable[Mapping[str, Any]]:
    groups: Iterable[Mapping[str, Any]] = getattr(optimizer, "param_groups", ())
    return groups


def _unwrapped(optimizer: Any) -> Iterator[Any]:
    stack, seen = [optimizer], set()
    while stack:
        one = stack.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, list | tuple):
            stack += one
            continue
        yield one
        stack += [vars(one).get(name) for name in INNER] if hasattr(one, "__dict__") else []


def _state(optimizer: Any) -> MutableMapping[Any, Any] | None:
    state = getattr(optimizer, "state", None)
    return state if isinstance(state, MutableMapping) else None


def strange_keys(state: Mapping[Any, Any]) -> set[str]:
    """Find the keys of a state under which a tensor has a shape that is not its parameter's, as preconditioners have."""
    return {
        key
        for parameter, entry in state.items()
        if isinstance(parameter, Tensor)
        for key, value in entry.items()
        if any(_is_tensor(one) and not _readings(one.shape, parameter.shape) for one in tree_leaves(value))
    }


def cut_entry(
    entry: Mapping[str, Any], name: str, shape: Sequence[int], kept: Kept, strange: Collection[str] = ()
) -> dict[str, Any]:
    """Cut an optimizer's entry for a parameter as the parameter is cut; return {} with a warning if that is unclear.

    A tensor of the parameter's shape is cut as it is; one with 1 for some of its sizes (factored second moments), or with
    some of its dimensions, along those that it has; a number is left alone. An entry without one of its parts would break the
    optimizer's next step, so an entry that cannot be cut starts anew as a whole.

    Args:
        entry: The entry; not changed.
        name: The parameter's name, for the warning.
        shape: The parameter's shape before the cut.
        kept: Dimension of the parameter -> the indices that stay.
        strange: The `strange_keys` of the state. The preconditioner of a square matrix has the matrix's shape, and is one of
            rows by rows or of columns by columns: so under these keys a dimension may be any of its size.
    """
    strangers: list[str] = []

    def cut(key: str, value: Any) -> Any:
        if not _is_tensor(value):
            return value
        dims = _dims(value.shape, shape, kept, key in strange)
        if dims is None:
            strangers.append(f"{key} {tuple(value.shape)}")
            return value
        return kept_slices(value.detach(), {i: kept[d] for i, d in dims.items() if d in kept})

    result = {key: tree_map(lambda v, key=key: cut(key, v), value) for key, value in entry.items()}
    if not strangers:
        return result
    warn(
        f"optimizer's state of {name} {tuple(shape)} cannot be cut, because of its {', '.join(strangers)}: this state is reset"
    )
    return {}


def _is_tensor(value: Any) -> bool:
    """Tell if a value is a tensor of several entries, not a number or a tensor of one."""
    return isinstance(value, Tensor) and value.numel() > 1


def _dims(own: Sequence[int], shape: Sequence[int], kept: Kept, is_strange: bool) -> dict[int, int] | None:
    """Match a tensor's dimensions to the parameter's: dimension of the tensor -> of the parameter; None if unclear."""
    readings = _readings(own, shape)
    if is_strange:
        alike = [[e for e, m in enumerate(shape) if m == n] for n in shape]
        readings = [dict(zip(r, c, strict=True)) for r in readings for c in product(*(alike[d] for d in r.values()))]
    # Several readings are one where the same indices stay in all of them.
    effects = {tuple(kept[d].tobytes() if d in kept else b"" for d in reading.values()) for reading in readings}
    return readings[0] if len(effects) == 1 else None


def _readings(own: Sequence[int], shape: Sequence[int]) -> list[dict[int, int]]:
    """List every way to match a tensor's dimensions, in order, to dimensions of a parameter of a shape.

    >>> _readings((3,), (4, 3))  # a vector of 3 goes with the columns of a (4, 3) weight
    [{0: 1}]
    >>> _readings((3,), (3, 3))  # or, of a square one, with its rows
    [{0: 0}, {0: 1}]
    """
    if len(own) == len(shape):
        pairs = list(zip(own, shape, strict=True))
        return [{d: d for d, (n, m) in enumerate(pairs) if n == m}] if all(n in (1, m) for n, m in pairs) else []
    choices = combinations(range(len(shape)), len(own))
    return [dict(enumerate(c)) for c in choices if all(n == shape[d] for n, d in zip(own, c, strict=True))]
