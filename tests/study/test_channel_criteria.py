"""The study of criteria for channels: what each side takes out, and what it is measured by."""

from __future__ import annotations

import sys

import pytest

from fasterai.study import channel_criteria as study
from fasterai.study.channel_criteria import DENSE, OURS, PEER, PEERS, STUDY, load_torch_pruning, trial
from fasterai.study.data import load_data
from fasterai.study.description import Size

SIZE = Size("tiny", 64, 40, 8, epochs=1, batch_size=32)


@pytest.fixture(scope="module")
def data():
    return load_data(None, SIZE)


@pytest.fixture(autouse=True)
def trained(monkeypatch):
    """Epochs and rates of the trainings, none of which is done."""
    seen = []
    monkeypatch.setattr(study, "train", lambda network, data, **options: seen.append((options["epochs"], options["lr"])))
    study._dense.cache_clear()
    yield seen
    study._dense.cache_clear()


def settings(by, criterion, context, macs=0.5):
    return {"by": by, "criterion": criterion, "context": context, "macs": macs}


@pytest.mark.parametrize(("criterion", "context"), [("large_final", "local"), ("taylor", "global")])
def test_ours_leaves_no_more_than_the_share_and_trains_what_is_left(criterion, context, data, trained):
    found = trial(settings(OURS, criterion, context), 0, SIZE, data)
    assert 0.48 < found["left"] <= 0.5
    assert trained == [(8, 0.1), (1, 0.05)]
    assert found["parameters"] < 60_000
    assert found["accuracy"] == found["before"]


@pytest.mark.parametrize("criterion", PEERS)
def test_the_peers_choice_leaves_about_the_share(criterion, data, monkeypatch):
    pytest.importorskip("torch_pruning")
    monkeypatch.setattr(study, "LOOKS", 5)
    found = trial(settings(PEER, criterion, "global"), 0, SIZE, data)
    assert found["left"] == pytest.approx(0.5, abs=0.08)


def test_the_dense_network_is_measured_as_it_is(data, trained):
    found = trial(settings(DENSE, "", "", 1.0), 0, SIZE, data)
    assert found["left"] == 1.0 and trained == [(8, 0.1)]


def test_a_missing_peer_is_an_error_that_says_how_it_is_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(ImportError, match=r"the study's peer needs torch-pruning: pip install torch-pruning==1\.6\.1"):
        load_torch_pruning()


def test_every_peer_of_the_grids_is_known():
    sizes = [one for size in ("small", "full") for one in STUDY.settings(size)]
    assert {one["criterion"] for one in sizes if one["by"] == PEER} <= set(PEERS)
    assert len(STUDY.settings("small")) == 1 + 3 * 9
