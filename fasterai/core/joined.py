"""Extra parameters in an existing optimizer, such as the adapters of a distiller that train along with the model.

They join the last parameter group, so that every scheduler treats them as it treats that group: a group of their own would have
no place in the lists that schedulers have made. What the optimizer saves stays what it saves without them; their own state is
saved with the loop's.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, MutableSequence, Sequence
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

__all__ = ["Joined", "innermost"]

#: Optimizers -> what has joined them, in that order: several loops may train with one, such as those of two callbacks.
_here: WeakKeyDictionary[Any, list[ref[Joined]]] = WeakKeyDictionary()


def innermost(optimizer: Any) -> Any:
    """Return the optimizer inside wrappers such as Accelerate's or torch's `PostLocalSGDOptimizer`; a bare one unchanged.

    Wrappers may be optimizers by their class; only a real one has torch's hooks.
    """
    seen: set[int] = set()
    while "_optimizer_step_pre_hooks" not in getattr(optimizer, "__dict__", {}) and id(optimizer) not in seen:
        seen.add(id(optimizer))
        inner = (getattr(optimizer, name, None) for name in ("optimizer", "optim", "opt"))
        optimizer = next((one for one in inner if hasattr(one, "step")), optimizer)
    return optimizer


class Joined:
    """Parameters that train with an existing optimizer until they leave it.

    Args:
        optimizer: torch's, fastai's, or a wrapper of one.
        parameters: Leaves that require gradients, none of which the optimizer has.
        owners: A name for each, by which their states are found again; by default they are one list.

    Raises:
        TypeError: The optimizer has no parameter groups, or mixes all its parameters in one vector, as LBFGS does.
        ValueError: One of the parameters is in the optimizer already.
    """

    def __init__(self, optimizer: Any, parameters: Sequence[nn.Parameter], owners: Sequence[str] = ()) -> None:
        self.parameters = list(parameters)
        self.owners = list(owners) or [""] * len(self.parameters)
        self._optimizer = innermost(optimizer)
        group = _lists(self._optimizer)[-1]
        _check_new(self._optimizer, self.parameters)
        group.extend(self.parameters)
        self._hooks = []
        if isinstance(self._optimizer, torch.optim.Optimizer):
            self._hooks.append(self._optimizer.register_state_dict_post_hook(self._without))
            self._hooks.append(self._optimizer.register_load_state_dict_pre_hook(self._with))
        else:  # fastai's has no hooks
            self._optimizer.state_dict, self._optimizer.load_state_dict = self._fastai_without, self._fastai_load
            for p in self.parameters:
                self._optimizer.state.setdefault(p, {})
        _here.setdefault(self._optimizer, []).append(ref(self))

    def leave(self) -> None:
        """Remove the parameters and their state from the optimizer."""
        for hook in self._hooks:
            hook.remove()
        left = [one for one in self._company() if one is not self]
        _here[self._optimizer] = [ref(one) for one in left]
        for name in ("state_dict", "load_state_dict") if not left else ():
            vars(self._optimizer).pop(name, None)
        if left and not self._hooks:
            self._optimizer.state_dict, self._optimizer.load_state_dict = left[0]._fastai_without, left[0]._fastai_load
        self._withdraw(self.parameters)
        for p in self.parameters:
            self._optimizer.state.pop(p, None)

    def moved(self, optimizer: Any) -> Joined:
        """Go over, with the state, to an optimizer that has taken the other's place; itself if it is the same."""
        if innermost(optimizer) is self._optimizer:
            return self
        state = self.state_dict()
        self.leave()
        other = Joined(optimizer, self.parameters, self.owners)
        other.load_state_dict(state)
        return other

    def extended(self, parameters: Sequence[nn.Parameter], owners: Sequence[str]) -> Joined:
        """Take further parameters along; those that are there keep their state.

        Raises:
            ValueError: One of them is in the optimizer already; nothing is changed then.
        """
        _check_new(self._optimizer, parameters)
        kept = [self._optimizer.state.get(p, {}) for p in self.parameters]
        self.leave()
        other = Joined(self._optimizer, [*self.parameters, *parameters], [*self.owners, *owners])
        self._optimizer.state.update({p: own for p, own in zip(self.parameters, kept, strict=True) if own})
        return other

    def _company(self) -> list[Joined]:
        """List what has joined the same optimizer; the first one answers for all where the optimizer is saved or loaded."""
        return [found for one in _here.get(self._optimizer, ()) if (found := one()) is not None] or [self]

    def _guests(self) -> list[nn.Parameter]:
        return [p for one in self._company() for p in one.parameters]

    def _is_guest(self) -> list[list[bool]]:
        """Tell of each parameter in each group if it has joined; groups may have been added since."""
        guests = {id(p) for p in self._guests()}
        return [[id(p) in guests for p in group] for group in _lists(self._optimizer)]

    def _withdraw(self, parameters: Sequence[nn.Parameter]) -> None:
        gone = {id(p) for p in parameters}
        for group in _lists(self._optimizer):
            group[:] = [p for p in group if id(p) not in gone]

    def clear_gradients(self) -> None:
        """Set the gradients to None, since a loop that clears the model's gradients does not know these parameters."""
        for p in self.parameters:
            p.grad = None

    def clear_left_over(self, _: Tensor) -> None:
        """Set the gradients to None as a backward pass begins, if the optimizer's other parameters have none.

        A GradScaler that skips a step tells nobody. A loop that then clears the model's gradients leaves these, infinite, and
        no later step would be taken.
        """
        guests = {id(p) for p in self._guests()}
        if not any(p.grad is not None for group in _lists(self._optimizer) for p in group if id(p) not in guests):
            self.clear_gradients()

    def state_dict(self) -> dict[str, Any]:
        """Return copies of the optimizer's state of each parameter, in order, and their owners."""
        states = [_copied(self._optimizer.state.get(p, {})) for p in self.parameters]
        return {"states": states, "owners": list(self.owners)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a saved state: copies. Parameters of owners that it does not know begin afresh.

        Raises:
            ValueError: It is of another number of parameters of an owner.
        """
        states, owners = state["states"], state.get("owners")
        if owners is None and len(states) != len(self.parameters):  # one of before, in the order of the parameters
            raise ValueError(f"state must be of {len(self.parameters)} joined parameters, got {len(states)}")
        saved: dict[str, list[Any]] = {}
        for owner, own in zip(owners or self.owners, states, strict=True):
            saved.setdefault(owner, []).append(own)
        for owner, found in saved.items():
            count = self.owners.count(owner)
            if count not in {0, len(found)}:
                raise ValueError(f"state must be of {count} joined parameters of {owner}, got {len(found)}")
        for p, owner in zip(self.parameters, self.owners, strict=True):
            self._optimizer.state[p] = _copied(saved[owner].pop(0) if owner in saved else {}, p.device)

    def _without(self, _: Any, state: dict[str, Any]) -> dict[str, Any]:
        """Return what the optimizer saves, less what has joined it, numbered as if that had never been there."""
        if self._company()[0] is not self:
            return state
        kept = [
            [i for i, own in zip(group["params"], mine, strict=True) if not own]
            for group, mine in zip(state["param_groups"], self._is_guest(), strict=True)
        ]
        number = {i: n for n, i in enumerate(i for group in kept for i in group)}
        states = {number.get(k, k): v for k, v in state["state"].items() if k in number or not isinstance(k, int)}
        groups = [{**group, "params": [number[i] for i in own]} for group, own in zip(state["param_groups"], kept, strict=True)]
        return {**state, "state": states, "param_groups": groups}

    def _fastai_without(self) -> dict[str, Any]:
        """Return what fastai's optimizer saves, less what has joined it."""
        state: dict[str, Any] = type(self._optimizer).state_dict(self._optimizer)
        mine = [own for group in self._is_guest() for own in group]
        return {**state, "state": [s for s, own in zip(state["state"], mine, strict=True) if not own]}

    def _fastai_load(self, state: Mapping[str, Any]) -> None:
        """Load a state without these parameters into fastai's optimizer; the parameters keep their own state."""
        own = {p: self._optimizer.state[p] for p in self._guests()}
        lists, before = _lists(self._optimizer), [list(group) for group in _lists(self._optimizer)]
        self._withdraw([*own])
        try:
            type(self._optimizer).load_state_dict(self._optimizer, state)
        finally:
            for group, parameters in zip(lists, before, strict=True):
                group[:] = parameters
            self._optimizer.state.update(own)

    def _with(self, _: Any, state: dict[str, Any]) -> dict[str, Any] | None:
        """Return what the optimizer loads, with what has joined it as that is now."""
        mine, saved = self._is_guest(), state["param_groups"]
        if self._company()[0] is not self or [len(group["params"]) for group in saved] != [
            group.count(False) for group in mine
        ]:
            return None
        numbers = itertools.count(1 + max((i for group in saved for i in group["params"]), default=-1))
        states, groups = dict(state["state"]), []
        for group, own, parameters in zip(saved, mine, _lists(self._optimizer), strict=True):
            known = iter(group["params"])
            ids = [next(numbers) if added else next(known) for added in own]
            groups.append({**group, "params": ids})
            added_here = ((i, self._optimizer.state.get(p)) for i, p, added in zip(ids, parameters, own, strict=True) if added)
            states.update({i: kept for i, kept in added_here if kept})
        return {**state, "state": states, "param_groups": groups}


def _lists(optimizer: Any) -> list[MutableSequence[nn.Parameter]]:
    """Return the lists of parameters that the optimizer itself reads; fastai's makes its groups anew at each look."""
    lists = getattr(optimizer, "param_lists", None)
    if lists is None:
        groups = getattr(optimizer, "param_groups", None)
        if not groups:
            raise TypeError(f"optimizer must have param_groups for further parameters, got {type(optimizer).__name__}")
        if isinstance(optimizer, torch.optim.LBFGS):
            raise TypeError("optimizer must treat each parameter alone where further ones are to train, got LBFGS")
        lists = [group["params"] for group in groups]
    return list(lists)


def _check_new(optimizer: Any, parameters: Sequence[nn.Parameter]) -> None:
    there = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for p in parameters:
        if id(p) in there:
            raise ValueError(f"parameters to train must be new to the optimizer, got one of shape {tuple(p.shape)} twice")
        there.add(id(p))


def _copied(state: Mapping[str, Any], device: torch.device | None = None) -> dict[str, Any]:
    return {k: _copy(v, device) for k, v in state.items()}


def _copy(value: Any, device: torch.device | None) -> Any:
    if not isinstance(value, Tensor):
        return value
    # Counts of steps are scalars that stay on the CPU.
    return value.clone() if device is None or value.dim() == 0 else value.to(device, copy=True)
