"""Study of distillation losses: a small network that learns from a large one, beside the same network alone."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fasterai.core.participant import Participant
from fasterai.distill.cache.caching import cache_teacher
from fasterai.distill.distiller import Distiller
from fasterai.distill.losses.features import Attention, FitNet
from fasterai.distill.losses.logits import DIST, DKD, NKD, SoftTarget, Standardised
from fasterai.distill.losses.loss import Loss
from fasterai.distill.teachers import Teacher
from fasterai.study.data import Data
from fasterai.study.description import SIZES, Settings, Size, Study
from fasterai.study.workbench import accuracy, make_residual, train

__all__ = ["METHODS", "STUDY", "Course", "Method", "trial"]

ALONE, TEACHER = "student alone", "teacher"
#: The images that the student sees; the teacher has seen all of them.
ALL, FEW = "all images", "a quarter of the images"
QUARTER = 4
#: How many times as long as a student its teacher is trained.
LONGER = 2
TEACHER_WIDTH, STUDENT_WIDTH = 24, 8
#: The three blocks of the network, which both have.
BLOCKS = ("3", "4", "5")


@dataclass(frozen=True)
class Method:
    """Way in which a student learns from its teacher.

    Published sums are `a * task + b * distillation`. Where a + b is 1 they are taken as they are, with the weight b; else the
    weight is a half and the scale b / a, so that the proportion between both is the published one.

    Attributes:
        losses: The losses, which are added up.
        weight: The share of the distillation.
        layers: The layers that losses of features compare.
        flip: Whether images are mirrored at random; a cached teacher knows no other images than those of the data set.
        cached: Whether the teacher's answers are worked out once, and read back.
    """

    losses: tuple[Loss, ...]
    weight: float = 0.5
    layers: tuple[str, ...] = ()
    flip: bool = True
    cached: bool = False

    def distiller(self, teacher: nn.Module | Teacher) -> Distiller:
        """Return the distiller of a run."""
        layers = list(self.layers) or None
        return Distiller(teacher, self.losses, layers, layers, weight=self.weight)


METHODS: dict[str, Method] = {
    "SoftTarget": Method((SoftTarget(T=4),), 0.9),
    "SoftTarget, standardised": Method((Standardised(SoftTarget(T=2), scale=10.0),), 0.9),
    "DKD": Method((DKD(),)),
    "NKD": Method((NKD(),)),
    "DIST": Method((DIST(),)),
    "FitNet": Method((FitNet(scale=100.0),), layers=BLOCKS[-1:]),
    "Attention": Method((Attention(scale=1000.0),), layers=BLOCKS),
    "SoftTarget + Attention": Method((SoftTarget(T=4, scale=0.9), Attention(scale=100.0)), 0.9, BLOCKS),
    "SoftTarget, unmirrored": Method((SoftTarget(T=4),), 0.9, flip=False),
    "SoftTarget, unmirrored, cached": Method((SoftTarget(T=4),), 0.9, flip=False, cached=True),
}


class Course(Participant):
    """Measures the accuracy on the test images again and again while a network trains.

    Args:
        network: The network, which is left in training mode.
        data: The images.
        count: How often, at equal distances, the last time at the end.
    """

    def __init__(self, network: nn.Module, data: Data, count: int) -> None:
        self.network, self.data, self.count = network, data, count
        self.values: list[float] = []

    def after_step(self, position: float) -> None:
        """Measure where another part of the run is done."""
        if position * self.count >= len(self.values) + 1 - 1e-9:
            self.values.append(accuracy(self.network, self.data))
            self.network.train()

    def metrics_of(self) -> dict[str, float]:
        """Return the accuracy at the end of each epoch, and of the last."""
        course = {f"epoch_{i}_accuracy": value for i, value in enumerate(self.values, 1)}
        return {"accuracy": self.values[-1], **course}


def trial(settings: Settings, seed: int, size: Size, data: Data) -> dict[str, float]:
    """Train a student with its teacher, or alone; every student takes as many steps."""
    if settings["loss"] == TEACHER:
        return {"accuracy": accuracy(_teacher(seed, size, data), data)}
    method = METHODS.get(settings["loss"])
    images, epochs = (data, size.epochs) if settings["images"] == ALL else (_few(data), QUARTER * size.epochs)
    torch.manual_seed(seed)
    network = make_residual(data, STUDENT_WIDTH)
    course = Course(network, data, size.epochs)
    participants: list[Participant] = [course]
    with tempfile.TemporaryDirectory() as folder:
        if method is not None:
            teacher: nn.Module | Teacher = _teacher(seed, size, data)
            images = replace(images, flip=images.flip and method.flip)
            if method.cached:
                teacher = cache_teacher(teacher, images.train, Path(folder, "answers.safetensors"), dtype=torch.float32)
            participants = [method.distiller(teacher), course]
        train(network, images, participants, epochs=epochs, lr=size.lr, seed=seed, batch_size=size.batch_size)
    return course.metrics_of()


@lru_cache(maxsize=2)
def _teacher(seed: int, size: Size, data: Data) -> nn.Module:
    """Train the teacher of a seed on all images, for longer than a student."""
    torch.manual_seed(seed + 1000)
    network = make_residual(data, TEACHER_WIDTH)
    train(network, data, epochs=LONGER * size.epochs, lr=size.lr, seed=seed + 1000, batch_size=size.batch_size)
    return network


def _few(data: Data) -> Data:
    """Return the data with a quarter of its training images."""
    count = max(2, len(data.train[1]) // QUARTER)
    return replace(data, train=(data.train[0][:count], data.train[1][:count]))


GRID: list[dict[str, Sequence[Any]]] = [
    {"images": [FEW, ALL], "loss": [TEACHER]},
    {"images": [FEW], "loss": [ALONE, *METHODS]},
    {"images": [ALL], "loss": [ALONE, "SoftTarget"]},
]
STUDY = Study(
    name="distillation",
    about="Losses that a student learns from its teacher by",
    trial=trial,
    grids={"small": GRID, "full": GRID},
    seeds={"full": range(5)},
    x="epoch",
    lines="loss",
    panels="images",
    reference={"loss": TEACHER},
    sizes={**SIZES, "small": Size("small", 4_000, 2_000, 16, epochs=4)},
)
