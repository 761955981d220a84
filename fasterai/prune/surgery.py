"""L4. The one place that takes channels out of a model, and puts them back if it has to.

Parameters keep their identity, so that an optimizer goes on with them; its state and their gradients are cut alike.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fasterai.core.targets import unwrap
from fasterai.prune.attention import SlimMultiheadAttention
from fasterai.prune.plan import Plan, tensors_of

__all__ = ["Surgery"]


class Surgery:
    """A plan carried out on a model; `undo()` takes it back.

    Args:
        model: The model; changed in place.
        plan: What to take out.
        optimizer: Whose state is cut alike; torch's or fastai's.

    Raises:
        ValueError: The plan is for another model; nothing is changed then.
    """

    def __init__(self, model: nn.Module, plan: Plan, optimizer: Any = None) -> None:
        self._undo: list[Callable[[], None]] = []
        tensors = tensors_of(model)
        _check(tensors, plan)
        try:
            for name in plan.shapes:
                self._cut(*tensors[name], plan, name, optimizer)
            for module_name, attribute, _, value in plan.attributes:
                self._set(unwrap(model).get_submodule(module_name), attribute, value)
            for name, heads in plan.slim.items():
                self._slim(unwrap(model), name, heads)
        except BaseException:
            self.undo()
            raise

    def undo(self) -> None:
        """Put everything back as it was."""
        while self._undo:
            self._undo.pop()()

    @torch.no_grad()
    def _cut(self, module: nn.Module, attribute: str, plan: Plan, name: str, optimizer: Any) -> None:
        parameter = module._parameters.get(attribute)
        if parameter is None:
            buffer = module._buffers[attribute]
            assert buffer is not None
            module._buffers[attribute] = _sliced(buffer, plan, name)
            self._undo.append(lambda: module._buffers.__setitem__(attribute, buffer))
            return
        data, grad, shape = parameter.data, parameter.grad, parameter.shape
        state = optimizer.state.get(parameter, {}) if optimizer is not None else {}
        before = dict(state)
        parameter.grad = None
        parameter.data = _sliced(data, plan, name)
        parameter.grad = None if grad is None else _sliced(grad, plan, name)
        for key, value in before.items():
            if isinstance(value, Tensor) and value.shape == shape:
                state[key] = _sliced(value, plan, name)

        def back() -> None:
            parameter.grad = None
            parameter.data = data
            parameter.grad = grad
            state.update(before)

        self._undo.append(back)

    def _set(self, module: nn.Module, attribute: str, value: Any) -> None:
        before = getattr(module, attribute)
        setattr(module, attribute, value)
        self._undo.append(lambda: setattr(module, attribute, before))

    def _slim(self, model: nn.Module, name: str, heads: int) -> None:
        parent_name, _, attribute = name.rpartition(".")
        parent = model.get_submodule(parent_name)
        attention = parent.get_submodule(attribute)
        if isinstance(attention, SlimMultiheadAttention):
            self._set(attention, "num_heads", heads)
            return
        assert isinstance(attention, nn.MultiheadAttention)
        setattr(parent, attribute, SlimMultiheadAttention(attention, heads))
        self._undo.append(lambda: setattr(parent, attribute, attention))


def _check(tensors: dict[str, tuple[nn.Module, str]], plan: Plan) -> None:
    for name, shape in plan.shapes.items():
        if name not in tensors:
            raise ValueError(f"plan must be for this model, got one that cuts {name}, which it has not")
        module, attribute = tensors[name]
        parameter = module._parameters.get(attribute)
        tensor = parameter if parameter is not None else module._buffers[attribute]
        assert tensor is not None
        if tuple(tensor.shape) != shape:
            raise ValueError(f"plan must be for this model, got one where {name} is {shape}, here {tuple(tensor.shape)}")


def _sliced(tensor: Tensor, plan: Plan, name: str) -> Tensor:
    """A new tensor of the indices that stay, in the memory format of the old."""
    result = tensor.detach()
    for d in range(tensor.dim()):
        if (name, d) in plan.keep:
            result = result.index_select(d, torch.as_tensor(plan.keep[name, d], device=tensor.device))
    if tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous():
        result = result.contiguous(memory_format=torch.channels_last)
    return result
