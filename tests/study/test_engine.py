"""Runs of a study: each once, whatever is interrupted, killed or started beside it."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from fasterai.study import Study, run
from tests.study.conftest import made_study

#: A study that notes each run that is begun, and each that is done, in a file.
SCRIPT = """
import sys, time
from fasterai.study import Study, run

def trial(settings, seed, size, data):
    with open(sys.argv[2], "a") as notes:
        notes.write(f"{settings['a']} {seed}\\n")
    time.sleep(600 if sys.argv[4] == f"{settings['a']} {seed}" else 0.05)
    return {"accuracy": settings["a"] / 10}

study = Study("own", "Own", trial, {"small": {"a": [1, 2, 3, 4]}}, x="a", lines=(), load=None)
print(run(study, storage=sys.argv[1], folder=sys.argv[3], progress=False))
"""


def begin(tmp_path: Path, name: str, storage: str, hangs_at: str = "") -> subprocess.Popen:
    (tmp_path / "own.py").write_text(SCRIPT)
    arguments = [f"{storage}:///{tmp_path}/study", str(tmp_path / "notes"), str(tmp_path / name), hangs_at]
    return subprocess.Popen([sys.executable, str(tmp_path / "own.py"), *arguments], stdout=subprocess.PIPE, text=True)


def notes(tmp_path: Path) -> list[str]:
    path = tmp_path / "notes"
    return path.read_text().splitlines() if path.exists() else []


def counting(calls: list, fails: dict | None = None, error: type[BaseException] = ValueError) -> Study:
    """A study that notes its calls, and raises at those whose `a` is in `fails`, for as often as it says."""
    fails = fails or {}

    def trial(settings, seed, size, data):
        calls.append((settings["a"], settings["b"], seed))
        if fails.get(settings["a"], 0) > 0:
            fails[settings["a"]] -= 1
            raise error("so")
        return {"accuracy": settings["a"] / 10 + seed / 100}

    return made_study(trial)


def test_every_run_is_done_once_and_seeds_come_in_turns(run_own):
    calls = []
    result = run_own(counting(calls), seeds=[0, 1])
    assert calls[:2] == [(1, "x", 0), (1, "y", 0)] and [seed for *_, seed in calls] == [0] * 6 + [1] * 6
    assert repr(result) == "<Result: own small, 12 of 12 runs>"
    assert [round(row.mean("accuracy"), 3) for row in result.rows] == [0.105, 0.105, 0.205, 0.205, 0.305, 0.305]


def test_what_is_done_is_not_done_again_and_more_seeds_add_to_it(run_own):
    calls = []
    run_own(counting(calls), seeds=[0])
    run_own(counting(calls), seeds=[0])
    assert len(calls) == 6
    assert len(run_own(counting(calls), seeds=[0, 7]).rows[0].values["accuracy"]) == 2
    assert len(calls) == 12 and {seed for *_, seed in calls[6:]} == {7}


def test_an_interrupted_study_goes_on_where_it_was(run_own):
    calls = []
    with pytest.raises(KeyboardInterrupt):
        run_own(counting(calls, {2: 1}, KeyboardInterrupt), seeds=[0])
    assert calls == [(1, "x", 0), (1, "y", 0), (2, "x", 0)]
    result = run_own(counting(calls), seeds=[0])
    assert calls[3:] == [(2, "x", 0), (2, "y", 0), (3, "x", 0), (3, "y", 0)]
    assert not result.failures and len(result.rows) == 6


def test_a_failed_run_is_told_the_others_go_on_and_it_is_tried_once_more_by_each_call(run_own, tmp_path):
    calls = []
    study = counting(calls, {2: 4})
    result = run_own(study, seeds=[0])
    assert len(calls) == 6 and len(result.rows) == 4
    assert list(result.failures) == ["a 2, b x, seed 0", "a 2, b y, seed 0"]
    assert result.failures["a 2, b x, seed 0"].startswith("ValueError: so (test_engine.py, line ")
    assert repr(result) == "<Result: own small, 4 of 6 runs, 2 failed>"
    assert "failed: a 2, b x, seed 0: ValueError: so" in str(result)
    assert '2,x,0,,"ValueError: so (test_engine.py, line' in (tmp_path / "out" / "runs.csv").read_text()
    assert len(run_own(study, seeds=[0]).failures) == 2 and len(calls) == 8
    assert run_own(study, seeds=[0]).failures == {} and len(calls) == 10


TAKEN = "ValueError: trial must return metrics by names that no axis has, nor seed or failure, got "


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        (None, "TypeError: trial must return a dict with 'accuracy', got None"),
        ({"loss": 1.0}, "TypeError: trial must return a dict with 'accuracy', got {'loss': 1.0}"),
        (
            {"accuracy": 0.5, "b": 1.0},
            TAKEN + "'b'",
        ),
        (
            {"accuracy": 0.5, "failure": 1.0},
            TAKEN + "'failure'",
        ),
        ({"accuracy": float("nan")}, "ValueError: trial must return finite numbers, got accuracy=nan"),
    ],
)
def test_a_trial_that_returns_no_numbers_has_failed(run_own, returned, words):
    result = run_own(made_study(lambda *_: returned), seeds=[0], only={"a": 1, "b": "x"})
    assert next(iter(result.failures.values())).startswith(words)
    assert result.rows == []


def test_a_part_of_the_grid_is_run(run_own):
    calls = []
    run_own(counting(calls), seeds=[3], only={"a": [1, 3], "b": "y"})
    assert calls == [(1, "y", 3), (3, "y", 3)]


def test_the_default_storage_is_a_file_in_the_folder(tmp_path):
    calls = []
    for _ in range(2):
        run(counting(calls), folder=tmp_path / "out", seeds=[0], progress=False)
    assert len(calls) == 6
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"study.db", "runs.csv", "table.md", "picture.png"}


def test_the_global_random_states_stay(run_own):
    def trial(settings, seed, size, data):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        return {"accuracy": float(torch.rand(1))}

    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist(), torch.get_num_threads()
    run_own(made_study(trial), seeds=[0])
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_num_threads())


def test_the_data_is_read_once_and_trials_get_it_with_the_size(run_own):
    loads, seen = [], set()

    def trial(settings, seed, size, data):
        seen.add((data, size.name, size.epochs))
        return {"accuracy": 1.0}

    study = made_study(trial, load=lambda folder, size: loads.append((folder, size.name)) or "data")
    run_own(study, data="somewhere", seeds=[0])
    assert loads == [(Path("somewhere"), "small")] and seen == {("data", "small", 4)}


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"study": "schedule"}, ValueError, "study must be one of channel_criteria, criteria, .*did you mean 'schedules'?"),
        ({"study": 3}, TypeError, "study must be a name or a Study, got 3"),
        ({"size": "full"}, ValueError, "size must be one of tiny, small, got 'full'"),
        ({"seeds": []}, ValueError, r"seeds must be one at least, got \[\]"),
        ({"seeds": [-1]}, ValueError, "seeds must be at least 0, got -1"),
        ({"only": {"c": 1}}, ValueError, "only must name an axis of the study, a, b, got 'c'"),
        ({"only": {"a": 9}}, ValueError, "only must give a one of 1, 2, 3, got 9"),
        ({"data": "somewhere"}, ValueError, "data must be left out for own, which brings its own, got 'somewhere'"),
        ({"device": "nowhere"}, ValueError, "device must be one of this machine, such as cpu or cuda, got 'nowhere'"),
        ({"storage": "here"}, ValueError, "storage must be a URL"),
    ],
)
def test_a_bad_argument_is_refused_and_nothing_is_written(tmp_path, options, error, words):
    given = {"study": made_study(), "folder": tmp_path / "out", "progress": False, **options}
    with pytest.raises(error, match=words):
        run(given.pop("study"), given.pop("data", None), **given)
    assert not (tmp_path / "out").exists()


def test_a_combination_that_is_in_no_grid_is_refused(run_own):
    study = made_study(grids={"small": [{"a": [1], "b": ["x"]}, {"a": [2], "b": ["y"]}]})
    with pytest.raises(ValueError, match="only must leave a run, got"):
        run_own(study, only={"a": 1, "b": "y"})


def test_a_folder_that_is_a_file_is_refused(run_own, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match=r"folder must be a folder, got .*, where .*file' is a file"):
        run_own(folder=tmp_path / "file" / "out")
    assert (tmp_path / "file").read_text() == "mine"


def test_other_settings_are_refused_before_anything_is_run_or_written(run_own, tmp_path):
    run_own(seeds=[0])
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    calls = []
    other = counting(calls)
    changed = made_study(other.trial, grids={"small": {"a": [1, 2, 3, 4], "b": ["x", "y"]}})
    for study in (changed, made_study(other.trial, version=2)):
        with pytest.raises(ValueError, match="storage must hold runs of the same study, got 'own small' with other settings"):
            run_own(study, seeds=[0])
    assert calls == [] and before == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}


def test_two_processes_share_the_work_and_both_know_all_of_it(tmp_path):
    both = [begin(tmp_path, name, "sqlite") for name in ("one", "two")]
    said = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sorted(notes(tmp_path)) == [f"{a} {seed}" for a in (1, 2, 3, 4) for seed in (0, 1, 2)]
    assert said[0] == said[1] and "40.0 ± 0.0" in said[0]
    assert (tmp_path / "one" / "runs.csv").read_bytes() == (tmp_path / "two" / "runs.csv").read_bytes()


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no such signal here")
def test_the_run_of_a_killed_process_is_taken_up_and_the_others_are_not_done_again(tmp_path):
    killed = begin(tmp_path, "one", "journal", hangs_at="3 0")
    deadline = time.monotonic() + 120
    while "3 0" not in notes(tmp_path):
        assert time.monotonic() < deadline and killed.poll() is None
        time.sleep(0.02)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    assert notes(tmp_path) == ["1 0", "2 0", "3 0"]
    said = begin(tmp_path, "two", "journal").communicate(timeout=120)[0]
    assert said.count(" ± ") == 4 and "30.0 ± 0.0" in said
    whole = {f"{a} {seed}" for a in (1, 2, 3, 4) for seed in (0, 1, 2)}
    assert sorted(notes(tmp_path)[3:]) == sorted(whole - {"1 0", "2 0"})


def test_the_bar_says_what_is_run(run_own, capsys):
    run_own(seeds=[0], progress=True)
    said = capsys.readouterr().err
    assert "own small" in said and "a 2, b x, seed 0" in said and "6/6" in said
