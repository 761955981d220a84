"""Study of pruning from scratch: each kind of run trains a network of the widths and for the epochs that it says."""

from __future__ import annotations

import pytest
import torch

from fasterai.study import scratch
from fasterai.study.data import load_data
from fasterai.study.description import Size
from fasterai.study.scratch import COST, DENSE, FOUND, ONCE, PRUNED, RANDOM, UNIFORM, trial

SIZE = Size("tiny", 64, 40, 8, epochs=4, batch_size=32)


@pytest.fixture(scope="module")
def data():
    return load_data(None, SIZE)


@pytest.fixture
def trained(monkeypatch):
    """Epochs and networks of the trainings, none of which is done."""
    seen = []
    monkeypatch.setattr(scratch, "train", lambda network, data, **options: seen.append((options["epochs"], network)))
    scratch._dense.cache_clear()
    yield seen
    scratch._dense.cache_clear()


@pytest.mark.parametrize(("what", "spent"), [(FOUND, 2.0), (PRUNED, 4.0)])
def test_small_networks_train_as_long_or_at_the_cost_of_the_dense_one_and_the_search(what, spent, data, trained):
    once = trial({"what": what, "training": ONCE, "macs": 0.5}, 0, SIZE, data)
    assert 0.48 < once["left"] <= 0.5
    assert trained[-1][0] == 4
    assert once["dense_epochs"] == pytest.approx(spent + 4 * once["left"])
    cost = trial({"what": what, "training": COST, "macs": 0.5}, 0, SIZE, data)
    assert trained[-1][0] == round((6 - spent) / cost["left"])
    assert cost["dense_epochs"] == pytest.approx(6, abs=0.3)


def test_uniform_widths_keep_equal_shares_and_random_ones_do_not(data, trained):
    widths = {}
    for what in (DENSE, UNIFORM, RANDOM):
        trial({"what": what, "training": ONCE, "macs": 1.0 if what == DENSE else 0.5}, 0, SIZE, data)
        layers = [m for m in trained[-1][1].modules() if isinstance(m, torch.nn.Conv2d)]
        widths[what] = torch.tensor([layer.out_channels for layer in layers], dtype=torch.float64)
    shares = {what: widths[what] / widths[DENSE] for what in (UNIFORM, RANDOM)}
    assert float(shares[UNIFORM].max() - shares[UNIFORM].min()) < 0.07  # one channel of sixteen
    assert float(shares[RANDOM].max() - shares[RANDOM].min()) > 0.2
