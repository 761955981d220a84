"""Extra parameters in an existing optimizer, such as the adapters of a distiller that train along with the model.

They join the last parameter group, so that every scheduler treats them as it treats that group: a group of their own would have
no place in the lists that schedulers have made. What the optimizer saves stays what it saves without them; their own state is
saved with the loop's.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableSequence, Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Joined", "innermost"]


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

    Raises:
        TypeError: The optimizer has no parameter groups.
        ValueError: One of the parameters is in the optimizer already.
    """

    def __init__(self, optimizer: Any, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        self._optimizer = innermost(optimizer)
        self._group = _last_group(self._optimizer)
        there = {id(p) for group in self._optimizer.param_groups for p in group["params"]}
        for p in self.parameters:
            if id(p) in there:
                raise ValueError(f"parameters to train must be new to the optimizer, got one of shape {tuple(p.shape)} twice")
            there.add(id(p))
        self._group.extend(self.parameters)
        self._hooks = []
        if isinstance(self._optimizer, torch.optim.Optimizer):
            self._hooks.append(self._optimizer.register_state_dict_post_hook(self._without))
            self._hooks.append(self._optimizer.register_load_state_dict_pre_hook(self._with))
        else:  # fastai's has no hooks
            self._optimizer.state_dict, self._optimizer.load_state_dict = self._fastai_without, self._fastai_load
            for p in self.parameters:
                self._optimizer.state.setdefault(p, {})

    def leave(self) -> None:
        """Remove the parameters and their state from the optimizer."""
        for hook in self._hooks:
            hook.remove()
        for name in ("state_dict", "load_state_dict"):
            vars(self._optimizer).pop(name, None)
        self._withdraw()
        for p in self.parameters:
            self._optimizer.state.pop(p, None)

    def _withdraw(self) -> None:
        mine = {id(p) for p in self.parameters}
        self._group[:] = [p for p in self._group if id(p) not in mine]

    def clear_gradients(self) -> None:
        """Set the gradients to None, since a loop that clears the model's gradients does not know these parameters."""
        for p in self.parameters:
            p.grad = None

    def state_dict(self) -> dict[str, Any]:
        """Return copies of the optimizer's state of each parameter, in order."""
        return {"states": [_copied(self._optimizer.state.get(p, {})) for p in self.parameters]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a saved state, as copies.

        Raises:
            ValueError: It is of another number of parameters.
        """
        if len(state["states"]) != len(self.parameters):
            raise ValueError(f"state must be of {len(self.parameters)} joined parameters, got {len(state['states'])}")
        for p, own in zip(self.parameters, state["states"], strict=True):
            if own:
                self._optimizer.state[p] = _copied(own, p.device)

    def _without(self, _: Any, state: dict[str, Any]) -> dict[str, Any]:
        """Return the optimizer's own state dict without these parameters, which come last in it."""
        *groups, last = state["param_groups"]
        kept = last["params"][: -len(self.parameters)]
        gone = set(last["params"][len(kept) :])
        states = {k: v for k, v in state["state"].items() if k not in gone}
        return {**state, "state": states, "param_groups": [*groups, {**last, "params": kept}]}

    def _fastai_without(self) -> dict[str, Any]:
        """Return the state of fastai's optimizer without these parameters, which come last in it."""
        state: dict[str, Any] = type(self._optimizer).state_dict(self._optimizer)
        return {**state, "state": state["state"][: -len(self.parameters)]}

    def _fastai_load(self, state: Mapping[str, Any]) -> None:
        """Load a state without these parameters into fastai's optimizer; the parameters keep their own state."""
        own = {p: self._optimizer.state[p] for p in self.parameters}
        self._withdraw()
        try:
            type(self._optimizer).load_state_dict(self._optimizer, state)
        finally:
            self._group.extend(self.parameters)
            self._optimizer.state.update(own)

    def _with(self, _: Any, state: dict[str, Any]) -> dict[str, Any] | None:
        """Return the state dict to load, with the present state of these parameters added."""
        *groups, last = state["param_groups"]
        if len(last["params"]) != len(self._group) - len(self.parameters):
            return None
        first = 1 + max((i for group in state["param_groups"] for i in group["params"]), default=-1)
        added = {first + i: self._optimizer.state.get(p, {}) for i, p in enumerate(self.parameters)}
        states = {**state["state"], **{i: own for i, own in added.items() if own}}
        return {**state, "state": states, "param_groups": [*groups, {**last, "params": [*last["params"], *added]}]}


def _last_group(optimizer: Any) -> MutableSequence[nn.Parameter]:
    """Return the list of parameters of the optimizer's last group, as the optimizer reads it.

    fastai's optimizer makes its groups anew at each access: a list added to there would be lost.
    """
    lists = getattr(optimizer, "param_lists", None)
    if lists is None:
        groups = getattr(optimizer, "param_groups", None)
        if not groups:
            raise TypeError(f"optimizer must have param_groups for further parameters, got {type(optimizer).__name__}")
        lists = [group["params"] for group in groups]
    found: MutableSequence[nn.Parameter] = lists[-1]
    return found


def _copied(state: Mapping[str, Any], device: torch.device | None = None) -> dict[str, Any]:
    return {k: _copy(v, device) for k, v in state.items()}


def _copy(value: Any, device: torch.device | None) -> Any:
    if not isinstance(value, Tensor):
        return value
    # Counts of steps are scalars that stay on the CPU.
    return value.clone() if device is None or value.dim() == 0 else value.to(device, copy=True)
