"""Every study of the catalogue keeps the contract: its tiny size runs, from the command line's names to the files."""

from __future__ import annotations

import importlib
import inspect
import pkgutil

import pytest

import fasterai.study
from fasterai.study import STUDIES, Study, find_study

pytest.importorskip("optuna")


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_runs_at_its_tiny_size(name, run_own, tmp_path):
    study = find_study(name)
    result = run_own(study, size="tiny", seeds=[0])
    assert result.failures == {}
    assert len(result.rows) == len(study.settings("tiny")) > 1
    assert all(study.y in row.values for row in result.rows)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"runs.csv", "table.md", "picture.png"}


@pytest.mark.parametrize("name", STUDIES)
def test_a_run_follows_from_its_settings_and_its_seed(name):
    """The last of the tiny settings, from other states of the random generators."""
    import torch

    study = find_study(name)
    size = study.size("tiny")
    data = None if study.load is None else study.load(None, size)
    settings, found = study.settings("tiny")[-1], []
    for start in (1, 2):
        torch.manual_seed(start)
        metrics = study.trial(settings, 0, size, data)
        found.append({metric: value for metric, value in metrics.items() if not metric.endswith("_ms")})  # times vary
    assert found[0] == found[1]


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_says_what_it_is(name):
    study = find_study(name)
    assert study.name == name and study.about and "\n" not in study.about
    assert {"small", "full"} <= set(study.size_names())
    axes = {axis for size in ("small", "full") for settings in study.settings(size) for axis in settings}
    assert set(study.line_axes) | set(study.reference) <= axes
    assert list(inspect.signature(study.trial).parameters) == ["settings", "seed", "size", "data"]


def test_each_module_with_a_study_is_in_the_catalogue():
    modules = [m.name for m in pkgutil.iter_modules(fasterai.study.__path__) if m.name != "__main__"]
    found = [m for m in modules if isinstance(getattr(importlib.import_module(f"fasterai.study.{m}"), "STUDY", None), Study)]
    assert sorted(found) == sorted(STUDIES)


def test_an_unknown_study_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=f"study must be one of {STUDIES[0]}, .*, got 'schedule'; did you mean 'schedules'"):
        find_study("schedule")
