"""Distillation in every framework: what is trained is what a loop with the terms written by hand trains."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.callbacks import distilled
from tests.callbacks.distilled import BATCHES, EPOCHS, FRAMEWORKS, Net, Squares, Way, Widened, by_hand

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


def watched(computed: list[Any]) -> Net:
    """Return a teacher that notes the type of what it computes."""
    other = Net(12, dropout=0.5, seed=5)
    other.body.register_forward_hook(lambda *given: computed.append(given[2].dtype))
    return other


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_what_is_trained_is_what_a_loop_by_hand_trains(framework, case, tmp_path, monkeypatch):
    given, way = CASES[case]
    computed: list[Any] = []
    monkeypatch.setattr(distilled, "teacher", lambda: watched(computed))
    if framework == "fastai" and way.bf16:
        pytest.skip("fastai's mixed precision is that of a GPU")
    ours, own = Net(), Net()
    distiller = FRAMEWORKS[framework](ours, given, way, tmp_path)
    assert {*computed} == {torch.bfloat16 if way.bf16 else torch.float32} and len(computed) == EPOCHS * BATCHES
    matrix, values = by_hand(own, given, way, features="activations_student" in given)
    close = {"rtol": 0.02, "atol": 0.01} if way.bf16 else {"rtol": 1e-5, "atol": 1e-6}
    for a, b in zip(ours.parameters(), own.parameters(), strict=True):
        torch.testing.assert_close(a, b, **close)
    means = [sum(values[-n:]) / n for n in (BATCHES, len(values))]  # since the last figure: one for each epoch, or for the run
    assert any(distiller.metrics()["distill_loss"] == pytest.approx(m, rel=0.02 if way.bf16 else 1e-5) for m in means)
    if matrix is not None:
        (adapted,) = [x for one in distiller.state_dict()["adapters"] if one for x in one.values()]
        torch.testing.assert_close(adapted, matrix, **close)
        assert not torch.equal(matrix, torch.full_like(matrix, 0.1))
