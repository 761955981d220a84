"""The study of chosen experts: what each way leaves of a small Mixtral."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")

from fasterai.study.routed_experts import STUDY, make_mixtral, trial

EXPERT = 3 * 16 * 32


@pytest.mark.parametrize(
    ("way", "gone"),
    [
        ("experts", 4 * (EXPERT + 32)),
        ("weights", 4 * EXPERT),
        ("hidden units", 4 * EXPERT),
        ("fewer experts", 4 * (EXPERT + 32)),
    ],
)
def test_each_way_leaves_half_of_the_experts(way, gone):
    whole = sum(p.numel() for p in make_mixtral().parameters())
    result = trial({"way": way, "sparsity": 0.5}, 0, STUDY.size("tiny"), None)
    assert result["parameters"] == whole - gone
    # Two experts a token are left with whole experts gone: only the gate has less to do, 32 x 4. Half of each else.
    dense = trial({"way": "dense", "sparsity": 0.0}, 0, STUDY.size("tiny"), None)["macs"] if way != "fewer experts" else None
    less = {"experts": 32 * 4, "weights": EXPERT, "hidden units": EXPERT}.get(way)
    assert dense is None or dense - result["macs"] == pytest.approx(less, abs=1)
