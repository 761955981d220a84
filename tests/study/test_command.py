"""`python -m fasterai.study`."""

from __future__ import annotations

import runpy
import sys

import pytest

from fasterai.study import command
from fasterai.study.command import main
from tests.study.conftest import made_study

pytest.importorskip("optuna")


@pytest.fixture
def own(monkeypatch):
    """Let the command find a study of one's own, whose trial can be changed."""
    studies = {}

    def set_trial(trial=None):
        studies["own"] = made_study(trial)

    set_trial()
    monkeypatch.setattr(command, "find_study", lambda name: studies[name])
    return set_trial


def asked(tmp_path, *more):
    return ["own", "-o", str(tmp_path / "out"), "--storage", f"journal:///{tmp_path}/study.log", *more]


def test_without_a_name_the_studies_are_listed(capsys):
    assert main([]) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in said] == list(command.STUDIES)


def test_a_study_is_run_and_shown(own, tmp_path, capsys):
    assert main(asked(tmp_path, "--seeds", "0", "4", "--only", "a=2")) == 0
    said = capsys.readouterr().out
    assert "22.0 ± 2.8" in said and f"table, picture and runs: {tmp_path / 'out'}/" in said
    assert (tmp_path / "out" / "runs.csv").read_text().count("\n") == 5


def test_failed_runs_are_told_by_the_exit_status(own, tmp_path, capsys):
    def half(settings, seed, size, data):
        return {"accuracy": 1 / (settings["a"] - 1)}

    own(half)
    assert main(asked(tmp_path, "--seeds", "0")) == 1
    said = capsys.readouterr()
    assert "failed: a 1, b x, seed 0: ZeroDivisionError: " in said.out
    assert "2 of 6 runs failed; the same command tries them once more" in said.err


def test_ctrl_c_says_how_to_go_on(own, tmp_path, capsys):
    def stop(*_):
        raise KeyboardInterrupt

    own(stop)
    assert main(asked(tmp_path)) == 130
    assert "study: interrupted; the same command goes on with the runs that are left" in capsys.readouterr().err
    own()
    assert main(asked(tmp_path)) == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["schedule"], "study: error: study must be one of"),
        (["schedules", "--size", "big"], "study: error: size must be one of tiny, small, full, got 'big'"),
        (["schedules", "--only", "sparsity"], "study: error: --only must be AXIS=VALUE, got 'sparsity'"),
        (["schedules", "--only", "sparsity=2"], "study: error: only must give sparsity one of 0.0, 0.8, 0.9"),
        (["schedules", "--data", "/nowhere"], "study: error: data must be a folder of images, got /nowhere"),
    ],
)
def test_a_bad_argument_is_one_line(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith(words) and said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_the_module_runs(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["study"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("fasterai.study", run_name="__main__")
    assert ended.value.code == 0 and "schedules" in capsys.readouterr().out
