"""Training along a route, stage by stage, and its progress, which is kept after each stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fasterai.core.batch import Fit
from fasterai.core.files import write_saved
from fasterai.core.participant import Participant
from fasterai.core.saved import check_parts, equal_to, list_of, mapping_of, tensor, text
from fasterai.distill.distiller import Distiller
from fasterai.distill.routes.hardness import Greedy, held_out_batches, next_anchor
from fasterai.distill.routes.result import RouteResult, Stage
from fasterai.model.cuts import check_trains
from fasterai.model.progress import UNREADABLE, check_same_call, keep_random_state, put_random_state_, random_state
from fasterai.model.snapshots import clear_states_, put_back_, sum_of, take_snapshot

__all__ = ["Journey", "StageGuard", "Train"]

NAME, STAGES_FORMAT = "stages.pt", "fasterai-stages-1"
Train = Callable[[nn.Module, list[Participant]], object]


class StageGuard(Participant):
    """Sees to it that a stage trains the student once, with its distiller, from an optimizer without a memory.

    Args:
        student: The student, wrapped or not.
        company: The participants that have to be in the run as well.
        clears: Whether an optimizer's state is cleared as the run begins.
    """

    def __init__(self, student: nn.Module, company: Sequence[Participant], clears: bool) -> None:
        self.student, self.company, self.clears = student, tuple(company), clears
        self.steps, self.is_completed = 0, False
        self._fit: Fit | None = None

    def relies_on(self) -> Sequence[Participant]:
        """Return the stage's distiller."""
        return self.company

    def on_fit_start(self, fit: Fit) -> None:
        """Begin the stage's one run.

        Raises:
            ValueError: It is a second one, or it trains another model.
        """
        if self.is_completed:
            raise ValueError("train must train once in a stage, got a second run with its participants; pass them to one fit")
        check_trains(fit.optimizer, self.student.parameters(), "the student that train was given", "its parameters")
        self._fit = fit
        if self.clears:
            clear_states_(fit.optimizers)

    def after_step(self, position: float) -> None:
        """Count the step."""
        self.steps += 1

    def on_fit_end(self, completed: bool) -> None:
        """End the run; one of a search is forgotten."""
        if self._fit is not None and self._fit.is_search():
            self.steps = 0
        else:
            self.is_completed = completed
        self._fit = None

    def check_used(self) -> None:
        """Refuse a training in which it did not take part.

        Raises:
            ValueError: No step was taken with it.
        """
        if not self.steps:
            raise ValueError(
                "train must let the participants take part in its training, got one that took no step with them; pass them on: "
                "attach(optimizer, *participants, ...), or ParticipantCallback(*participants)"
            )


@dataclass(frozen=True)
class Progress:
    """Progress of a training after some stages.

    Attributes:
        stages: The stages that are done.
        following: The place of the next anchor; None after the last one.
        weights: The student's tensors; empty before the first stage.
        random: The states of the random generators.
    """

    stages: tuple[Stage, ...] = ()
    following: int | None = 0
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    random: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Journey:
    """The stages of one call.

    Attributes:
        train: The user's training of a stage.
        student: The student.
        anchors: The names of the anchors.
        load: Loads an anchor by its place, and returns the teacher.
        distiller: Makes the distiller of a stage from its teacher.
        measure: Measures the hardness of anchors from a place on, for the student.
        greedy: How anchors are chosen; None for all of them.
        words: The settings in words.
        folder: Where progress is kept, if anywhere.
    """

    train: Train
    student: nn.Module
    anchors: tuple[str, ...]
    load: Callable[[int], nn.Module]
    distiller: Callable[[nn.Module], Distiller]
    measure: Callable[..., list[float]]
    greedy: Greedy | None
    words: Mapping[str, str]
    folder: Path | None

    def run(self) -> RouteResult:
        """Go through the stages that are left; if one fails, the student is as it was."""
        start = take_snapshot(self.student)
        try:
            progress = read_progress(self.folder, self.words, start)
            put_back_(self.student, progress.weights)
            while progress.following is not None:
                progress = self._stage(progress.following, progress)
                if self.folder is not None:
                    write_progress(self.folder, self.words, start, progress)
        except BaseException:
            put_back_(self.student, start)
            raise
        return RouteResult(progress.stages, self.anchors)

    def _stage(self, i: int, before: Progress) -> Progress:
        """Train with one anchor, and choose the next."""
        distiller = self.distiller(self.load(i))
        guard = StageGuard(self.student, [distiller], clears=bool(before.stages))
        put_random_state_(before.random)
        result = self.train(self.student, [distiller, guard])
        guard.check_used()
        score = float(result) if isinstance(result, Real) and not isinstance(result, bool) else None
        following, hardness = self._next(i)
        stages = (*before.stages, Stage(i, score, hardness))
        return Progress(stages, following, take_snapshot(self.student), keep_random_state())

    def _next(self, i: int) -> tuple[int | None, tuple[float, ...]]:
        last = len(self.anchors) - 1
        if self.greedy is None:
            return (i + 1 if i < last else None), ()
        found = self.measure(self.student, held_out_batches(self.greedy.data), i)
        following = next_anchor(found, 0, self.greedy.delta)
        return (None if following is None else i + following), tuple(found)


# --- progress in a folder ------------------------------------------------------------------------------------------------


def write_progress(folder: Path, words: Mapping[str, str], start: Mapping[str, Tensor], progress: Progress) -> None:
    """Write the progress into its folder, whole or not at all."""
    stages = [[one.anchor, one.score, list(one.hardness)] for one in progress.stages]
    own = {"format": STAGES_FORMAT, "settings": dict(words), "start": sum_of(start), "stages": stages}
    content = {"next": progress.following, "weights": dict(progress.weights), "random": dict(progress.random)}
    write_saved(folder / NAME, {**own, **content})


def read_progress(folder: Path | None, words: Mapping[str, str], start: Mapping[str, Tensor]) -> Progress:
    """Return the progress that a folder holds, which is made if it is not there; nothing done if it holds none.

    Raises:
        ValueError: The folder is of a call with other settings or another student, or its file is none of these.
    """
    if folder is None:
        return Progress()
    folder.mkdir(parents=True, exist_ok=True)
    if not (path := folder / NAME).exists():
        return Progress()
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
        parts = {"format": equal_to(STAGES_FORMAT), "settings": mapping_of(text), "start": text, "weights": mapping_of(tensor)}
        check_parts(state, "distil", {**parts, "stages": list_of(_stage), "next": _following, "random": random_state})
    except UNREADABLE as error:
        raise ValueError(f"folder must hold what distil has written, got {path}, which is none: {error}") from error
    check_same_call(folder, state, words, start, ("stages of a student", "the training"))
    stages = tuple(Stage(anchor, score, tuple(hardness)) for anchor, score, hardness in state["stages"])
    return Progress(stages, state["next"], state["weights"], state["random"])


def _stage(what: str, value: Any) -> None:
    if not (isinstance(value, list) and len(value) == 3 and isinstance(value[0], int) and isinstance(value[2], list)):
        raise TypeError(f"{what} must be stages, got {value!r}")


def _following(what: str, value: Any) -> None:
    if value is not None and not isinstance(value, int):
        raise TypeError(f"{what} must be a place or None, got {value!r}")
