"""Distillation in every framework: what is trained is what a loop with the terms written by hand trains."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.callbacks.distilled import FRAMEWORKS, Net, Squares, Way, Widened, by_hand

pytestmark = pytest.mark.filterwarnings("ignore")
LOGITS: dict[str, Any] = {"loss": Squares(), "weight": 0.7}
FEATURES: dict[str, Any] = {
    "loss": [Squares(), Widened()],
    "activations_student": ["body"],
    "activations_teacher": ["body"],
    "weight": 0.6,
}
CASES = {
    "logits": (LOGITS, Way()),
    "features": (FEATURES, Way()),
    "schedule": ({**FEATURES, "schedule": "lin"}, Way()),
    "accumulated": (FEATURES, Way(accumulate=2)),
    "clipped": (LOGITS, Way(clip=0.05)),
    "bf16": (FEATURES, Way(bf16=True)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_what_is_trained_is_what_a_loop_by_hand_trains(framework, case, tmp_path):
    given, way = CASES[case]
    if framework == "fastai" and way.bf16:
        pytest.skip("fastai's mixed precision is that of a GPU")
    ours, own = Net(), Net()
    distiller = FRAMEWORKS[framework](ours, given, way, tmp_path)
    matrix, value = by_hand(own, given, way, features="activations_student" in given)
    close = {"rtol": 0.02, "atol": 0.01} if way.bf16 else {"rtol": 1e-5, "atol": 1e-6}
    for a, b in zip(ours.parameters(), own.parameters(), strict=True):
        torch.testing.assert_close(a, b, **close)
    assert distiller.metrics()["distill_loss"] == pytest.approx(value, rel=0.02 if way.bf16 else 1e-5)
    if matrix is not None:
        (adapted,) = [p for one in distiller._adapters if one is not None for p in one.parameters()]
        torch.testing.assert_close(adapted, matrix, **close)
        assert not torch.equal(matrix, torch.full_like(matrix, 0.1))
