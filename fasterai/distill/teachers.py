"""Teachers: who answers for a batch, and what of it is wanted. The average of the student is in `average.py`.

Over 300 lines, since a network, several of them and what they have in common build on each other.
"""

from __future__ import annotations

import inspect
import itertools
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from os import PathLike
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from fasterai.core.batch import Batch
from fasterai.core.checks import not_one_of
from fasterai.core.saved import check_parts, list_of, mapping_of
from fasterai.display import Brief, one_line
from fasterai.distill.capture import Capture, find_layers
from fasterai.model.names import unwrap
from fasterai.model.running import device_of, evaluating
from fasterai.model.supported import network_in

__all__ = ["Answers", "NetworkTeacher", "SeveralTeachers", "Teacher", "as_teacher"]

HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}  # Accelerate's words for the precisions of autocast


@dataclass(frozen=True, repr=False)
class Answers(Brief):
    """Outputs of a network for a batch.

    Attributes:
        logits: The outputs as one tensor; None if there is none.
        features: The outputs of the layers that were asked for, in their order.
    """

    logits: Tensor | None
    features: Sequence[Tensor] = ()


class Teacher(ABC):
    """Anything that answers for batches."""

    def __repr__(self) -> str:
        return f"<{type(self).__name__}>"

    @abstractmethod
    def begin(self, student: nn.Module, layers: Sequence[str | nn.Module]) -> None:
        """Begin a run with a student; `layers` are those whose outputs are wanted.

        Raises:
            ValueError: A layer is unknown, or the student is not one for this teacher; nothing is changed then.
        """

    @abstractmethod
    def answer(self, batch: Batch) -> Answers:
        """Answer for a batch, whose outputs are the student's, without a gradient."""

    def after_step(self) -> None:
        """Go on after a step of the optimizer."""

    def at_position(self, position: float) -> None:
        """Go on to what is to teach at a position of the run in (0, 1], the share of it that is done, after each step."""

    def end(self) -> None:
        """End the run, and leave everything as it was; further calls do nothing."""

    def state_dict(self) -> dict[str, Any]:
        """Return what is needed to go on later."""
        return {}

    def check_state(self, state: Any) -> None:
        """Refuse a saved state that does not fit.

        Raises:
            ValueError: A part is missing or of another shape.
            TypeError: A part is of the wrong type.
        """

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state."""


class NetworkTeacher(Teacher):
    """A network that answers in eval mode and without gradients; nothing of it changes.

    Args:
        model: The network; each of its modules gets its mode back when a run ends.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._capture: Capture | None = None
        self._asks_labels = False
        self._half: torch.dtype | None = None
        self._is_alike = False

    def __repr__(self) -> str:
        return one_line(f"<NetworkTeacher: {type(unwrap(self.model)).__name__}>")

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_capture": None}  # a copy is in no run

    def begin(self, student: nn.Module, layers: Sequence[str | nn.Module]) -> None:
        """Put the network into eval mode, and hooks on the layers.

        Raises:
            ValueError: It shares parameters with the student, or a layer is unknown.
        """
        check_apart(student, self.model)
        found = find_layers("activations_teacher", self.model, layers)
        self.end()
        self._asks_labels = _asks_labels(unwrap(self.model))
        self._half = _half_of(student)
        self._is_alike = type(unwrap(self.model)) is type(unwrap(student))
        _rest(self.model)
        self._capture = Capture("activations_teacher", self.model, found, graph=False)

    def answer(self, batch: Batch) -> Answers:
        """Run the network on the batch's inputs, on its own device and in the precision of the student's outputs.

        Labels among the keywords are left out, unless the network cannot be called without.
        """
        assert self._capture is not None
        like = _first_tensor(batch.outputs)
        device = device_of(self.model, batch.inputs)
        given, keywords = self._inputs_of(batch, device)
        self._capture.forget()
        calm = evaluating(self.model) if self.model.training else nullcontext()  # others may have called train()
        with calm, torch.no_grad(), in_precision(like, device, self._half):
            # A copy of a LightningModule is called as the student is, which may be in its network alone.
            called = unwrap(self.model).get_submodule(batch.part) if self._is_alike and batch.part else self.model
            outputs = called(*given, **keywords)
        logits = _logits_or_none(outputs)
        features = self._capture.take()
        if like is None:
            return Answers(logits, features)
        return Answers(None if logits is None else logits.to(like.device), [x.to(like.device) for x in features])

    def _inputs_of(self, batch: Batch, device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
        own = next((p.dtype for p in self.model.parameters() if p.is_floating_point()), None)
        # A network in half precision takes no others, but under autocast.
        half = own if own in (torch.float16, torch.bfloat16) and not torch.is_autocast_enabled(device.type) else None

        def moved(x: Any) -> Any:
            return x.to(device, half if x.is_floating_point() else None) if isinstance(x, Tensor) else x

        keywords = {n: x for n, x in batch.keywords.items() if n != "labels" or self._asks_labels}
        result: tuple[tuple[Any, ...], dict[str, Any]] = tree_map(moved, (tuple(batch.inputs), keywords))
        return result

    def end(self) -> None:
        """Take the hooks off, and give every module its mode back."""
        capture, self._capture = self._capture, None
        if capture is not None:
            capture.remove()
            _wake(self.model)


class SeveralTeachers(Teacher):
    """Several teachers, whose logits are averaged, and the features of layers too, which all of them have in one shape.

    Args:
        teachers: Networks or teachers, at least one.
    """

    def __init__(self, teachers: Sequence[nn.Module | Teacher]) -> None:
        self.teachers = [as_teacher(one) for one in teachers]
        if not self.teachers:
            raise ValueError("teacher must be a network or several, got none")

    def __repr__(self) -> str:
        return one_line(f"<SeveralTeachers: {', '.join(map(repr, self.teachers))}>")

    def begin(self, student: nn.Module, layers: Sequence[str | nn.Module]) -> None:
        """Begin a run with all of them."""
        begun: list[Teacher] = []
        try:
            for one in self.teachers:
                begun.append(one)
                one.begin(student, layers)
        except BaseException:
            for one in reversed(begun):
                one.end()
            raise

    def answer(self, batch: Batch) -> Answers:
        """Return the means of their answers.

        Raises:
            ValueError: They differ in shape.
        """
        answers = [one.answer(batch) for one in self.teachers]
        logits = [one.logits for one in answers if one.logits is not None]
        whole = _mean("logits", logits) if len(logits) == len(answers) else None
        features = [list(of_layer) for of_layer in zip(*(one.features for one in answers), strict=True)]
        return Answers(whole, [_mean(f"outputs of layer {i} of activations_teacher", x) for i, x in enumerate(features)])

    def after_step(self) -> None:
        """Tell all of them."""
        for one in self.teachers:
            one.after_step()

    def at_position(self, position: float) -> None:
        """Tell all of them."""
        for one in self.teachers:
            one.at_position(position)

    def end(self) -> None:
        """End the run for all of them, the last first: the same network may stand twice."""
        for one in reversed(self.teachers):
            one.end()

    def state_dict(self) -> dict[str, Any]:
        """Return their states, in order."""
        return {"teachers": [one.state_dict() for one in self.teachers]}

    def check_state(self, state: Any) -> None:
        """Refuse a state of another number of teachers, or one that a teacher refuses."""
        check_parts(state, "SeveralTeachers", {"teachers": list_of(mapping_of(lambda *_: None))})
        if len(state["teachers"]) != len(self.teachers):
            raise ValueError(f"state must be of {len(self.teachers)} teachers, got {len(state['teachers'])}")
        for one, own in zip(self.teachers, state["teachers"], strict=True):
            one.check_state(own)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Give each its state."""
        for one, own in zip(self.teachers, state["teachers"], strict=True):
            one.load_state_dict(own)


#: Teachers in a run -> by how many they are asked, and the modes of their modules before.
_resting: WeakKeyDictionary[nn.Module, tuple[int, list[tuple[Any, bool]]]] = WeakKeyDictionary()


def _rest(model: nn.Module) -> None:
    """Put a network into eval mode, once for all that ask it."""
    count, modes = _resting.get(model, (0, []))
    _resting[model] = count + 1, modes or [(ref(module), module.training) for module in model.modules()]
    model.eval()


def _wake(model: nn.Module) -> None:
    """Give every module its mode back, if nobody else asks the network."""
    count, modes = _resting.pop(model, (0, []))
    if count > 1:
        _resting[model] = count - 1, modes
        return
    for module, training in ((one(), training) for one, training in modes):
        if module is not None:
            module.training = training


def as_teacher(teacher: Any) -> Teacher:
    """Return a teacher: itself, that of a network, or that of several in a list.

    Raises:
        TypeError: It is none of these.
    """
    if type(teacher) is NetworkTeacher:
        return NetworkTeacher(teacher.model)  # one for each run, so that several may ask a network for other layers
    if isinstance(teacher, Teacher):
        return teacher
    if isinstance(teacher, nn.Module):
        return NetworkTeacher(teacher)
    if isinstance(teacher, list | tuple):
        return SeveralTeachers(teacher)
    raise not_one_of("teacher", "a network, a Teacher or a list of such", teacher, _instead_of(teacher))


def _instead_of(teacher: object) -> str:
    if isinstance(teacher, str | PathLike):
        return "; load its weights into a network: model.load_state_dict(...); cached logits: load_cached_teacher(path)"
    return "; pass route.one_stage()" if hasattr(teacher, "one_stage") else network_in(teacher)


def check_apart(student: nn.Module, teacher: nn.Module) -> None:
    """Refuse a teacher that shares a parameter with the student, also as another object with the same values in memory.

    Raises:
        ValueError: It does.
    """
    own = {_memory(p) for p in student.parameters()}
    shared = next((name for name, p in teacher.named_parameters() if _memory(p) in own), None)
    if shared is not None:
        raise ValueError(
            f"teacher must share no parameter with the student, whose training would change it, got one that shares {shared}; "
            "pass copy.deepcopy(model)"
        )


def _memory(p: Tensor) -> int:
    return id(p) if p.is_meta or p.numel() == 0 or type(p) is not nn.Parameter else p.untyped_storage().data_ptr()


def in_precision(like: Tensor | None, device: torch.device, half: torch.dtype | None = None) -> AbstractContextManager[Any]:
    """Return a context in which a network computes in the precision that a student's outputs show, or in `half`."""
    shown = like.dtype if like is not None and like.dtype in HALVES.values() else half
    if shown is not None and not torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, shown)
    return nullcontext()


def _half_of(student: nn.Module) -> torch.dtype | None:
    """Return the half precision that Accelerate has put around a student's forward, whose outputs it turns back; or None."""
    state = sys.modules.get("accelerate.state")
    if state is None or not hasattr(unwrap(student), "_original_forward") or not state.AcceleratorState._shared_state:
        return None
    return HALVES.get(state.AcceleratorState().mixed_precision)


def _asks_labels(model: nn.Module) -> bool:
    """Tell if a network cannot be called without labels, as an encoder and decoder that makes its decoder's inputs of them."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return True
    try:
        wanted = inspect.signature(model.forward).parameters.get("labels")
    except (TypeError, ValueError):
        return False
    return wanted is not None and wanted.default is wanted.empty


def _first_tensor(outputs: Any) -> Tensor | None:
    return next((x for x in tree_leaves(_plain(outputs)) if isinstance(x, Tensor)), None)


def _plain(outputs: Any) -> Any:
    return list(outputs.values()) if isinstance(outputs, Mapping) else outputs


def _logits_or_none(outputs: Any) -> Tensor | None:
    try:
        return Batch(outputs=outputs).logits
    except ValueError:
        return None


def _mean(what: str, tensors: Sequence[Tensor]) -> Tensor:
    shapes = [tuple(x.shape) for x in tensors]
    odd = next((pair for pair in itertools.pairwise(shapes) if pair[0] != pair[1]), None)
    if odd is not None:
        raise ValueError(f"teacher must be several of one shape of {what}, got {odd[0]} and {odd[1]}; distil from one of them")
    return torch.stack([x.float() for x in tensors]).mean(0)
