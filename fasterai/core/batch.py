"""The values that a training loop shows: one batch, and the description of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from fasterai.display import Brief

__all__ = ["Batch", "Fit", "note_task", "task_loss"]

TASK = "_fasterai_task_loss"  # an attribute of losses that were changed: another loop of the same training goes on with them


@dataclass(frozen=True, repr=False)
class Batch(Brief):
    """One batch, as the loop has it: the model is called as `model(*inputs, **keywords)`.

    Attributes:
        inputs: The positional arguments of the model.
        targets: The further arguments of the loss, `loss(outputs, *targets)`, if there are any.
        keywords: The keyword arguments of the model.
        outputs: The model's result, None before the forward pass or where the loop does not show it.
        part: The name of the part of the model that is called with the inputs; empty for the model itself.
        loss: The loss of the task alone, whatever participants have made of it so far; None before there is one.
    """

    inputs: tuple[Any, ...] = ()
    targets: tuple[Any, ...] = ()
    keywords: Mapping[str, Any] = field(default_factory=dict)
    outputs: Any = None
    part: str = ""
    loss: Tensor | None = None

    @property
    def logits(self) -> Tensor:
        """The outputs as one tensor: themselves, their `logits`, or the first tensor of a tuple that is no scalar.

        Raises:
            ValueError: There is no such tensor.
        """
        found = self.outputs
        if isinstance(found, Mapping):
            found = found.get("logits")
        elif isinstance(found, tuple | list):
            found = next((x for x in found if isinstance(x, Tensor) and x.dim()), None)  # a loss may come first
        if not isinstance(found, Tensor):
            raise ValueError(f"outputs must be a tensor, or have one of logits, got {_kind(self.outputs)}")
        return found

    @property
    def labels(self) -> Any:
        """The first of the targets, or the keyword `labels`; None if there is neither."""
        return self.targets[0] if self.targets else self.keywords.get("labels")


@dataclass(frozen=True, repr=False)
class Fit(Brief):
    """Description of one training run.

    Attributes:
        total_steps: Optimizer steps from the beginning to the end of the schedule, at least 1.
        model: The model that is trained, wrapped or not; None only in a loop of your own that names none.
        optimizer: The loop's optimizer, torch's or another; a list of several.
        loss: The loss function `(output, *targets) -> scalar`, if the loop has one.
        batch: The first batch, if the loop can say.
        steps_per_epoch: Optimizer steps in an epoch, if the loop has epochs.
        is_search: A function that tells, after the run as well, if the framework only searches (for a learning rate, say): what
            trains then is put back afterwards.
        stepping: A function that gives the optimizer whose step is under way, None where the loop has one alone.
    """

    total_steps: int
    model: nn.Module | None = None
    optimizer: Any = None
    loss: Callable[..., Tensor] | None = None
    batch: Batch | None = None
    steps_per_epoch: int | None = None
    is_search: Callable[[], bool] = field(default=lambda: False)
    stepping: Callable[[], Any] = field(default=lambda: None)

    @property
    def optimizers(self) -> list[Any]:
        """The loop's optimizers: none, one or several."""
        if isinstance(self.optimizer, list | tuple):
            return list(self.optimizer)
        return [] if self.optimizer is None else [self.optimizer]


def _kind(outputs: Any) -> str:
    kind = type(outputs).__name__
    if not isinstance(outputs, Mapping):
        return kind
    return f"a {kind} of {', '.join(map(str, outputs)) or 'nothing'}; return the logits under 'logits'"


def task_loss(loss: Tensor) -> Tensor:
    """Return the loss of the task that a loss was made of; itself if nothing has changed it."""
    found: Tensor = getattr(loss, TASK, loss)
    return found


def note_task(loss: Tensor, task: Tensor) -> Tensor:
    """Note on a changed loss which one of the task it was made of; return it."""
    if loss is not task:
        setattr(loss, TASK, task)
    return loss
