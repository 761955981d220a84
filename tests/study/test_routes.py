"""Study of routes: each way trains as often, and from the anchors, that it says."""

from __future__ import annotations

import pytest

from fasterai.study import routes
from fasterai.study.data import load_data
from fasterai.study.description import Size
from fasterai.study.routes import ALONE, GREEDY, ONE_STAGE, PLAIN, RESTARTS, STAGES, TEACHER, trial

SIZE = Size("tiny", 96, 60, 8, epochs=2, batch_size=32)


@pytest.fixture(scope="module")
def data():
    return load_data(None, SIZE)


@pytest.mark.parametrize(
    ("way", "budget", "trainings"),
    [
        (TEACHER, 2, 2),
        (ALONE, 4, 4),
        (PLAIN, 1, 1),
        (ONE_STAGE, 1, 1),
        (STAGES, 4, 4),
        (RESTARTS, 4, 4),
    ],
)
def test_ways_train_as_often_as_they_say(way, budget, trainings, data, monkeypatch):
    steps, train = [], routes.train

    def counted(network, images, participants, *, epochs, **options):
        steps.append(epochs)
        train(network, images, participants, epochs=epochs, **options)

    taught = routes._teacher(0, SIZE, data)
    names = [one.name for one in taught.route.anchors]
    assert len(names) == routes.ANCHORS
    monkeypatch.setattr(routes, "train", counted)
    figures = trial({"way": way, "budget": budget}, 0, SIZE, data)
    assert figures["trainings"] == trainings and sum(steps) == (0 if way == TEACHER else SIZE.epochs * trainings)
    assert 0 <= figures["accuracy"] <= 1


def test_images_held_out_are_not_trained_on(data):
    parts = routes._split(data)
    held = sum(len(x) for x in parts.held_out)
    assert held == 96 // 8 and len(parts.data.train[1]) == 96 - held
    assert trial({"way": GREEDY, "budget": None}, 0, SIZE, data)["trainings"] <= routes.ANCHORS
