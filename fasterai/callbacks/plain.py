"""A loop of your own: hooks on the optimizer's step, and one call where a participant changes the loss."""

from __future__ import annotations

import inspect
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, NoReturn
from weakref import WeakSet

import torch
from torch import Tensor, nn

from fasterai.core.checks import check_count, warn
from fasterai.core.joined import innermost
from fasterai.core.loop import Batch, Fit, Loop, Participant
from fasterai.display import brief, one_line

__all__ = ["Handle", "attach"]

IN_LOSS = ("after_forward", "on_first_batch", "after_loss")
OF_MODEL = ("on_setup", "on_first_batch")

#: The likely reasons for which a loop of one's own ends short, and the repairs.
COUNTED = (
    "total_steps counts steps of the optimizer, so that with gradients accumulated over k batches it is "
    "attach(..., epochs=epochs, steps_per_epoch=len(loader), accumulate=k); a step that a GradScaler skips is none, and a loop "
    "may have broken off: remove(completed=True) goes to the end all the same, and completed=False says that it is meant"
)
BROKEN = "the loop has failed, or was interrupted; remove(completed=True) goes to the end all the same"
DROPPED = "its handle is gone, and remove() was never called: keep the handle and call it, or write with attach(...):"
REPLACED = "another run begins with the same participant, and remove() was never called"

_handles: WeakSet[Handle] = WeakSet()


class Handle:
    """A run that follows an optimizer; also a context manager, which ends the run at its end.

    Attributes:
        loop: The run's loop, with its `step` and `total_steps`.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, loop: Loop) -> None:
        self.loop = loop
        self._is_stepping = self._is_skipped = False
        self._has_seen = {"loss": False, "gradients": False}
        self._hooks = [
            optimizer.register_step_pre_hook(torch.compiler.disable(self._before_step)),  # type: ignore[no-untyped-call]
            optimizer.register_step_post_hook(torch.compiler.disable(self._after_step)),  # type: ignore[no-untyped-call]
        ]
        _handles.add(self)

    def __repr__(self) -> str:
        names = ", ".join(p.name for p in self.loop.participants)
        return one_line(f"<Handle: step {self.loop.step} of {self.loop.planned_steps}; {names}>")

    def loss(self, loss: Tensor, inputs: Any = (), targets: Any = (), outputs: Any = None) -> Tensor:
        """Show a batch to the participants, and return the loss to go on with.

        Call it between the loss and the backward pass: `loss = handle.loss(loss, x, y, outputs)`.

        Args:
            loss: The loss of this batch, before it is divided for accumulation or scaled for precision.
            inputs: What the model was called with: a tensor, a tuple of arguments, or a dict of keywords.
            targets: The further arguments of the loss function: a tensor or a tuple.
            outputs: What the model returned.
        """
        self._has_seen["loss"] = True
        keywords = dict(inputs) if isinstance(inputs, Mapping) else {}
        batch = Batch(() if keywords else _as_tuple(inputs), _as_tuple(targets), keywords, outputs)
        self.loop.after_forward(batch)
        return self.loop.after_loss(loss, batch)

    def after_backward(self) -> None:
        """Tell the participants that the gradients of a step are complete; only a loop that clips them needs to, before it."""
        self._has_seen["gradients"] = True
        self.loop.after_backward()

    def _before_step(self, optimizer: Any, args: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        """Pass on that the gradients are complete: now, or as often as the optimizer calls a closure that makes them."""
        self.loop.settle()
        self._is_skipped = bool(getattr(optimizer, "found_inf", None))  # a fused one finds out in its step, and does nothing
        if self._is_skipped:
            return None
        self.loop.check_step()
        self._is_stepping = True
        if (closure := keywords.get("closure", args[1] if len(args) > 1 else None)) is None:
            self._pass_on(optimizer)
            return None

        def followed() -> Any:
            self.loop.settle()  # a second call in one step
            loss = closure()
            self._pass_on(optimizer)
            return loss

        return (args[0], followed, *args[2:]), {name: value for name, value in keywords.items() if name != "closure"}

    def _pass_on(self, optimizer: torch.optim.Optimizer) -> None:
        if not self._has_seen["loss"] and self.loop.wants(*IN_LOSS):
            names = ", ".join(p.name for p in self.loop.participants if any(p.hears(event) for event in IN_LOSS))
            raise ValueError(
                f"the loop must show each batch to {names}, got a step without it; call "
                "loss = handle.loss(loss, inputs, targets, outputs) before loss.backward()"
            )
        _unscale(optimizer)
        if not self._has_seen["gradients"]:
            self.loop.after_backward()
        self._has_seen["gradients"] = False
        self.loop.before_step()

    def _after_step(self, *_: Any) -> None:
        if self._is_skipped:
            self.loop.skip_step()
        else:  # of an optimizer that calls its base class's step torch's hooks have counted that one
            self.loop.step -= not self._is_stepping
            self._is_stepping = False
            self.loop.after_step()

    def remove(self, completed: bool | None = None) -> None:
        """End the run and leave the optimizer as it was.

        Args:
            completed: Whether the training went to its end, so that the schedule's end is to be reached; by default
                whether all steps were taken, with a warning if they were not and something lacks for it.
        """
        if completed is None and self.loop.running and self.loop.step == 0:
            warn(
                "the run ends without a step of its optimizer, so that nothing has happened: attach to the optimizer whose "
                "step() is called, such as the base_optimizer of one that has first_step and second_step"
            )
            self._end(False)
        counted = f"{self.loop.counts} make {self.loop.planned_steps} steps; {COUNTED}" if self.loop.counts else COUNTED
        self._end(*((self._is_done, counted) if completed is None else (completed, "")))

    @property
    def _is_done(self) -> bool:
        return self.loop.step >= self.loop.total_steps

    def _end(self, completed: bool, why: str = "") -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self.loop.end(completed, why)

    def __del__(self) -> None:
        loop = self.__dict__.get("loop")
        if loop is not None and loop.running:
            loop.tell_if_open(DROPPED, lambda: _in_a_thread(loop.shortfall))

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(
            "handle must not be pickled or copied, since its hooks stay on its optimizer; save handle.state_dict(), and load "
            "it into the handle of a new attach(...)"
        )

    def metrics(self) -> dict[str, float]:
        """Return the participants' figures, such as the sparsity: name -> value."""
        return self.loop.metrics()

    def state_dict(self) -> dict[str, Any]:
        """Return the step and the participants' states, for `torch.load(weights_only=True)`."""
        return self.loop.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state; the caller's dict is not changed."""
        self.loop.load_state_dict(state)

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self.remove()
        else:
            with suppress(UserWarning):  # as an error it would take the place of the loop's own
                self._end(self._is_done, BROKEN)


def attach(
    optimizer: Any,
    *participants: Participant,
    total_steps: int | None = None,
    epochs: int | None = None,
    steps_per_epoch: int | None = None,
    accumulate: int = 1,
    model: nn.Module | None = None,
    loss: Callable[..., Tensor] | None = None,
) -> Handle:
    """Let participants take part in a loop of your own; nothing else in the loop changes.

    Args:
        optimizer: The loop's optimizer, torch's or one that Accelerate has prepared; hooks go on it, none on the model.
        *participants: A `Sparsifier`, or others.
        total_steps: Steps that the optimizer will take, at least 1; or leave it out and give the next two.
        epochs: Epochs of the loop, at least 1.
        steps_per_epoch: Batches of an epoch, `len(loader)`.
        accumulate: Batches whose gradients are added up for one step: an epoch has `ceil(steps_per_epoch / accumulate)` steps.
        model: The model that is trained; by default the participants' own.
        loss: The loss function `(output, *targets) -> scalar`, for participants that need one.

    Returns:
        A handle whose `remove()` ends the run. A run that is still attached to the optimizer, as after an interrupted
        notebook cell, is ended with a warning. A participant that looks at batches or changes the loss needs
        `handle.loss(...)` in the loop; without it the first step raises.

    Raises:
        TypeError: `optimizer` is not a torch optimizer, nothing takes part, or a count is no whole number.
        ValueError: A count is below 1, `total_steps` and `epochs` are both given or both left out, or a participant needs a
            `model` and there is none; a step beyond the last raises before it changes a weight.
    """
    inner = innermost(optimizer)
    if not isinstance(inner, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {optimizer!r} ({type(optimizer).__name__})")
    if not participants or not all(isinstance(p, Participant) for p in participants):
        raise TypeError(f"participants must be participants in training, such as a Sparsifier, got {brief(participants)}")
    steps, per_epoch = _steps(total_steps, epochs, steps_per_epoch, accumulate)
    _end_earlier_runs(inner, participants)
    whole = (
        model
        if model is not None
        else next((m for p in participants if isinstance(m := getattr(p, "model", None), nn.Module)), None)
    )
    loop = Loop(participants)
    loop.counts = "" if per_epoch is None else f"epochs={epochs}, steps_per_epoch={steps_per_epoch} and accumulate={accumulate}"
    if whole is not None:
        loop.setup(whole, inner)
    elif loop.wants(*OF_MODEL):
        names = ", ".join(p.name for p in participants if any(p.hears(event) for event in OF_MODEL))
        raise ValueError(f"model must be given for {names}, which has parameters of its own, got None")
    loop.start(Fit(steps, model=whole, optimizer=inner, loss=loss, steps_per_epoch=per_epoch))
    return Handle(inner, loop)


def _steps(total: int | None, epochs: int | None, batches: int | None, accumulate: int) -> tuple[int, int | None]:
    """Return the optimizer's steps of a run and of an epoch, where that is known.

    In 2 epochs of 10 batches, of which 4 make a step, there are 2 x 3 steps: the last one of an epoch has 2 batches.
    """
    k = check_count("accumulate", accumulate)
    if total is not None:
        if epochs is not None or batches is not None or k != 1:
            also = epochs if epochs is not None else batches if batches is not None else accumulate
            name = "epochs" if epochs is not None else "steps_per_epoch" if batches is not None else "accumulate"
            raise ValueError(
                f"{name} must be left out beside total_steps, which counts the optimizer's steps itself, got {also!r} and "
                f"total_steps={total!r}"
            )
        return check_count("total_steps", total), None
    if epochs is None or batches is None:
        lacking = "total_steps" if epochs is batches is None else "steps_per_epoch" if batches is None else "epochs"
        raise ValueError(
            f"{lacking} must be given, got None; pass total_steps=, the number of the optimizer's steps, or epochs= and "
            "steps_per_epoch=len(loader), with accumulate=k where k batches make a step"
        )
    per_epoch = math.ceil(check_count("steps_per_epoch", batches) / k)
    return check_count("epochs", epochs) * per_epoch, per_epoch


def _unscale(optimizer: torch.optim.Optimizer) -> None:
    """Divide the gradients of a fused optimizer by a GradScaler's scale, which it would do in its step."""
    scale = getattr(optimizer, "grad_scale", None)
    if scale is not None:
        gradients = (p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None)
        for gradient in gradients:
            gradient.div_(scale.to(gradient.device))
        optimizer.grad_scale = None  # type: ignore[attr-defined]


def _as_tuple(x: Any) -> tuple[Any, ...]:
    return tuple(x) if isinstance(x, tuple | list) else (x,)


def _end_earlier_runs(optimizer: torch.optim.Optimizer, participants: Sequence[Participant]) -> None:
    for hook in [*optimizer._optimizer_step_pre_hooks.values()]:
        earlier = getattr(inspect.unwrap(hook), "__self__", None)
        if isinstance(earlier, Handle):
            step, total = earlier.loop.step, earlier.loop.total_steps
            words = f", with {lacking}" if (lacking := earlier.loop.shortfall()) else ""
            warn(f"an earlier run was still attached to this optimizer, at step {step} of {total}{words}: it ends here")
            earlier.remove(completed=False)
    for other in list(_handles):
        if other.loop.running and any(p is q for p in other.loop.participants for q in participants):
            other._end(False, REPLACED)


def _in_a_thread(function: Callable[[], str]) -> str:
    """Call a function in a thread of its own.

    Garbage may be collected in the midst of an export, which would take the tensor operations of this thread for the model's.
    """
    found = [""]
    thread = threading.Thread(target=lambda: found.__setitem__(0, function()))
    thread.start()
    thread.join()
    return found[0]
