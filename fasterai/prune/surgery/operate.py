"""Surgery on a model: the one place that removes channels, and puts them back if asked.

Parameters and buffers keep their identity, so that an optimizer goes on with them; its state and their gradients are cut alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from fasterai.graph.inputs import InputCut, input_cuts, put_inputs
from fasterai.model.cuts import announce, kept_slices
from fasterai.model.names import unwrap
from fasterai.model.optimizers import averages_of, check_optimizer, cut_entry, states_of, strange_keys
from fasterai.model.slim_norms import can_be_slim, put_dense_size
from fasterai.prune.surgery.dense_shapes import dense_shapes_of, note, noted_on, put_note
from fasterai.prune.surgery.plan import Plan, check_plan, tensor_of, tensors_of
from fasterai.prune.surgery.rewriting import Rewrite
from fasterai.prune.surgery.slim_attention import SlimMultiheadAttention, encoders_of
from fasterai.prune.surgery.traced_copies import change_rewrites

__all__ = ["Surgery", "apply_plan_", "operate"]


@dataclass(frozen=True)
class _Change:
    """One step of a surgery, as a function that does it and one that takes it back."""

    forth: Callable[[], None]
    back: Callable[[], None]


class Surgery:
    """Plan carried out on a model; `undo()` takes it back, and `redo()` does it again.

    Args:
        model: The model; changed in place.
        plan: The plan of what to take out.
        optimizer: The optimizer whose state is cut alike; torch's or fastai's.

    Raises:
        TypeError: The optimizer keeps no state by parameter.
        ValueError: The plan is for another model, or the optimizer's state cannot be cut; nothing is changed then.
    """

    def __init__(self, model: nn.Module, plan: Plan, optimizer: Any = None) -> None:
        check_optimizer(optimizer)
        check_plan(model, plan)
        self._model = unwrap(model)
        self._changes: list[_Change] = []
        self._is_done = True
        try:
            for change in _changes(unwrap(model), plan, optimizer):
                self._changes.append(change)
                change.forth()
        except BaseException:
            self.undo()
            raise

    def rewrite(self, rewrites: Mapping[str, Rewrite]) -> None:
        """Put traced copies of modules in their places too.

        Raises:
            ValueError: One of them does not fit; those before it are in their places then, and undone with all else.
        """
        for change in change_rewrites(self._model, rewrites):
            self._changes.append(_Change(*change))
            self._changes[-1].forth()

    def undo(self) -> None:
        """Put everything back as it was."""
        for change in reversed(self._changes) if self._is_done else ():
            change.back()
        self._is_done = False

    def redo(self) -> None:
        """Carry out again what was undone, with the same tensors as the first time."""
        for change in self._changes if not self._is_done else ():
            change.forth()
        self._is_done = True

    @contextmanager
    def undone(self) -> Iterator[None]:
        """Put everything back for a while."""
        self.undo()
        try:
            yield
        finally:
            self.redo()


def apply_plan_(model: nn.Module, plan: Plan, *, optimizer: Any = None) -> None:
    """Carry out a plan on another model of the same structure, such as a moving average of the weights or a fresh model.

    What is taken out need not be silent there; its outputs are not checked.

    Args:
        model: The model, as dense as the one that the plan was made for; changed in place. An `AveragedModel` of torch too.
        plan: `Removal.plan`, or one that `Plan.from_dict` read.
        optimizer: The optimizer whose state is cut alike.

    Raises:
        TypeError: The optimizer keeps no state by parameter.
        ValueError: The plan is for another model; nothing is changed then.
    """
    operate(model, plan, optimizer)


def operate(model: nn.Module, plan: Plan, optimizer: Any = None, copies: Sequence[nn.Module] = ()) -> Surgery:
    """Carry out a plan on a model and its copies, and tell the followers; if any of it fails, nothing is changed.

    Raises:
        ValueError: The plan does not fit one of them; nothing is changed then.
    """
    model, copies = _inner(model), [_inner(other) for other in copies]
    done: list[Surgery] = []
    try:
        done.append(Surgery(model, plan, optimizer))
        for i, other in enumerate(copies):
            try:
                done.append(Surgery(other, plan))
            except ValueError as error:
                raise ValueError(f"copies must be models of the same structure, got copies[{i}] where {error}") from error
        announce(model, plan.cut, copies)
        return done[0]
    except BaseException:
        for surgery in reversed(done):
            surgery.undo()
        raise


def _inner(model: nn.Module) -> nn.Module:
    inner = unwrap(model)
    return unwrap(inner.module) if isinstance(inner, AveragedModel) else inner


def _changes(model: nn.Module, plan: Plan, optimizer: Any) -> Iterator[_Change]:
    """Make the changes one after the other; each is made when those before it are done."""
    tensors, averages = tensors_of(model), averages_of(optimizer)
    states = [(state, strange_keys(state)) for state in states_of(optimizer)]
    dense = [(module, dense_shapes_of(module)) for module in model.modules()]
    for name in plan.shapes:
        tensor = tensor_of(tensors, name)
        kept = {d: plan.keep[name, d] for d in range(tensor.dim()) if (name, d) in plan.keep}
        for one in (tensor, averages.get(tensor)):
            if one is not None:
                yield _cut(one, kept, plan.scales.get(name, 1.0))
        for state, strange in states:
            if state.get(tensor):
                yield _entry(state, tensor, name, plan.shapes[name], kept, strange)
    yield from (_note(module, shapes) for module, shapes in dense if shapes and plan.shapes)
    for module_name, attribute, before, after in plan.attributes:
        yield _set(model.get_submodule(module_name), attribute, before, after)
    for name, size in plan.slim.items():
        module = model.get_submodule(name)
        yield _count(module, size) if can_be_slim(module) else _slim(model, name, size)
    if plan.inputs:
        yield _note_inputs(model, plan.inputs)
    yield from (_Change(*change) for change in change_rewrites(model, plan.rewrites))


def _cut(tensor: Tensor, kept: Any, scale: float) -> _Change:
    data, grad = tensor.data, tensor.grad
    small, small_grad = kept_slices(data, kept), None if grad is None else kept_slices(grad, kept)
    if scale != 1.0:
        small.mul_(scale)
    return _Change(lambda: _put(tensor, small, small_grad), lambda: _put(tensor, data, grad))


def _put(tensor: Tensor, data: Tensor, grad: Tensor | None) -> None:
    """Replace the values of a tensor by ones of another shape; the tensor stays the same object.

    A loss that is still held keeps alive the node that gathers the parameter's gradients, with the shape that it had.
    Autograd makes a new one only where the type changes: so it changes in between.
    """
    tensor.grad = None
    tensor.data = torch.empty(0, dtype=torch.float32 if data.dtype == torch.float64 else torch.float64, device=data.device)
    tensor.data = data
    tensor.grad = grad


def _entry(state: Any, tensor: Tensor, name: str, shape: Sequence[int], kept: Any, strange: Any) -> _Change:
    before = dict(state[tensor])
    after = cut_entry(before, name, shape, kept, strange)

    def put(entry: dict[str, Any]) -> None:
        state[tensor].clear()
        state[tensor].update(entry)

    return _Change(lambda: put(after), lambda: put(before))


def _note(module: nn.Module, dense: Mapping[str, tuple[int, ...]]) -> _Change:
    before, after = noted_on(module), note(module, dense)
    return _Change(lambda: put_note(module, after), lambda: put_note(module, before))


def _note_inputs(model: nn.Module, cuts: Sequence[InputCut]) -> _Change:
    before = input_cuts(model)
    after = before | {c.argument: before[c.argument].then(c) if c.argument in before else c for c in cuts}
    return _Change(lambda: put_inputs(model, after), lambda: put_inputs(model, before))


def _set(module: nn.Module, attribute: str, before: Any, after: Any) -> _Change:
    owner, _, own = attribute.rpartition(".")
    holder = getattr(module, owner) if owner else module
    return _Change(lambda: setattr(holder, own, after), lambda: setattr(holder, own, before))


def _count(norm: nn.Module, size: int) -> _Change:
    before = vars(norm).get("dense_size")
    return _Change(lambda: put_dense_size(norm, size), lambda: put_dense_size(norm, before))


def _slim(model: nn.Module, name: str, heads: int) -> _Change:
    attention = model.get_submodule(name)
    if isinstance(attention, SlimMultiheadAttention):
        return _set(attention, "num_heads", attention.num_heads, heads)
    assert isinstance(attention, nn.MultiheadAttention)
    slim = SlimMultiheadAttention(attention, heads)
    places = [(parent, key) for parent in model.modules() for key, child in parent._modules.items() if child is attention]

    encoders = [(encoder, encoder.use_nested_tensor) for encoder in encoders_of(model, attention)]

    def put(module: nn.Module) -> None:
        for parent, key in places:
            setattr(parent, key, module)
        for encoder, before in encoders:
            encoder.use_nested_tensor = before and module is attention

    return _Change(lambda: put(slim), lambda: put(attention))
