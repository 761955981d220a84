"""The study of dynamic sparse training: every method ends as sparse as it says, and what was ever active is counted."""

from __future__ import annotations

import pytest

from fasterai.study.data import load_data
from fasterai.study.description import Size
from fasterai.study.dynamic import trial

SIZE = Size("tiny", 96, 60, 8, epochs=2, batch_size=16)


@pytest.mark.filterwarnings("ignore")
def test_methods_reach_their_sparsity_and_try_as_many_weights_as_they_may():
    data = load_data(None, SIZE)
    found = {name: trial({"method": name, "sparsity": 0.9}, 0, SIZE, data) for name in ("static", "SET", "AC/DC")}
    assert all(run["reached"] == pytest.approx(0.9, abs=1e-3) for run in found.values())
    ever = [found[name]["ever"] for name in ("static", "SET", "AC/DC")]
    assert ever == sorted(ever) and ever[0] == pytest.approx(0.1, abs=1e-3) and 0.103 < ever[1] < 0.5 and ever[2] == 1.0
    assert trial({"method": "dense", "sparsity": 0.0}, 0, SIZE, data)["ever"] == 1.0
