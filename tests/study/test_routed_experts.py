"""The study of chosen experts: what each way leaves of a small Mixtral."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")

from fasterai.study.routed_experts import STUDY, trial

EXPERT = 3 * 16 * 32


@pytest.fixture(scope="module")
def dense():
    return trial({"way": "dense", "sparsity": 0.0}, 0, STUDY.size("tiny"), None)


@pytest.mark.parametrize(
    ("way", "gone", "less"),
    [
        # A token is sent to two of the experts that are left: only the gate has less to do.
        ("experts", 4 * (EXPERT + 32), 4 * 32),
        ("weights", 4 * EXPERT, EXPERT),
        ("hidden units", 4 * EXPERT, EXPERT),
        ("fewer experts", 4 * (EXPERT + 32), 4 * 32),
    ],
)
def test_each_way_leaves_half_of_the_experts(dense, way, gone, less):
    result = trial({"way": way, "sparsity": 0.5}, 0, STUDY.size("tiny"), None)
    assert dense["parameters"] - result["parameters"] == gone
    assert dense["macs"] - result["macs"] == pytest.approx(less, abs=1)
