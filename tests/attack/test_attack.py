"""A few trials of each kind of attack, and what the harness makes of a library that is broken."""

from __future__ import annotations

import functools
import os
import random
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fasterai.cli import folders as image_folders
from fasterai.distill import teachers as distilling
from fasterai.distill.capture import Capture
from fasterai.distill.distiller import Distiller
from fasterai.distill.losses.features import MGD, FitNet
from fasterai.distill.losses.logits import SoftTarget
from fasterai.sparse.record import MaskRecord
from fasterai.sparse.sparsifier import Sparsifier
from tests.attack import __main__ as command
from tests.attack import disks, looks, loops, mutations, oracles, pairs, settings, states, teachers, trials
from tests.attack.trials import FAILED, KINDS, REFUSED, SURVIVED, Trial, count_of, one, run

#: Seeds; those of the command line take longer, and are left to the command.
TINY: dict[str, Sequence[int]] = {
    "kills": (0, 1, 3),
    "disks": range(4),
    "files": (0, 3, 7, 10, 11, 13),
    "states": range(4),
    "folders": range(8),
    "ranks": range(2),
    "settings": range(4),
    "loops": range(5),
    "looks": range(4),
    "teachers": range(5),
}


def test_every_kind_has_a_count():
    assert set(TINY) == set(KINDS)
    assert all(count_of(name) >= 20 for name in KINDS)


@pytest.mark.parametrize("name", KINDS)
def test_the_library_withstands(name: str):
    found = list(run(name, TINY[name]))
    assert [t.seed for t in found] == list(TINY[name])
    assert [t for t in found if t.verdict == FAILED] == []


# --- a library that is broken is found out ---------------------------------------------------------------------------------


def failures(name: str, count: int) -> Iterator[str]:
    return (t.why for t in (one(name, seed) for seed in range(count)) if t.verdict == FAILED)


def test_masks_that_are_not_applied_are_found_out(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(MaskRecord, "apply_", lambda self: None)
    assert any("are not zero" in why for why in failures("settings", 8))


def test_a_count_that_is_off_by_one_is_found_out(monkeypatch: pytest.MonkeyPatch):
    read = Sparsifier._read_sparsity
    monkeypatch.setattr(Sparsifier, "_read_sparsity", lambda self, s: read(self, s if isinstance(s, dict) else s * 0.8))
    assert any("asked" in why for why in failures("settings", 12))


def test_a_state_that_is_half_loaded_is_found_out(monkeypatch: pytest.MonkeyPatch):
    load = Sparsifier.load_state_dict

    def half(self: Sparsifier, state: object) -> None:
        self._record.keep = {}
        load(self, state)  # type: ignore[arg-type]

    monkeypatch.setattr(Sparsifier, "load_state_dict", half)
    assert any("not as before" in why or "for half" in why for why in failures("states", 12))


def test_an_attribute_that_is_replaced_by_a_look_is_found_out(monkeypatch: pytest.MonkeyPatch):
    def look(model: torch.nn.Module, *_: object) -> None:
        model.notes = list(model.notes)

    monkeypatch.setattr(looks, "LOOKS", {"graph": look, "onnx": look, "program": look, "latency": look})
    assert any("changed .notes" in why for why in failures("looks", 1))


def _attacked(monkeypatch: pytest.MonkeyPatch, **settings: object) -> Iterator[str]:
    """What a few trials of distillation find that have these settings, whatever else is drawn."""
    plan = teachers.random_plan
    monkeypatch.setattr(teachers, "random_plan", lambda draw, folder: replace(plan(draw, folder), **settings))
    return failures("teachers", 3)


FITNET = {"pair": pairs.random_pair(random.Random(8)), "losses": (FitNet(),), "company": ("nobody", "weight", "taylor", 0.5)}


def test_hooks_that_stay_are_found_out(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Capture, "remove", lambda self: None)
    assert any("has hooks at" in why for why in _attacked(monkeypatch, **FITNET, layers=(["0"], ["0"]), teacher="network"))


def test_a_teacher_that_learns_is_found_out(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(distilling, "_wake", lambda model: None)
    assert any("teacher is not as it was" in why for why in _attacked(monkeypatch, losses=(SoftTarget(),), teacher="network"))


def test_adapters_that_begin_afresh_are_found_out(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Distiller, "_restored", lambda *_: None)
    found = _attacked(monkeypatch, **FITNET | {"losses": (MGD(),)}, layers=(["0"], ["0"]), teacher="network", weight=0.9)
    assert any("ended with other weights" in why for why in found)


def test_outputs_that_are_kept_are_found_out(monkeypatch: pytest.MonkeyPatch):
    kept: list[object] = []
    answer = distilling.NetworkTeacher.answer
    monkeypatch.setattr(
        distilling.NetworkTeacher, "answer", lambda self, batch: kept.append(batch.outputs) or answer(self, batch)
    )
    found = _attacked(monkeypatch, losses=(SoftTarget(),), teacher="network")
    assert any("are kept after the step" in why for why in found)


def test_random_numbers_that_are_drawn_by_a_look_are_found_out(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(looks, "LOOKS", dict.fromkeys((*looks.RARE, "graph"), lambda *_: torch.rand(1)))
    assert any("torch's random numbers" in why for why in failures("looks", 1))


def test_a_run_that_ends_short_without_a_word_is_found_out(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loops, "LOOPS", (lambda odd: None,))
    monkeypatch.setattr(loops, "compiled", loops.LOOPS[0])
    loops.LOOPS[0].__name__ = "nothing"
    assert any("nothing said so" in why for why in failures("loops", 1))


def test_an_image_that_is_read_twice_is_found_out(monkeypatch: pytest.MonkeyPatch):
    listed = image_folders._images_below
    monkeypatch.setattr(
        image_folders, "_images_below", lambda tops: {n: [*found, found[0]] for n, found in listed(tops).items()}
    )
    assert any("images of" in why for why in failures("folders", 4))


def test_a_file_that_is_written_in_place_is_found_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(disks, "WRITERS", {"model.pt": lambda path: path.write_bytes(random.randbytes(5000))})
    monkeypatch.setattr(disks, "HINDRANCES", {"read-only": _interrupting})
    with pytest.raises(AssertionError, match="the old file is another one"):
        disks.writer(random.Random(0), tmp_path)


@contextmanager
def _interrupting(draw: random.Random, path: Path, size: int) -> Iterator[None]:
    """Half of the file is there when the disk is full."""
    with pytest.MonkeyPatch.context() as patch:

        def write(self: Path, content: bytes) -> None:
            with self.open("wb") as file:
                file.write(content[:100])
            raise OSError(28, "No space left on device")

        patch.setattr(Path, "write_bytes", write)
        yield


# --- the harness ------------------------------------------------------------------------------------------------------------


def from_torch() -> None:
    torch.zeros(2) + torch.zeros(3)


def from_python() -> None:
    raise ValueError("x must be one of these words, got y")


def from_library() -> None:
    Sparsifier(torch.nn.Linear(2, 2), "no such granularity")


def test_only_the_librarys_own_words_are_a_refusal():
    assert "granularity" in (oracles.refusal(from_library) or "")
    assert oracles.refusal(lambda: None) is None
    with pytest.raises(AssertionError, match="not a clear error"):
        oracles.refusal(from_python)
    with pytest.raises(RuntimeError):
        oracles.refusal(from_torch)


def test_a_lucky_line_is_no_refusal():
    state = Sparsifier(torch.nn.Linear(2, 2)).state_dict() | {"keep": [1]}
    with pytest.raises((AssertionError, AttributeError)):
        oracles.refusal(lambda: [keep.items() for keep in state["keep"]])


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (torch.tensor([float("nan")]), torch.tensor([float("nan")]), True),
        (torch.tensor(0.0), torch.tensor(-0.0), False),
        ({"a": [1, torch.ones(2)]}, {"a": [1, torch.ones(2)]}, True),
        ({"a": 1}, {"a": 1.0}, False),
        (torch.ones(1), torch.ones(1, dtype=torch.float64), False),
        ([1], [1, 2], False),
    ],
)
def test_equal_is_to_the_bit(a: object, b: object, expected: bool):
    assert oracles.equal(a, b) is expected


def test_a_mutation_changes_a_copy_in_one_place():
    state = {"a": [1, 2], "b": {"c": torch.ones(3)}, "d": "word"}
    before = oracles.copied(state)
    changed = 0
    for seed in range(40):
        found, kind, words = mutations.mutated(random.Random(seed), state)
        changed += not oracles.equal(found, state)
        assert kind and words
    assert oracles.equal(state, before)
    assert changed >= 35


def hang(draw: random.Random, folder: Path) -> str:
    while True:
        pass


def vanish(draw: random.Random, folder: Path) -> str:
    if draw.random() < 0.5:
        os._exit(3)
    return SURVIVED


@pytest.mark.parametrize(("seeds", "expected"), [([0, 1, 2], {SURVIVED, FAILED})])
def test_a_trial_that_takes_its_process_down_is_one_failure(
    monkeypatch: pytest.MonkeyPatch, seeds: list[int], expected: set[str]
):
    served = functools.partial(_served, vanish)
    monkeypatch.setattr(trials, "_serve", served)
    found = list(run("settings", seeds))
    assert [t.seed for t in found] == seeds
    assert all("ended with 3" in t.why for t in found if t.verdict == FAILED)


def test_a_trial_that_takes_too_long_is_a_failure(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(trials, "_serve", functools.partial(_served, hang))
    monkeypatch.setattr(settings, "SECONDS", 0.5)
    assert [t.why for t in run("settings", [7])] == ["it takes longer than 0.5 s"]


def _served(attack: object, pipe: object, name: str, seeds: list[int]) -> None:
    for seed in seeds:
        pipe.send(Trial(seed, attack(random.Random(seed), Path())))  # type: ignore[attr-defined,operator]


def test_the_command_prints_a_row_and_how_to_repeat_what_failed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    found = {1: SURVIVED, 2: REFUSED, 3: FAILED}
    monkeypatch.setattr(command, "run", lambda name, seeds: (Trial(seed, found[seed], "oh") for seed in seeds))
    assert command.main(["folders", "--seed", "1", "--count", "3"]) == 1
    out = capsys.readouterr().out
    assert re.search(r"^folders +3 +1 +1 +1 +\d+$", out, re.MULTILINE)
    assert "  --seed 3: oh" in out
    assert command.main(["folders", "--seed", "1", "--count", "2"]) == 0
    with pytest.raises(SystemExit):
        command.main(["no such kind"])


def test_trials_are_made_of_their_seed_alone():
    nets = [states.random_net(random.Random(f"x {i}")).model() for i in (1, 1)]
    assert oracles.equal(nets[0].state_dict(), nets[1].state_dict())
