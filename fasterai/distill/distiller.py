"""The distiller: a student learns from a teacher while it trains, beside its own task.

Over 300 lines, since one class answers to every event of a run, and keeps what it takes to go on later.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, distributed, nn

from fasterai.core import schedules
from fasterai.core.batch import Batch, Fit
from fasterai.core.checks import check_fraction, from_catalogue, noted, warn
from fasterai.core.joined import innermost
from fasterai.core.participant import Participant
from fasterai.core.saved import check_parts, list_of, mapping_of, tensor, whole
from fasterai.core.schedules import Schedule, as_schedule
from fasterai.display import Shown, Table, brief, settings
from fasterai.distill.capture import Capture, find_layers
from fasterai.distill.checks import (
    SIDES,
    Layers,
    adapter_state,
    check_fit,
    checked_layers,
    doubt_of,
    load_adapter_,
    name_of,
    range_of,
)
from fasterai.distill.following import Following, check_following, cut_adapter_, renew_adapter_
from fasterai.distill.losses.given import as_loss
from fasterai.distill.losses.loss import Adapter, FeatureLoss, LogitLoss, Loss
from fasterai.distill.losses.shapes import UnlikeShapesError
from fasterai.distill.processes import average_, begin_alike_, check_even, processes_of
from fasterai.distill.teachers import Answers, Teacher, as_teacher
from fasterai.model.cuts import Cut

__all__ = ["Distiller"]

_running: weakref.WeakSet[Distiller] = weakref.WeakSet()


class Distiller(Shown, Participant):
    """Adds what a teacher knows to the loss of the task: `(1 - w) * task + w * distillation`.

    The teacher runs in eval mode and without gradients, on the inputs of each training batch; its parameters never change.
    Validation is the task's alone. What has to train along, such as adapters between features of other shapes, joins the
    optimizer with the first batch, is saved and resumed with the run, and leaves with it; a further run goes on with its
    values. Where channels of the student go during the training, adapters and an average of the student lose the same ones.

    Args:
        teacher: The network that is learned from, a list of several, whose answers are averaged, or a `Teacher`.
        loss: The loss, or several, which are added up: values, their classes or names, or functions of the student's and the
            teacher's logits.
        activations_student: Layers of the student whose outputs the losses of features read, by name or themselves. Of a
            layer that runs several times in a pass it is the last output.
        activations_teacher: Those of the teacher, as many: the first belongs to the first, and so on.
        weight: The share `w` of the distillation in the loss, in [0, 1].
        schedule: The share of `weight` at each position of the run, its name, or a function; None for all of it throughout.

    Raises:
        ValueError: A weight is out of range, lists of layers are not of one length, or a loss of features has none.
        TypeError: An argument is of the wrong type.
    """

    def __init__(
        self,
        teacher: nn.Module | Teacher | Sequence[nn.Module | Teacher],
        loss: Any,
        activations_student: Layers | None = None,
        activations_teacher: Layers | None = None,
        *,
        weight: float = 0.5,
        schedule: Schedule | Callable[[float], float] | str | None = None,
    ) -> None:
        self.teacher = as_teacher(teacher)
        self.losses = [as_loss(one) for one in (loss if isinstance(loss, list | tuple) else [loss])]
        self.layers = checked_layers(self.losses, activations_student, activations_teacher)
        self.weight = check_fraction("weight", weight)
        self.schedule = None if schedule is None else as_schedule(from_catalogue("schedule", schedule, schedules))
        self._adapters: list[Adapter | None] | None = None  # None until the first batch of a run
        self._saved: list[dict[str, Tensor] | None] | None = None  # adapters of an earlier run, or of a loaded state
        self._is_loaded = False
        self._following = Following()
        self._capture: Capture | None = None
        self._seen: tuple[Answers, Answers] | None = None
        self._group: distributed.ProcessGroup | None = None
        self._release: Callable[[], object] | None = None
        self._optimizers: list[weakref.ref[Any]] = []  # weak: a run ends at the latest with its optimizer
        self._student: nn.Module | None = None
        self._step, self._total_steps = 0, 1
        self._sum: Tensor | None = None  # of the losses since the last figure, on the device
        self._count = 0
        self._doubt: Tensor | None = None  # 0, or NaN as soon as the teacher has said NaN or infinity
        self._figure = float("nan")
        self._is_first = True

    def _line(self) -> str:
        names = " + ".join(type(one).__name__ for one in self.losses)
        return f"<Distiller: {names} of {self.teacher!r}, weight {self.weight:g}>"

    def _parts(self) -> Iterator[Table | str]:
        pairs = ", ".join(f"{name_of(a)} - {name_of(b)}" for a, b in zip(*self.layers, strict=True))
        schedule = {} if self.schedule is None else {"schedule": brief(self.schedule)}
        layers = {"layers": pairs} if pairs else {}
        losses = ", ".join(map(brief, self.losses))
        yield settings({"teacher": repr(self.teacher), "loss": losses, **layers, "weight": self.weight, **schedule})

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy or a file has: all but the run."""
        gone = dict.fromkeys(("_adapters", "_capture", "_seen", "_group", "_release", "_student"))
        return {**vars(self), **gone, "_optimizers": [], "_saved": self._adapter_states()}

    def hears(self, event: str) -> bool:
        """Tell if it takes part in an event; in gradients only where several processes train copies of a student."""
        return super().hears(event) and (event != "after_backward" or processes_of(None) is not None)

    # --- a run -------------------------------------------------------------------------------------------------------

    def on_fit_start(self, fit: Fit) -> None:
        """Put hooks on the layers, and the teacher into eval mode.

        Raises:
            ValueError: There is no model, a layer is unknown, the teacher shares parameters with the student, or another
                distiller of the same training asks it.
        """
        if fit.model is None:
            raise ValueError("model must be given for a Distiller, whose student it is, got None; pass model=")
        self._end()
        self._check_alone(fit)
        found = find_layers(SIDES[0], fit.model, self.layers[0])
        self.teacher.begin(fit.model, self.layers[1])
        self._capture = Capture(SIDES[0], fit.model, found, graph=True)
        self._release = _release_with(fit.optimizer, self._capture, self.teacher)
        self._student, self._group = fit.model, processes_of(fit.model)
        self._optimizers = [weakref.ref(one) for one in fit.optimizers]
        _running.add(self)
        self._step, self._total_steps = 0, fit.total_steps
        self._sum = self._doubt = None
        self._count, self._figure = 0, float("nan")

    def _check_alone(self, fit: Fit) -> None:
        """Refuse a teacher of two distillers of one training: it would answer both for the same layers, and average twice."""
        for other in _running:
            of_one = any(one() is optimizer for one in other._optimizers for optimizer in fit.optimizers)
            if other is not self and other.teacher is self.teacher and of_one:
                raise ValueError(
                    f"teacher must be asked by one Distiller of a training, got {self.teacher!r} in two; give one of them all "
                    "losses, loss=[..., ...], or each a teacher of its own"
                )

    def after_forward(self, batch: Batch) -> None:
        """Let the teacher answer for the batch.

        Raises:
            ValueError: A layer did not run, or an answer lacks what a loss reads.
        """
        assert self._capture is not None
        own = Answers(batch.logits if self._reads_logits else None, self._capture.take())
        with noted(f"raised while the teacher answered, {self.teacher!r}"):
            other = self.teacher.answer(batch)
        if self._reads_logits and other.logits is None:
            raise ValueError(
                f"teacher must return logits, as a tensor, the first one of a tuple or the `logits` of a dict, for "
                f"{self._names()}, got none; wrap it in a module that does"
            )
        self._seen = own, other

    def on_first_batch(self, batch: Batch) -> Iterable[nn.Parameter]:
        """Make the adapters for the shapes of the first batch.

        Raises:
            ValueError: Labels are missing, the teacher says NaN, shapes cannot be adapted, or saved adapters do not fit.
        """
        assert self._seen is not None
        assert self._student is not None
        own, other = self._seen
        self._check_batch(batch, other)
        adapters = self._made(own, other)
        modules = [one for one in adapters if one is not None]
        if modules and self._group is not None:
            check_even(self._student)
            begin_alike_(modules, self._group)
        self._adapters, self._saved, self._is_loaded = adapters, None, False
        if not self._following.cuts:
            self._following = self._following.seen(self._student, own.features, other.features)
        return [p for one in modules for p in one.parameters()]

    def _check_batch(self, batch: Batch, other: Answers) -> None:
        assert self._student is not None
        for one in self.losses:
            one._check_labels(one.labels_of(batch))
            one.check_run(self._student, batch)
        for x in (other.logits, *other.features):
            if x is not None and not bool(doubt_of(x) == 0):
                raise ValueError(
                    f"teacher must give finite numbers, got NaN or infinity for the first batch; check its weights, and "
                    f"whether it is given inputs in the range that it was trained on, got {range_of(batch)}"
                )

    def _made(self, own: Answers, other: Answers) -> list[Adapter | None]:
        """Make the adapters, with the saved values where there are some; the loop's random numbers stay what they are."""
        features = [*own.features, *([own.logits] if own.logits is not None else [])]
        devices = {x.device.index or 0 for x in features if x.device.type == "cuda"}
        with torch.random.fork_rng(devices=sorted(devices)):
            try:
                made = self._restored(own, other)
            except ValueError:
                if self._is_loaded:
                    raise
                made = None  # those of an earlier run with another student
            if made is None:
                self._following = replace(self._following, first=())
                made = [self._adapter_of(one, own, other) for one in self.losses]
        return [one if one is None else one.to(features[0].device).train() for one in made]

    def _restored(self, own: Answers, other: Answers) -> list[Adapter | None] | None:
        """Make the adapters as they were made at first, with the saved values, which may be of fewer channels."""
        if self._saved is None:
            return None
        self._following.check_fit(own.features)
        mine, theirs = self._following.like_first(own.features, other.features)
        first = replace(own, features=mine), replace(other, features=theirs)
        made = [self._adapter_of(one, *first) for one in self.losses]
        for one, adapter, saved in zip(self.losses, made, self._saved, strict=True):
            if adapter is not None and saved is not None:
                load_adapter_(adapter, saved, type(one).__name__)
        return made

    def _adapter_of(self, one: Loss, own: Answers, other: Answers) -> Adapter | None:
        if not isinstance(one, FeatureLoss):
            return None
        try:
            return one.adapter(*self._pairs(one, own, other))
        except UnlikeShapesError as error:
            if not self.layers[0]:
                raise ValueError(error.message("both outputs")) from error
            student, teacher = (name_of(layers[error.pair]) for layers in self.layers)
            raise ValueError(error.message(f"the student's layer {student} and the teacher's {teacher}")) from error

    def after_loss(self, loss: Tensor, batch: Batch) -> Tensor:
        """Return `(1 - w) * loss + w * distillation`."""
        if self._seen is None or self._adapters is None:
            raise ValueError("after_forward must come before after_loss, with the outputs of the same batch; got a loss alone")
        (own, other), self._seen = self._seen, None
        if self._following.cuts:
            self._follow(own, other)
        with torch.autocast(loss.device.type, enabled=False):
            parts = [self._loss_of(i, one, own, other, one.labels_of(batch)) for i, one in enumerate(self.losses)]
        self._check_first(parts, own)
        value = parts[0] if len(parts) == 1 else torch.stack(parts).sum()
        self._note(value.detach(), other)
        task = loss if batch.loss is None else batch.loss
        mixed = torch.lerp(task, value.to(task.device, task.dtype), self._weight)
        return mixed if loss is task else mixed + (loss - task)  # what others have added stays whole, in either order

    def _check_first(self, parts: Sequence[Tensor], own: Answers) -> None:
        """Refuse a loss of finite answers that is not finite; only with a run's first batch, since it waits for a device."""
        is_first, self._is_first = self._is_first, False
        if not is_first or any(x is not None and not bool(doubt_of(x) == 0) for x in (own.logits, *own.features)):
            return
        for one, part in zip(self.losses, parts, strict=True):
            if not bool(part.isfinite()):
                raise ValueError(
                    f"loss must be finite for finite answers, got {float(part.detach())} from {one!r}; functions get logits, "
                    "not probabilities or their logarithms"
                )

    def _loss_of(self, index: int, one: Loss, own: Answers, other: Answers, labels: Any) -> Tensor:
        assert self._adapters is not None
        adapter = self._adapters[index]
        if isinstance(one, FeatureLoss):
            return one(*self._pairs(one, own, other), labels, adapter)
        assert isinstance(one, LogitLoss)
        assert own.logits is not None
        assert other.logits is not None
        return one(own.logits, other.logits, labels)

    def _pairs(self, one: FeatureLoss, own: Answers, other: Answers) -> tuple[list[Tensor], list[Tensor]]:
        if self.layers[0]:
            return list(own.features), list(other.features)
        assert own.logits is not None
        assert other.logits is not None
        return [own.logits], [other.logits]

    @property
    def _reads_logits(self) -> bool:
        return any(isinstance(one, LogitLoss) for one in self.losses) or not self.layers[0]

    @property
    def _weight(self) -> float:
        """The weight of the step under way, the same for all of its batches."""
        if self.schedule is None:
            return self.weight
        share = float(self.schedule((self._step + 1) / self._total_steps))
        return self.weight * check_fraction("schedule", share)

    def _names(self) -> str:
        return ", ".join(type(one).__name__ for one in self.losses)

    def _note(self, value: Tensor, other: Answers) -> None:
        """Add to the figures; nothing here waits for a device."""
        self._sum = value if self._sum is None else self._sum.to(value.device) + value
        self._count += 1
        for x in (other.logits, *other.features):
            if x is not None:
                doubt = doubt_of(x)
                self._doubt = doubt if self._doubt is None else self._doubt + doubt

    def after_backward(self) -> None:
        """Replace the gradients of adapters by their means over processes, as those of the student are."""
        if self._group is not None:
            average_([one for one in self._adapters or () if one is not None], self._group)

    def after_step(self, position: float) -> None:
        """Count the step."""
        self._step = round(position * self._total_steps)
        self._seen = None
        if self._capture is not None:
            self._capture.forget()
        self.teacher.after_step()
        self.teacher.at_position(position)

    def metrics(self) -> dict[str, float]:
        """Return the mean of the distillation loss over the batches since it was last asked for.

        Raises:
            ValueError: The teacher has said NaN or infinity.
        """
        if self._sum is not None:
            self._check_doubt()
            self._figure = float(self._sum) / self._count
            self._sum, self._count = None, 0
        return {"distill_loss": self._figure}

    def _check_doubt(self) -> None:
        doubt, self._doubt = self._doubt, None
        if doubt is not None and not bool(doubt == 0):
            raise ValueError(
                f"teacher must give finite numbers, got NaN or infinity in the steps up to {self._step}; check its weights and "
                "the batches, and go on from a checkpoint of before"
            )

    def on_fit_end(self, completed: bool) -> None:
        """Take the hooks off, and give the teacher its modes back.

        Raises:
            ValueError: The run was completed, and the teacher has said NaN or infinity.
        """
        self._end()
        if completed:
            self._check_doubt()
        self._doubt = None

    def _end(self) -> None:
        self._saved, self._adapters = self._adapter_states(), None
        release, self._release = self._release, None
        if release is not None:
            release()
        self._capture = self._seen = self._group = self._student = None
        self._optimizers = []
        _running.discard(self)

    # --- a student whose channels go -----------------------------------------------------------------------------------

    def after_cut(self, cut: Cut) -> None:
        """Note that parameters of the student have got smaller; adapters follow with the next batch."""
        following = self._following
        if self._is_loaded and self._adapters is None:
            return  # a pruner cuts a dense student to what it was when the state was saved, which knows of it
        self._following = replace(following, cuts=(*following.cuts, cut))  # a removal that is undone puts the old one back

    def _follow(self, own: Answers, other: Answers) -> None:
        """Let the adapters follow the student's features, before any of them is compared."""
        assert self._student is not None
        before = self._following
        news = before.news(self._student, own.features)
        self._following = before.seen(self._student, own.features, other.features)
        for index, (dim, kept) in news.items():
            along = before.went_along(index, other.features[index])
            if along and before.was_alike(index):
                continue  # the same channels have gone on both sides
            for one, adapter in zip(self.losses, self._adapters or (), strict=True):
                if not isinstance(one, FeatureLoss) or adapter is None or not self.layers[0]:
                    continue
                if kept is None or along:
                    self._renew(one, adapter, self._pairs(one, own, other), index, dim)
                else:
                    cut_adapter_(adapter, index, kept, [one() for one in self._optimizers])

    def _renew(self, one: FeatureLoss, adapter: Adapter, pairs: Any, index: int, dim: int) -> None:
        """Let an adapter begin afresh, with a warning, where it cannot be told which channels are left."""
        feature = pairs[0][index]
        warn(
            f"the adapter of {type(one).__name__} begins afresh: it cannot be told which channels a removal has left of the "
            f"outputs of {name_of(self.layers[0][index])}, which have {feature.shape[dim]} now"
        )
        made = one.adapter(*pairs)
        assert made is not None
        renew_adapter_(adapter, made.to(feature.device).train(), [one() for one in self._optimizers])

    # --- saving and going on -----------------------------------------------------------------------------------------

    def _adapter_states(self) -> list[dict[str, Tensor] | None] | None:
        if self._adapters is None:
            return self._saved
        return [None if one is None else {n: x.detach().clone() for n, x in one.state_dict().items()} for one in self._adapters]

    def state_dict(self) -> dict[str, Any]:
        """Return the step, the adapters, the shapes of what they read, and the teacher's state."""
        return {
            "step": self._step,
            "adapters": self._adapter_states() or [],
            "following": self._following.state_dict(),
            "sum": torch.zeros(()) if self._sum is None else self._sum.clone(),
            "count": self._count,
            "teacher": self.teacher.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state; before the first batch, adapters take theirs over when they are made.

        Raises:
            ValueError: It is no state of a `Distiller`, or of another one. Nothing is changed then.
            TypeError: A part of it is of the wrong type.
        """
        parts = {"step": whole, "adapters": list_of(adapter_state), "following": check_following, "sum": tensor, "count": whole}
        check_parts(state, "Distiller", {**parts, "teacher": mapping_of(lambda *_: None)})
        following = Following.of_state(state["following"])
        following.check_layers(len(self.layers[0]))
        adapters: list[dict[str, Tensor] | None] = list(state["adapters"])
        if adapters and len(adapters) != len(self.losses):
            raise ValueError(f"state must be of {len(self.losses)} losses, got {len(adapters)}")
        made = [] if self._adapters is None else self._adapters
        for one, saved, loss in zip(made, adapters, self.losses, strict=False):
            check_fit(one, saved, type(loss).__name__)
        self.teacher.check_state(state["teacher"])
        self.teacher.load_state_dict(state["teacher"])
        self._step, self._following = state["step"], following
        self._sum, self._count = state["sum"].clone() if state["count"] else None, state["count"]
        if self._student is not None and not self._following.cuts:
            self._following = self._following.at_present(self._student)
        for one, saved in zip(made, adapters, strict=False):
            if one is not None and saved is not None:
                one.load_state_dict(saved)
        if self._adapters is None:
            self._is_loaded = True
            self._saved = [None if one is None else {n: x.detach().clone() for n, x in one.items()} for one in adapters] or None


def _release_with(optimizer: Any, capture: Capture, teacher: Teacher) -> Callable[[], object]:
    """Return what ends the run, and is called at the latest when its optimizer is gone: no step can follow then."""

    def release() -> None:
        capture.remove()
        teacher.end()

    one = innermost(optimizer[0] if isinstance(optimizer, list | tuple) and optimizer else optimizer)
    if not hasattr(one, "__weakref__"):
        return release
    finalizer = weakref.finalize(one, release)
    finalizer.atexit = False
    return finalizer
