"""`fasterai study`."""

from __future__ import annotations

import sys

import pytest

from fasterai.cli import main

pytest.importorskip("optuna")


def test_the_studies_are_listed(capsys):
    assert main(["study"]) == 0
    assert "schedules" in capsys.readouterr().out


def test_a_study_is_run(tmp_path, capsys):
    arguments = ["study", "schedules", "--size", "tiny", "-o", str(tmp_path), "--only", "schedule=dense"]
    assert main(arguments) == 0
    assert "dense" in capsys.readouterr().out
    assert (tmp_path / "study.db").exists() and (tmp_path / "picture.png").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["study", "schedule"], "fasterai: error: study must be one of"),
        (["study", "schedules", "--seeds", "-1"], "fasterai: error: seeds must be at least 0, got -1"),
        (["study", "schedules", "--seeds", "x"], "fasterai: error: argument --seeds: invalid int value: 'x'"),
        (["study", "schedules", "--storage", "here"], "fasterai: error: storage must be a URL such as sqlite:///study.db"),
    ],
)
def test_a_bad_argument_is_one_line(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith(words) and said.count("\n") == 1


def test_without_optuna_the_extra_is_named(capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)  # as if it were not installed
    assert main(["study", "schedules", "-o", str(tmp_path / "out")]) == 2
    assert "studies need optuna: pip install '.[study]' in a checkout" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_ctrl_c_says_how_to_go_on(capsys, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("fasterai.cli.study.run_study", stop)
    assert main(["study", "schedules"]) == 130
    assert "interrupted; the same command goes on with the runs that are left" in capsys.readouterr().err
