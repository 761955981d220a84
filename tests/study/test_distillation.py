"""The study of distillation: every student starts and is fed alike, and the weights of the losses follow one rule."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from fasterai.callbacks.plain import attach
from fasterai.study import distillation as study
from fasterai.study.data import load_data
from fasterai.study.description import Size
from fasterai.study.distillation import ALL, ALONE, FEW, METHODS, TEACHER, Course, trial
from fasterai.study.workbench import accuracy

SIZE = Size("tiny", 128, 60, 8, epochs=2, batch_size=16)


@pytest.fixture(scope="module")
def data():
    return load_data(None, SIZE)


@pytest.fixture
def trained(monkeypatch):
    """What is trained: network as it began, images, epochs, participants."""
    found = []

    def look(network, data, participants=(), **options):
        first = {n: x.clone() for n, x in network.state_dict().items()}
        found.append((first, data, options["epochs"], list(participants)))
        train(network, data, participants, **options)

    train = study.train
    monkeypatch.setattr(study, "train", look)
    return found


def test_students_begin_with_the_same_weights_and_take_as_many_steps_on_a_quarter_of_the_images(data, trained):
    study._teacher.cache_clear()
    for images, loss in ((ALL, ALONE), (ALL, "SoftTarget"), (FEW, "SoftTarget")):
        trial({"images": images, "loss": loss}, 0, SIZE, data)
    alone, teacher, distilled, few = trained
    for name, x in alone[0].items():
        assert torch.equal(x, distilled[0][name]) and torch.equal(x, few[0][name])
    assert [len(one[1].train[1]) for one in trained] == [128, 128, 128, 32]
    assert [one[2] for one in trained] == [2, 4, 2, 8]
    assert teacher[0]["0.weight"].shape[0] == 3 * alone[0]["0.weight"].shape[0]
    assert len(alone[3]) == 1 and distilled[3][0].teacher.model is few[3][0].teacher.model


def test_the_teacher_is_as_it_was_after_every_student_and_is_a_row_of_its_own(data):
    study._teacher.cache_clear()
    teacher = study._teacher(0, SIZE, data)
    before = {n: x.clone() for n, x in teacher.state_dict().items()}
    for loss in METHODS:
        trial({"images": FEW, "loss": loss}, 0, SIZE, data)
    assert study._teacher(0, SIZE, data) is teacher
    assert all(torch.equal(x, before[n]) for n, x in teacher.state_dict().items())
    assert trial({"images": FEW, "loss": TEACHER}, 0, SIZE, data) == {"accuracy": accuracy(teacher, data)}


#: Loss -> the published (or, for DIST and the sum, our) coefficients of the task and of the distillation.
PUBLISHED = {
    "SoftTarget": (0.1, 0.9),
    "SoftTarget, standardised": (0.1, 9.0),
    "DKD": (1.0, 1.0),
    "NKD": (1.0, 1.0),
    "DIST": (1.0, 1.0),
    "FitNet": (1.0, 100.0),
    "Attention": (1.0, 1000.0),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_proportion_between_task_and_distillation_is_the_published_one(name):
    method, (task, distilled) = METHODS[name], PUBLISHED[name]
    (loss,) = method.losses
    scaled = loss.scale * method.weight / (1 - method.weight)
    assert scaled == pytest.approx(distilled / task)
    assert 1 - method.weight == pytest.approx(task if task < 1 else 0.5)


def test_the_course_measures_at_the_end_of_each_part_and_leaves_the_network_in_training(data):
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.BatchNorm1d(10)).train()
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    course = Course(network, data, 3)
    expected = []
    with attach(optimizer, course, total_steps=6):
        for step in range(6):
            optimizer.zero_grad()
            network(data.train[0][:8]).square().sum().backward()
            optimizer.step()
            if step % 2:
                expected.append(accuracy(network, data))
                network.train()
            assert network[2].training
    assert course.metrics_of() == {"accuracy": expected[2], **{f"epoch_{i}_accuracy": x for i, x in enumerate(expected, 1)}}


def test_a_cached_teacher_gives_the_same_students_as_the_live_one(data):
    asked = []
    teacher = study._teacher(0, SIZE, data)
    teacher.register_forward_hook(lambda module, x, out: asked.append(len(out)))
    live = trial({"images": FEW, "loss": "SoftTarget, unmirrored"}, 0, SIZE, data)
    count = len(asked)
    asked.clear()
    assert trial({"images": FEW, "loss": "SoftTarget, unmirrored, cached"}, 0, SIZE, data) == live
    assert 0 < len(asked) < count
    study._teacher.cache_clear()


def test_only_unmirrored_students_see_no_mirrored_images(data, trained):
    for loss in ("SoftTarget", "SoftTarget, unmirrored"):
        trial({"images": FEW, "loss": loss}, 0, SIZE, replace(data, flip=True))
    assert [one[1].flip for one in trained if len(one[1].train[1]) == 32] == [True, False]
