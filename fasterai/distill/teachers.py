"""Teachers: who answers for a batch, and what of it is wanted."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from fasterai.core.batch import Batch
from fasterai.display import Brief
from fasterai.distill.capture import Capture, find_layers
from fasterai.model.running import device_of

__all__ = ["Answers", "NetworkTeacher", "Teacher"]


@dataclass(frozen=True, repr=False)
class Answers(Brief):
    """What a network says of a batch.

    Attributes:
        logits: The outputs as one tensor; None if they are not asked for.
        features: The outputs of the layers that were asked for, in their order.
    """

    logits: Tensor | None
    features: Sequence[Tensor] = ()


class Teacher(ABC):
    """Anything that answers for batches."""

    @abstractmethod
    def begin(self, student: nn.Module, layers: Sequence[str | nn.Module]) -> None:
        """Begin a run with a student; `layers` are those whose outputs are wanted."""

    @abstractmethod
    def answer(self, batch: Batch) -> Answers:
        """Answer for a batch, whose outputs are the student's, without a gradient."""

    def after_step(self) -> None:
        """Go on after a step of the optimizer."""

    def at_position(self, position: float) -> None:
        """Go on to what is to teach at a position of the run, in (0, 1], the share of it that is done; heard after each step."""

    def end(self) -> None:
        """End the run, and leave everything as it was; further calls do nothing."""

    def state_dict(self) -> dict[str, Any]:
        """Return what is needed to go on later."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state."""


class NetworkTeacher(Teacher):
    """A network that answers in eval mode and without gradients; nothing of it changes.

    Args:
        model: The network.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._modes: list[tuple[nn.Module, bool]] = []
        self._capture: Capture | None = None

    def begin(self, student: nn.Module, layers: Sequence[str | nn.Module]) -> None:
        """Put the network into eval mode, and hooks on the layers.

        Raises:
            ValueError: It shares parameters with the student, or a layer is unknown.
        """
        own = {id(p) for p in student.parameters()}
        if any(id(p) in own for p in self.model.parameters()):
            raise ValueError(
                "teacher must share no parameter with the student, whose training would change it, got one that does; "
                "pass copy.deepcopy(model)"
            )
        found = find_layers("activations_teacher", self.model, layers)
        self._modes = [(module, module.training) for module in self.model.modules()]
        self._capture = Capture(found, graph=False)
        self.model.eval()

    def answer(self, batch: Batch) -> Answers:
        """Run the network on the batch's inputs, on its own device and in the precision of the student's outputs."""
        assert self._capture is not None
        like = batch.logits
        device = device_of(self.model, batch.inputs)
        given = tree_map(lambda x: x.to(device, non_blocking=True) if isinstance(x, Tensor) else x, batch.inputs)
        keywords = {n: x.to(device) if isinstance(x, Tensor) else x for n, x in batch.keywords.items() if n != "labels"}
        with torch.no_grad(), in_precision(like, device):
            outputs = self.model(*given, **keywords)
        seen = Batch(outputs=outputs).logits.to(like.device)
        return Answers(seen, [x.to(like.device) for x in self._capture.take() if x is not None])

    def end(self) -> None:
        """Take the hooks off, and give every module its mode back."""
        if self._capture is not None:
            self._capture.remove()
        self._capture = None
        for module, training in self._modes:
            module.training = training
        self._modes = []


def in_precision(like: Tensor, device: torch.device) -> AbstractContextManager[Any]:
    """Return a context in which a network computes in the precision that a student's outputs show."""
    if like.dtype in (torch.float16, torch.bfloat16) and not torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, like.dtype)
    return nullcontext()
