"""A loop of your own: the optimizer's step is the only event it takes."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch

from fasterai.core.checks import check_count, warn
from fasterai.core.loop import Fit, Loop, Participant

__all__ = ["Handle", "attach"]


class Handle:
    """A run that follows an optimizer; also a context manager, which ends the run at its end.

    Attributes:
        loop: The run's loop, with its `step` and `total_steps`.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, loop: Loop) -> None:
        self.loop = loop
        self._is_stepping = False
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    def _before_step(self, *_: Any) -> None:
        self.loop.before_step()
        self._is_stepping = True

    def _after_step(self, *_: Any) -> None:
        if not self._is_stepping:  # an optimizer that calls its base class's step: torch's hooks have counted that one
            self.loop.step -= 1
        self._is_stepping = False
        self.loop.after_step()

    def remove(self, completed: bool | None = None) -> None:
        """End the run and leave the optimizer as it was.

        Args:
            completed: Whether the training went to its end, so that the schedule's end is to be reached; by default
                whether all steps were taken.
        """
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self.loop.end(self.loop.step >= self.loop.total_steps if completed is None else completed)

    def state_dict(self) -> dict[str, Any]:
        """The step and the participants' states, for `torch.load(weights_only=True)`."""
        return self.loop.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state; the caller's dict is not changed."""
        self.loop.load_state_dict(state)

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.remove()


def attach(optimizer: torch.optim.Optimizer, *participants: Participant, total_steps: int) -> Handle:
    """Let participants take part in a loop of your own; nothing else in the loop changes.

    Args:
        optimizer: The loop's optimizer; hooks go on it, none on the model.
        *participants: A `Sparsifier`, or others.
        total_steps: How many steps the optimizer will take, at least 1.

    Returns:
        A handle whose `remove()` ends the run. A run that is still attached to the optimizer, as after an interrupted
        notebook cell, is ended with a warning.

    Raises:
        TypeError: `optimizer` is not a torch optimizer, or nothing takes part.
        ValueError: `total_steps` is below 1; a step beyond it raises before it changes a weight.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {optimizer!r} ({type(optimizer).__name__})")
    if not participants or not all(isinstance(p, Participant) for p in participants):
        raise TypeError(f"participants must be participants in training, such as a Sparsifier, got {participants!r}")
    _end_earlier_runs(optimizer)
    loop = Loop(participants)
    loop.start(Fit(check_count("total_steps", total_steps), optimizer=optimizer))
    return Handle(optimizer, loop)


def _end_earlier_runs(optimizer: torch.optim.Optimizer) -> None:
    for hook in [*optimizer._optimizer_step_pre_hooks.values()]:
        earlier = getattr(hook, "__self__", None)
        if isinstance(earlier, Handle):
            step, total = earlier.loop.step, earlier.loop.total_steps
            warn(f"an earlier run was still attached to this optimizer, at step {step} of {total}: it ends here")
            earlier.remove(completed=False)
