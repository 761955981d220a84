"""The study of features: each selector keeps what is asked for, and the same network trains on it."""

from __future__ import annotations

import warnings

import pytest
import torch

from fasterai.study import features as study
from fasterai.study.data import load_data
from fasterai.study.features import METHODS, STUDY, TABLES, trial


@pytest.fixture(scope="module")
def digits():
    return load_data(None, STUDY.size("tiny"))


@pytest.mark.parametrize("method", METHODS)
def test_each_selector_keeps_an_exact_share(digits, method):
    settings = {"data": "breast cancer", "method": method, "kept_share": 0.1}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = trial(settings, 0, STUDY.size("tiny"), digits)
    assert found["features"] == 3 and found["input_bytes"] == 12
    assert found["parameters"] == 3 * 64 + 64 + 64 * 32 + 32 + 32 * 2 + 2
    assert 0 <= found["accuracy"] <= 1
    assert ("unretrained_accuracy" in found) == method.startswith("induced")


@pytest.mark.parametrize(("name", "features"), [*zip(TABLES, (64, 30, 13), strict=True), ("images", 64)])
def test_the_dense_network_reads_all_features(digits, name, features):
    found = trial({"data": name, "method": "dense", "kept_share": 1.0}, 0, STUDY.size("tiny"), digits)
    assert found["features"] == features


def test_tables_are_scaled_by_their_training_rows_and_split_by_the_seed(digits):
    task, other = study._task("wine", 0, digits), study._task("wine", 1, digits)
    x, _ = task.train
    assert torch.allclose(x.mean(0), torch.zeros(13), atol=1e-5) and torch.allclose(x.std(0, correction=0), torch.ones(13))
    assert not torch.equal(task.test[0], other.test[0])
    assert len(task.test[0]) == 45 and len(task.train[0]) == 133


def test_selectors_score_as_scikit_learn_does(digits):
    from sklearn.feature_selection import mutual_info_classif

    task = study._task("wine", 0, digits)
    scores = study._scores("mutual information", task, 0)
    rows = torch.randperm(133, generator=torch.Generator().manual_seed(0))
    expected = mutual_info_classif(task.train[0][rows].numpy(), task.train[1][rows].numpy(), random_state=0)
    assert scores.tolist() == expected.tolist()
    assert study._choose("mutual information", task, 4, 0, STUDY.size("tiny"))[0] == sorted(expected.argsort()[-4:].tolist())
