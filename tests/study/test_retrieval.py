"""The study of retrieval: what is found is counted by hand, and a taught network differs from one that is alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from fasterai.study import retrieval as study
from fasterai.study.data import load_data
from fasterai.study.retrieval import STUDY, make_embedding, trial


@pytest.fixture(scope="module")
def digits():
    return load_data(None, STUDY.size("tiny"))


def test_recall_and_mean_precision_by_hand(digits):
    places, labels = torch.tensor([[0.0], [1.2], [2.5], [5.0]]), torch.tensor([0, 1, 0, 0])
    found = study._found(nn.Identity(), replace(digits, test=(places, labels)))
    # 0.0: b a a -> (1/2 + 2/3) / 2; 1.2: it is alone; 2.5: b, then a a at 2.5 both; 5.0: a b a -> (1 + 2/3) / 2
    expected = [(1 / 2 + 2 / 3) / 2, 0.0, (1 / 2 + 2 / 3) / 2, (1 + 2 / 3) / 2]
    assert found["recall"] == 1 / 4
    assert found["mean_precision"] == pytest.approx(sum(expected) / 4)


@pytest.mark.parametrize("norm", ["batch", "l2", "none"])
def test_an_embedding_ends_in_its_norm(digits, norm):
    torch.manual_seed(0)
    x = make_embedding(digits, 8, 16, norm)(digits.train[0][:40])
    lengths, spread = x.square().sum(1), x.var(0, correction=0)
    assert x.shape == (40, 16)
    assert torch.allclose(lengths, torch.full((40,), 16.0), rtol=1e-4) == (norm == "l2")
    assert torch.allclose(spread, torch.ones(16), atol=1e-2) == (norm == "batch")


def test_a_student_is_smaller_and_learns_from_a_teacher_that_stays(digits, monkeypatch):
    size, grid = STUDY.size("tiny"), {"norm": "batch", "dimensions": 16}
    seen = []
    monkeypatch.setattr(study, "_found", lambda network, data: seen.append(network) or {})
    trial({"method": "teacher", **grid}, 0, size, digits)
    before = {name: x.clone() for name, x in seen[0].state_dict().items()}
    for method in ("alone", "relational", "regression alone"):
        trial({"method": method, **grid}, 0, size, digits)
    counts = [sum(p.numel() for p in network.parameters()) for network in seen]
    assert counts[1] == counts[2] == counts[3] < counts[0] / 5
    weights = [torch.cat([p.flatten() for p in network.parameters()]) for network in seen[1:]]
    assert not torch.allclose(weights[0], weights[1]) and not torch.allclose(weights[0], weights[2])
    assert study._teacher("batch", 0, size, digits) is seen[0]
    assert all(torch.equal(x, before[name]) for name, x in seen[0].state_dict().items())
