"""Book of a study in a storage: who does which run, and what came out.

Each run of a study is one trial. A process takes a run by writing a trial that runs, and then looks who was first: of several
trials for one run, the lowest number that has not failed has it, and the others give way. Numbers are given in order by every
storage of Optuna, so that no run is done twice, whatever the number of processes and machines.

A process that runs a trial writes a beat into it every now and then. What has not beaten for a while, or belongs to a process
of this machine that is gone, is taken up again; clocks of different machines are never compared.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fasterai.study.description import Run
from fasterai.study.owners import is_gone, own_process
from fasterai.study.storage import load_optuna, quiet

if TYPE_CHECKING:
    from optuna.storages import BaseStorage
    from optuna.trial import FrozenTrial

__all__ = ["BEAT", "SILENCE", "Book", "Stand"]

#: Seconds between two beats, and without one until a run counts as given up.
BEAT, SILENCE = 15.0, 120.0


@dataclass(frozen=True)
class Stand:
    """State of the runs of a study.

    Attributes:
        done: Key -> metrics, of complete runs.
        failed: Key -> (number of the trial, error), of the last failure of runs that are not complete.
        running: Key -> trial, of runs under way.
    """

    done: Mapping[str, Mapping[str, float]]
    failed: Mapping[str, tuple[int, str]]
    running: Mapping[str, FrozenTrial]


class Book:
    """Record of one study in a storage: who runs what, and what came out."""

    def __init__(self, storage: BaseStorage, name: str, record: Mapping[str, Any], y: str) -> None:
        self.storage, self.y = storage, y
        self._choices: dict[str, list[Any]] = {}
        for axis, value in (pair for settings in record["settings"] for pair in settings.items()):
            known = self._choices.setdefault(axis, [])
            known += [value] * (value not in known)
        self._optuna = load_optuna()
        with quiet(self._optuna):
            self.id = self._open(name, record)
        self._beats: dict[int, tuple[Any, float]] = {}

    def _open(self, name: str, record: Mapping[str, Any]) -> int:
        study = self._optuna.create_study(storage=self.storage, study_name=name, direction="maximize", load_if_exists=True)
        number: int = self.storage.get_study_id_from_name(name)
        found = study.user_attrs.get("record")
        if found is None:
            self.storage.set_study_user_attr(number, "record", dict(record))
            found = self.storage.get_study_user_attrs(number)["record"]
        if other := [part for part in record if found.get(part) != record[part]]:
            told = "; ".join(f"{part} {_differs(found.get(part), record[part])}" for part in other)
            raise ValueError(
                f"storage must hold runs of the same study, got {name!r} with other settings: {told}; use another one"
            )
        return number

    def stand(self) -> Stand:
        """Read how all runs stand."""
        states = self._optuna.trial.TrialState
        done: dict[str, Mapping[str, float]] = {}
        failed: dict[str, tuple[int, str]] = {}
        running: dict[str, FrozenTrial] = {}
        for trial in self.storage.get_all_trials(self.id, deepcopy=False):
            key = trial.user_attrs.get("run")
            if key is None:
                continue
            if trial.state == states.COMPLETE:
                done.setdefault(key, trial.user_attrs["metrics"])
            elif trial.state == states.RUNNING:
                running.setdefault(key, trial)
            elif "error" in trial.user_attrs:
                failed[key] = (trial.number, trial.user_attrs["error"])
        failed = {key: value for key, value in failed.items() if key not in done}
        return Stand(done, failed, running)

    def take(self, run: Run) -> int | None:
        """Take a run for this process: the trial's id; None if another process was first."""
        optuna = self._optuna
        place = {axis: optuna.distributions.CategoricalDistribution(self._choices[axis]) for axis in run.settings}
        place["seed"] = optuna.distributions.IntDistribution(0, 2**31 - 1)
        trial = optuna.trial.create_trial(
            state=optuna.trial.TrialState.RUNNING,
            params={**run.settings, "seed": run.seed},
            distributions=place,
            user_attrs={"run": run.key, "owner": own_process(), "beat": 0},
        )
        own: int = self.storage.create_new_trial(self.id, template_trial=trial)
        states = (optuna.trial.TrialState.RUNNING, optuna.trial.TrialState.COMPLETE)
        rivals = [
            t for t in self.storage.get_all_trials(self.id, deepcopy=False, states=states) if t.user_attrs.get("run") == run.key
        ]
        if min(rivals, key=lambda t: t.number)._trial_id == own:
            return own
        self._end(own, "taken", "another process was first")
        return None

    def finish(self, trial: int, metrics: Mapping[str, float]) -> None:
        """Write the result of a run; nothing if the run was given up for lost and taken up by another process."""
        with suppress(self._optuna.exceptions.UpdateFinishedTrialError):
            self.storage.set_trial_user_attr(trial, "metrics", dict(metrics))
            self.storage.set_trial_state_values(trial, self._optuna.trial.TrialState.COMPLETE, [metrics[self.y]])

    def fail(self, trial: int, error: str) -> None:
        """Write that a run has failed, and why."""
        self._end(trial, "error", error)

    def release(self, trial: int) -> None:
        """Give a run back that was broken off."""
        self._end(trial, "released", "broken off")

    def _end(self, trial: int, why: str, text: str) -> None:
        with suppress(self._optuna.exceptions.UpdateFinishedTrialError):
            self.storage.set_trial_user_attr(trial, why, text)
            self.storage.set_trial_state_values(trial, self._optuna.trial.TrialState.FAIL)

    def free_lost(self, stand: Stand, silence: float) -> int:
        """Give up the runs of processes that are gone or silent, so that they can be taken; return how many."""
        lost = 0
        for trial in stand.running.values():
            if is_gone(trial.user_attrs["owner"]) or self._silence(trial) > silence:
                self._end(trial._trial_id, "lost", "its process is gone")
                lost += 1
        return lost

    def _silence(self, trial: FrozenTrial) -> float:
        """Return the seconds for which this process has seen no new beat of a trial."""
        beat, now = trial.user_attrs["beat"], time.monotonic()
        seen, since = self._beats.get(trial._trial_id, (None, now))
        if seen != beat:
            since = now
        self._beats[trial._trial_id] = (beat, since)
        return now - since

    @contextmanager
    def beating(self, trial: int, every: float) -> Iterator[None]:
        """Write a beat into a trial every now and then, from a thread."""
        stop = threading.Event()

        def beat() -> None:
            count = 0
            while not stop.wait(every):
                count += 1
                with suppress(Exception):  # a storage that is away for a moment ends no training
                    self.storage.set_trial_user_attr(trial, "beat", count)

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


def _differs(found: Any, wanted: Any) -> str:
    def shown(value: Any) -> str:
        if isinstance(value, Mapping):
            return str({k: v for k, v in value.items() if not isinstance(found, Mapping) or found.get(k) != wanted.get(k)})
        return f"of {len(value)} combinations" if isinstance(value, list) else repr(value)

    return f"{shown(found)} there, {shown(wanted)} asked"
