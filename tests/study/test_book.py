"""Who does which run: one process, whatever the others do."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

optuna = pytest.importorskip("optuna")

from fasterai.study.book import Book  # noqa: E402
from fasterai.study.description import Run  # noqa: E402
from fasterai.study.owners import own_process  # noqa: E402
from fasterai.study.storage import open_storage  # noqa: E402

RECORD = {"version": 1, "settings": [{"a": 1, "b": "x"}, {"a": 2, "b": None}], "size": {"epochs": 1}, "data": "digits"}
RUN, OTHER = Run({"a": 1, "b": "x"}, 0), Run({"a": 2, "b": None}, 5)


@pytest.fixture
def url(request, tmp_path):
    """A journal, or what the test asks for by `on_both`: tables of a data base take longer to make."""
    kind = getattr(request, "param", "journal")
    return f"{kind}:///{tmp_path}/study.{kind}"


on_both = pytest.mark.parametrize("url", ["journal", "sqlite"], indirect=True)


def book(url: str, **changes) -> Book:
    return Book(open_storage(url), "own", {**RECORD, **changes}, "accuracy")


@on_both
def test_a_run_is_taken_once_and_done_once(url):
    first, second = book(url), book(url)
    trial = first.take(RUN)
    assert trial is not None and second.take(RUN) is None
    assert list(second.stand().running) == [RUN.key]
    first.finish(trial, {"accuracy": 0.5, "macs": 7.0})
    assert second.take(RUN) is None
    stand = second.stand()
    assert (dict(stand.done), dict(stand.running), dict(stand.failed)) == ({RUN.key: {"accuracy": 0.5, "macs": 7.0}}, {}, {})
    assert second.take(OTHER) is not None


def test_optuna_reads_the_settings_and_the_metric(url):
    written = book(url)
    written.finish(written.take(OTHER), {"accuracy": 0.25})
    study = optuna.load_study(study_name="own", storage=open_storage(url))
    assert study.best_trial.params == {"a": 2, "b": None, "seed": 5} and study.best_value == 0.25


@on_both
def test_of_two_that_take_a_run_at_the_same_time_the_first_has_it(url, monkeypatch):
    """The second one writes its trial between the first one's trial and its look at the others."""
    first, second = book(url), book(url)
    look, found = first.storage.get_all_trials, []

    def late(*arguments, **options):
        if not found:
            found.append(second.take(RUN))
        return look(*arguments, **options)

    monkeypatch.setattr(first.storage, "get_all_trials", late)
    assert first.take(RUN) is not None and found == [None]


def test_a_failure_is_noted_and_the_run_is_free(url):
    written = book(url)
    written.fail(written.take(RUN), "ValueError: so")
    assert written.stand().failed == {RUN.key: (0, "ValueError: so")}
    again = written.take(RUN)
    written.release(again)
    assert written.stand().failed == {RUN.key: (0, "ValueError: so")}
    written.finish(written.take(RUN), {"accuracy": 1.0})
    assert written.stand().failed == {}


@on_both
def test_the_run_of_a_process_that_is_gone_is_given_up_at_once(url, monkeypatch):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    first = book(url)
    monkeypatch.setattr("fasterai.study.book.own_process", lambda: {**own_process(), "process": ended.pid})
    lost = first.take(RUN)
    second = book(url)
    assert second.free_lost(second.stand(), silence=1000) == 1
    again = second.take(RUN)
    assert again not in (None, lost)
    first.finish(lost, {"accuracy": 0.1})  # it was there after all: what it found does not count
    second.finish(again, {"accuracy": 0.2})
    assert second.stand().done == {RUN.key: {"accuracy": 0.2}}


def test_a_process_of_another_machine_is_given_up_after_a_silence_alone(url, monkeypatch):
    first = book(url)
    monkeypatch.setattr("fasterai.study.book.own_process", lambda: {**own_process(), "machine": "other"})
    lost = first.take(RUN)
    second = book(url)
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    assert second.free_lost(second.stand(), silence=10) == 0
    clock[0] += 9
    first.storage.set_trial_user_attr(lost, "beat", 1)
    assert second.free_lost(second.stand(), silence=10) == 0
    clock[0] += 9
    assert second.free_lost(second.stand(), silence=10) == 0, "it has beaten 9 seconds ago"
    clock[0] += 2
    assert second.free_lost(second.stand(), silence=10) == 1
    assert second.stand().running == {}


@on_both
def test_a_run_beats_while_it_goes_on(url):
    written = book(url)
    trial = written.take(RUN)
    with written.beating(trial, every=0.01):
        deadline = time.monotonic() + 20
        while written.storage.get_trial(trial).user_attrs["beat"] < 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    last = written.storage.get_trial(trial).user_attrs["beat"]
    time.sleep(0.05)
    assert written.storage.get_trial(trial).user_attrs["beat"] == last


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"version": 2}, "version 1 there, 2 asked"),
        ({"data": "abc"}, "data 'digits' there, 'abc' asked"),
        ({"size": {"epochs": 3}}, "size {'epochs': 1} there, {'epochs': 3} asked"),
        ({"settings": RECORD["settings"][:1]}, "settings of 2 combinations there, of 1 combinations asked"),
    ],
)
def test_other_settings_are_refused_by_name_and_nothing_is_changed(url, tmp_path, changes, words):
    written = book(url)
    written.finish(written.take(RUN), {"accuracy": 0.5})
    with pytest.raises(ValueError) as raised:
        book(url, **changes)
    assert "storage must hold runs of the same study, got 'own' with other settings: " + words in str(raised.value)
    assert book(url).stand().done == {RUN.key: {"accuracy": 0.5}}


def test_trials_of_others_in_the_study_are_left_alone(url):
    written = book(url)
    others = optuna.load_study(study_name="own", storage=open_storage(url))
    others.enqueue_trial({"a": 1})
    others.tell(others.ask(), 0.9)
    others.ask()
    assert (written.stand().done, written.stand().running) == ({}, {})
    assert written.free_lost(written.stand(), silence=0) == 0 and written.take(RUN) is not None
