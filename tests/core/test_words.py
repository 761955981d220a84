"""Words that people type: each finds the entry that it means, or an error that says what to write."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch
from torch import nn

from fasterai.callbacks.fastai import SparsifyCallback
from fasterai.core import contexts, criteria, granularities, schedules
from fasterai.core.checks import entry_name, from_catalogue
from fasterai.core.words import ARGUMENTS, HINTS, NAMES, find_entry, hint_for
from fasterai.prune.pruner import Pruner
from fasterai.units import rules

CATALOGUES = {
    "criteria": criteria,
    "granularities": granularities,
    "contexts": contexts,
    "schedules": schedules,
    "rules": rules,
}

FOUND = [
    ("criteria", "magnitude", criteria.large_final),
    ("criteria", "l1", criteria.large_final),
    ("criteria", "L1-norm", criteria.large_final),
    ("criteria", "abs", criteria.large_final),
    ("criteria", "l2", criteria.squared_final),
    ("granularities", "unstructured", granularities.weight),
    ("contexts", "2:4", contexts.two_four),
    ("contexts", "uniform", contexts.local),
    ("contexts", "global_", contexts.global_),
    ("schedules", "linear", schedules.lin),
    ("schedules", "cosine", schedules.cos),
    ("schedules", "cubic", schedules.agp),
    ("schedules", "oneshot", schedules.one_shot),
    ("rules", "SR-STE", rules.free),
]

HINTED = [
    ("criteria", "activation", "did you mean 'wanda'"),
    ("criteria", "gradient", "did you mean 'snip'"),
    ("criteria", "structured", "granularity='filter'"),
    ("granularities", "structured", "granularity='filter' .masks., or 'coupled'"),
    ("granularities", "head", "granularity='coupled'"),
    ("granularities", "channels", "'coupled' is one that can be removed"),
    ("granularities", "block", "from fasterai import Block"),
    ("granularities", "2:4", "context='two_four'"),
    ("granularities", "percent", "sparsity=0.5 for 50 %"),
    ("granularities", "Filter", "did you mean 'filter'"),
    ("contexts", "1:4", r"NM\(1, 4\)"),
    ("contexts", "structured", "granularity='filter'"),
    ("contexts", "layer", "did you mean 'local'"),
    ("schedules", "exponential", r"schedule=lambda position: position \*\* 2"),
    ("schedules", "constant", r"OneShot\(0\)"),
    ("schedules", "ONE_CYCLE", "did you mean 'one_cycle'"),
    ("rules", "rigl", r"rule=DropAndGrow\("),
]


@pytest.mark.parametrize(("catalogue", "word", "entry"), FOUND)
def test_a_word_with_one_meaning_is_a_further_name(catalogue, word, entry):
    assert from_catalogue("x", word, CATALOGUES[catalogue]) is entry


@pytest.mark.parametrize(("catalogue", "word", "message"), HINTED)
def test_a_word_without_one_meaning_is_refused_with_what_to_write(catalogue, word, message):
    with pytest.raises(ValueError, match=f"x must be one of .*, got '{word}'; .*{message}"):
        from_catalogue("x", word, CATALOGUES[catalogue])


@pytest.mark.parametrize("catalogue", CATALOGUES)
def test_further_names_lead_to_entries_and_never_hide_one(catalogue):
    entries = {name.rstrip("_") for name in CATALOGUES[catalogue].__all__}
    assert set(NAMES[catalogue].values()) <= entries
    assert not entries & NAMES[catalogue].keys()
    assert not entries & HINTS.get(catalogue, {}).keys()
    assert not NAMES[catalogue].keys() & HINTS.get(catalogue, {}).keys()
    for word in entries:
        assert find_entry(catalogue, word) == word


PAGES = {
    "criteria": "criteria",
    "granularities": "granularities",
    "contexts": "contexts",
    "schedules": "schedules",
    "rules": "contexts",
}


@pytest.mark.parametrize("catalogue", CATALOGUES)
def test_further_names_stand_in_the_catalogues_page(catalogue):
    page = (Path(__file__).parents[2] / "docs" / f"{PAGES[catalogue]}.md").read_text(encoding="utf-8")
    assert [word for word in NAMES[catalogue] if f"`{word}`" not in page] == []


def test_the_entrys_name_is_what_is_noted():
    assert entry_name("--criteria", "Magnitude", criteria) == "large_final"
    assert entry_name("--context", "per-layer", contexts, ("local", "global")) == "local"
    with pytest.raises(ValueError, match="--context must be one of local, global, got '2:4'; N:M is a context"):
        entry_name("--context", "2:4", contexts, ("local", "global"))
    with pytest.raises(TypeError, match=r"--context must be one of local, got 3 \(int\)"):
        entry_name("--context", 3, contexts, ("local",))


def test_what_nobody_knows_gets_no_hint():
    assert hint_for("criteria", "zzz") is None
    assert find_entry("nowhere", "zzz") == "zzz"


def make_pruner(**keywords):
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    return Pruner(model, 0.5, "local", example_inputs=torch.randn(2, 3), **keywords)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make_pruner(importance="l1"), "importance must be left out, got 'l1'; .* is criteria=, such as criteria="),
        (
            lambda: SparsifyCallback(None, "weight", "local", "magnitude", "agp", end_sparsity=0.5),
            "end_sparsity must be left out, got 0.5; .* is sparsity=, such as",
        ),
    ],
)
def test_an_argument_of_others_calls_is_refused_with_the_one_that_is_meant(call, message):
    with pytest.raises(TypeError, match=message):
        call()


def test_arguments_of_others_calls_are_none_of_ours_and_change_no_signature():
    homes = {"Pruner": Pruner, "SparsifyMethod": SparsifyCallback}
    assert homes.keys() == ARGUMENTS.keys()
    for name, home in homes.items():
        assert not ARGUMENTS[name].keys() & inspect.signature(home).parameters.keys()
    assert list(inspect.signature(Pruner).parameters)[:4] == ["model", "pruning_ratio", "context", "criteria"]
    assert make_pruner(criteria="magnitude").criteria == criteria.large_final
    with pytest.raises(TypeError, match="unexpected keyword argument 'importances'"):
        make_pruner(importances="l1")
