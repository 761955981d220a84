"""Storages by their URLs."""

from __future__ import annotations

import sys

import pytest

optuna = pytest.importorskip("optuna")

from fasterai.study.storage import load_optuna, open_storage, quiet  # noqa: E402


@pytest.mark.parametrize("url", ["sqlite:///{}/a.db", "journal:///{}/a.log"])
def test_a_file_is_made_and_opened_again(tmp_path, url):
    url = url.format(tmp_path)
    optuna.create_study(storage=open_storage(url), study_name="mine")
    assert [s.study_name for s in open_storage(url).get_all_studies()] == ["mine"]
    assert list(tmp_path.glob("a.*"))


def test_after_three_strokes_comes_a_path_from_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    optuna.create_study(storage=open_storage("journal:///here.log"))
    optuna.create_study(storage=open_storage("sqlite:///here.db"))
    assert {path.name for path in tmp_path.iterdir()} == {"here.log", "here.db"}


@pytest.mark.parametrize("url", ["study.db", "", "sqlite:"])
def test_what_is_no_url_is_refused(url):
    with pytest.raises(ValueError, match=r"storage must be a URL such as sqlite:///study\.db"):
        open_storage(url)


def test_a_file_that_is_no_data_base_is_refused_and_stays(tmp_path):
    (tmp_path / "a.db").write_text("no data base, but long enough to be looked at\n" * 50)
    with pytest.raises(ValueError, match=r"storage must be one that can be opened, got .*not a database"):
        open_storage(f"sqlite:///{tmp_path}/a.db")
    assert (tmp_path / "a.db").read_text().startswith("no data base")


def test_an_unknown_data_base_is_refused():
    with pytest.raises((ValueError, ImportError), match="storage"):
        open_storage("nothing://here/there")


def test_without_optuna_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)  # as if it were not installed
    with pytest.raises(ImportError, match=r"studies need optuna: pip install '\.\[study\]' in a checkout of fasterai"):
        load_optuna()


def test_optuna_speaks_as_before_afterwards():
    before = optuna.logging.get_verbosity()

    def fail():
        with quiet(optuna):
            assert optuna.logging.get_verbosity() == optuna.logging.WARNING
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert optuna.logging.get_verbosity() == before
