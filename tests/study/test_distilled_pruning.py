"""The study of pruning with a teacher: who teaches, what is pruned, and what is taken out."""

from __future__ import annotations

import copy

import pytest
import torch

from fasterai.distill.distiller import Distiller
from fasterai.sparse.sparsifier import Sparsifier
from fasterai.study import distilled_pruning as study
from fasterai.study.data import load_data
from fasterai.study.description import Size
from fasterai.study.distilled_pruning import DISTILLED, DISTILLED_SCRATCH, PLAIN, SCRATCH, trial

SIZE = Size("tiny", 64, 60, 8, epochs=1, batch_size=16)


@pytest.fixture(scope="module")
def data():
    return load_data(None, SIZE)


@pytest.mark.parametrize("how", [PLAIN, DISTILLED, SCRATCH, DISTILLED_SCRATCH])
def test_the_student_is_the_trained_network_or_a_new_one_and_the_teacher_the_trained_one(how, data, monkeypatch):
    found = []
    train = study.train

    def look(network, data, participants=(), **options):
        found.append((copy.deepcopy(network.state_dict()), list(participants), options["lr"]))
        train(network, data, participants, **options)

    dense = study._dense(0, SIZE, data)
    monkeypatch.setattr(study, "train", look)
    figures = trial({"training": how, "granularity": "weight", "sparsity": 0.8}, 0, SIZE, data)
    ((first, participants, lr),) = found
    trained = how in (PLAIN, DISTILLED)
    assert torch.equal(first["0.weight"], dense.state_dict()["0.weight"]) is trained
    assert lr == (0.5 if trained else 1) * SIZE.lr
    teachers = [one.teacher.model for one in participants if isinstance(one, Distiller)]
    assert len(teachers) == (how in (DISTILLED, DISTILLED_SCRATCH))
    for teacher in teachers:
        assert teacher is not dense
        assert all(torch.equal(x, dense.state_dict()[n]) for n, x in teacher.state_dict().items())
    (sparsifier,) = (one for one in participants if isinstance(one, Sparsifier))
    assert sparsifier.sparsity.overall == pytest.approx(0.8, abs=1e-3)
    assert figures["unpruned_accuracy"] == study.accuracy(copy.deepcopy(dense), data)


def test_coupled_channels_are_out_of_the_network_that_is_measured(data, monkeypatch):
    widths = []
    accuracy = study.accuracy
    monkeypatch.setattr(
        study, "accuracy", lambda network, data: widths.append(len(network[0].weight)) or accuracy(network, data)
    )
    figures = trial({"training": PLAIN, "granularity": "coupled", "sparsity": 0.5}, 0, SIZE, data)
    assert sorted(widths) == [8, 16]
    assert figures["parameters"] < 77_562 / 3
