"""Tests stand where their source does: `fasterai/a/b.py` is tested in `tests/a/test_b.py`, a part of it in `test_b_part.py`."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
PACKAGE = TESTS.parent / "fasterai"
#: What no single source file stands for.
OTHERS = {
    "attack/test_attack.py": "the attack on the library's reliability, a few trials of each kind",
    "callbacks/test_coupled.py": "coupled channels in each of the loops",
    "callbacks/test_events.py": "the table of events in each of the loops",
    "callbacks/test_own_method.py": "a method of one's own, as the page has it",
    "callbacks/test_sparsify_and_prune.py": "two methods in one training",
    "callbacks/test_training_on.py": "ends and what comes after them in each of the loops",
    "cli/test_spoiled_folders.py": "a run's folder that is full, read-only or gone, at every point of a resumed run",
    "cli/test_strange_files.py": "what lies in folders of images besides images, in each of the commands",
    "distill/test_known_defects.py": "defects of distillation elsewhere",
    "graph/rules/test_call_forms.py": "every rule, in each form of a call",
    "graph/rules/test_operations.py": "every rule, on the calls that networks make",
    "prune/test_trained.py": "removal from networks that have been trained under masks",
    "prune/test_transformers.py": "random transformers",
    "prune/test_zoo.py": "networks of other libraries",
    "test_docs.py": "code of the pages",
    "test_docstrings.py": "docstrings and lengths of all sources",
    "test_import.py": "the package as a whole",
    "test_known_defects.py": "defects of earlier versions: sparsifying",
    "test_known_defects_callbacks.py": "defects of earlier versions: callbacks",
    "test_known_defects_misc.py": "defects of earlier versions: folding, factoring, exports",
    "test_known_defects_prune.py": "defects of earlier versions: removing channels",
    "test_layers.py": "who imports whom",
    "test_mirror.py": "this",
    "test_notebooks.py": "notebooks",
    "test_reference.py": "reference pages, and the build of the site",
    "test_story.py": "from a dense network to a small one",
    "test_tutorial.py": "the script of the first page",
}


def find_source(test: str, sources: Collection[str]) -> str | None:
    """Find the source that a test file mirrors, both from their roots on; None if there is none."""
    folder, _, file = test.rpartition("/")
    words = file.removeprefix("test_").removesuffix(".py").split("_")
    names = ["_".join(words[:n]) for n in range(len(words), 0, -1)]
    paths = [f"{folder}/{name}.py".lstrip("/") for name in [*names, *(f"__{name}__" for name in names)]]
    return next((path for path in paths if path in sources), None)


def paths_below(root: Path, pattern: str) -> list[str]:
    return [path.relative_to(root).as_posix() for path in sorted(root.rglob(pattern))]


def test_every_test_file_mirrors_a_source_or_is_said_to_stand_for_more():
    sources = set(paths_below(PACKAGE, "*.py"))
    astray = [test for test in paths_below(TESTS, "test_*.py") if find_source(test, sources) is None and test not in OTHERS]
    assert astray == [], "rename them after their source, or say in OTHERS what they are for"


def test_what_is_said_to_stand_for_more_is_there_and_mirrors_no_source():
    tests, sources = paths_below(TESTS, "test_*.py"), set(paths_below(PACKAGE, "*.py"))
    assert set(OTHERS) <= set(tests)
    assert {test: source for test in OTHERS if (source := find_source(test, sources))} == {}


@pytest.mark.parametrize(
    ("test", "source"),
    [
        ("core/test_loop.py", "core/loop.py"),
        ("core/test_loop_ends.py", "core/loop.py"),
        ("analyze/test_layer_times.py", "analyze/layer_times.py"),
        ("cli/test_main.py", "cli/__main__.py"),
        ("test_display.py", "display.py"),
        ("core/test_loops.py", None),
        ("test_loop.py", None),
        ("sparse/test_loop.py", None),
        ("core/test_display.py", None),
    ],
)
def test_a_test_file_elsewhere_is_found(test: str, source: str | None):
    sources = {"core/loop.py", "analyze/layer_times.py", "analyze/layer.py", "cli/__main__.py", "cli/__init__.py", "display.py"}
    assert find_source(test, sources) == source
