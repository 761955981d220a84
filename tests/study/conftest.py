from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fasterai.study import Result, Study, run

pytest.importorskip("optuna")

RunOwn = Callable[..., Result]


def made_study(trial: Callable[..., Any] | None = None, **changes: Any) -> Study:
    """A study that trains nothing: accuracy is a function of the settings and the seed."""

    def accuracy(settings: dict[str, Any], seed: int, size: Any, data: Any) -> dict[str, float]:
        return {"accuracy": settings["a"] / 10 + seed / 100}

    grids = {"small": {"a": [1, 2, 3], "b": ["x", "y"]}}
    given = {"name": "own", "about": "Own", "trial": trial or accuracy, "grids": grids, "x": "a", "lines": "b", "load": None}
    return Study(**{**given, **changes})


@pytest.fixture
def run_own(tmp_path: Path) -> RunOwn:
    """Run a study of one's own on a journal in the test's folder, without a bar."""

    def run_it(study: Study | None = None, **options: Any) -> Result:
        given = {"folder": tmp_path / "out", "storage": f"journal:///{tmp_path}/study.log", "progress": False}
        return run(study or made_study(), **{**given, **options})

    return run_it
