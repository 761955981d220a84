"""The study of filter variety: masks are exact, and a ticket starts from the first weights."""

from __future__ import annotations

import warnings

import pytest
import torch

from fasterai.study import variety as study
from fasterai.study.data import load_data
from fasterai.study.variety import STUDY, trial
from fasterai.study.workbench import train


@pytest.fixture(scope="module")
def digits():
    return load_data(None, STUDY.size("tiny"))


@pytest.mark.parametrize("with_variety", [False, True])
@pytest.mark.parametrize("way", ["dense", "scratch", "ticket"])
def test_a_run_prunes_the_share_of_each_layer(monkeypatch, digits, way, with_variety):
    seen = []

    def noted(network, *args, **options):
        seen.append({name: w.clone() for name, w in network.state_dict().items()})
        train(network, *args, **options)
        seen.append({name: w.clone() for name, w in network.state_dict().items()})

    monkeypatch.setattr(study, "train", noted)
    settings = {"way": way, "criteria": "taylor", "variety": with_variety, "sparsity": 0.5}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = trial(settings, 0, STUDY.size("tiny"), digits)
    assert 0 <= found["accuracy"] <= 1 and -1 <= found["alike"] <= 1
    last = seen[-1]
    for name in (n for n, w in last.items() if w.dim() == 4):
        left = last[name].flatten(1).any(1)
        assert float(left.float().mean()) == (1.0 if way == "dense" else 0.5), name
        if way == "ticket":  # the same initial weights, less those of the mask
            assert torch.equal(seen[2][name], seen[0][name] * left.view(-1, 1, 1, 1))
    assert len(seen) == (4 if way == "ticket" else 2)
