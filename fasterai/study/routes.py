"""Study of routes: a student that learns from a teacher's way, beside the converged teacher at equal cost."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from fasterai.core.participant import Participant
from fasterai.distill.distiller import Distiller
from fasterai.distill.losses.logits import SoftTarget
from fasterai.distill.routes.hardness import Greedy
from fasterai.distill.routes.recorder import RouteRecorder
from fasterai.distill.routes.route import Route
from fasterai.study.data import Data
from fasterai.study.description import SIZES, Settings, Size, Study
from fasterai.study.workbench import accuracy, make_residual, train

__all__ = ["STUDY", "trial"]

TEACHER, ALONE, PLAIN, ONE_STAGE = "teacher", "student alone", "plain", "route, one stage"
STAGES, RESTARTS, GREEDY = "route, stage by stage", "plain, restarted", "route, greedy"
TEACHER_WIDTH, STUDENT_WIDTH = 24, 8
#: Anchors of the teacher, which trains twice as long as a student once; those of the stages; the share held out for `Greedy`.
ANCHORS, STAGE_COUNT, HELD_OUT = 8, 4, 8
WEIGHT, LOSS = 0.9, SoftTarget(T=4)


def trial(settings: Settings, seed: int, size: Size, data: Data) -> dict[str, float]:
    """Train a student, alone or with a teacher, for as many trainings as the setting says; `trainings` counts them.

    All networks train on seven eighths of the images; by the rest the greedy choice measures hardness.
    """
    way, parts, epochs = settings["way"], _split(data), size.epochs
    taught = _teacher(seed, size, data)
    if way == TEACHER:
        return {"accuracy": accuracy(taught.last(), data), "trainings": 2}
    torch.manual_seed(seed)
    student = make_residual(data, STUDENT_WIDTH)
    if way in (STAGES, RESTARTS, GREEDY):
        return _in_stages(way, taught.route, student, _training(seed, epochs, size, parts, data), parts)
    count = settings["budget"]
    teacher = {ALONE: None, PLAIN: taught.last(), ONE_STAGE: taught.route.one_stage()}[way]
    company = [] if teacher is None else [Distiller(teacher, LOSS, weight=WEIGHT)]
    return {"accuracy": _training(seed, count * epochs, size, parts, data)(student, company), "trainings": count}


def _in_stages(way: str, route: Route, student: nn.Module, once: Train, parts: Parts) -> dict[str, float]:
    choose = Greedy(0.8, parts.held_out) if way == GREEDY else None
    if way == RESTARTS:
        route = Route(route.anchors[-1:] * STAGE_COUNT, route.model)
    elif way == STAGES:
        route = route.every(ANCHORS // STAGE_COUNT)
    result = route.distil(once, student, LOSS, WEIGHT, choose=choose)
    return {"accuracy": float(result.stages[-1].score or 0.0), "trainings": len(result.stages)}


Train = Callable[[nn.Module, Sequence[Participant]], float]


def _training(seed: int, epochs: int, size: Size, parts: Parts, data: Data) -> Train:
    def once(network: nn.Module, participants: Sequence[Participant]) -> float:
        train(network, parts.data, participants, epochs=epochs, lr=size.lr, seed=seed, batch_size=size.batch_size)
        return accuracy(network, data)

    return once


@dataclass(frozen=True, eq=False)
class Parts:
    """Images to train on, and batches held out."""

    data: Data
    held_out: list[Any]


@lru_cache(maxsize=2)
def _split(data: Data) -> Parts:
    images, labels = data.train
    count = len(labels) // HELD_OUT
    kept = replace(data, train=(images[:-count], labels[:-count]))
    return Parts(kept, list(torch.split(images[-count:], 500)))


@dataclass(frozen=True, eq=False)
class Taught:
    """Route of a teacher, whose anchors lie in a folder for as long as this is there."""

    route: Route
    folder: Any

    def last(self) -> nn.Module:
        """Return the converged teacher."""
        return self.route.load(len(self.route) - 1)


@lru_cache(maxsize=2)
def _teacher(seed: int, size: Size, data: Data) -> Taught:
    """Train the teacher of a seed, and record its route."""
    torch.manual_seed(seed + 1000)
    network, folder = make_residual(data, TEACHER_WIDTH), tempfile.TemporaryDirectory()
    parts, epochs = _split(data), 2 * size.epochs
    steps = epochs * max(1, len(parts.data.train[1]) // size.batch_size)
    recorder = RouteRecorder(folder.name, steps=max(1, steps // ANCHORS))
    _training(seed + 1000, epochs, size, parts, data)(network, [recorder])
    return Taught(Route.from_checkpoints(recorder.files[: ANCHORS - 1] + recorder.files[-1:], network), folder)


GRID: list[dict[str, Sequence[Any]]] = [
    {"way": [TEACHER], "budget": [2]},
    {"way": [ALONE, PLAIN, ONE_STAGE], "budget": [1, STAGE_COUNT]},
    {"way": [STAGES, RESTARTS], "budget": [STAGE_COUNT]},
    {"way": [GREEDY], "budget": [None]},
]
STUDY = Study(
    name="routes",
    about="Routes of a teacher that a student follows, beside the converged teacher at equal cost",
    trial=trial,
    grids={"small": GRID, "full": GRID},
    seeds={"full": range(5)},
    x="trainings",
    lines="way",
    reference={"way": TEACHER},
    sizes={**SIZES, "small": Size("small", 4_000, 2_000, 16, epochs=4)},
)
