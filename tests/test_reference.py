"""Every public name stands on a page of docs/reference/, and the site builds without a warning.

Public is what an `all.py`, the package itself or a callbacks' module gives, and what the pages and notebooks import. A page
names an object by an autodoc directive; where Sphinx is not installed, the directives are read here and the names looked up.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import fasterai
from tests.beside import Beside, waits_for

ROOT = Path(__file__).parents[1]
REFERENCE = sorted((ROOT / "docs" / "reference").glob("*.md"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "nbs").glob("*.ipynb"))]
DIRECTIVE = re.compile(r"^\.\. auto(?:class|function|data):: (\S+)$", re.MULTILINE)
IMPORT = re.compile(r"from (fasterai[\w.]*) import ([\w, ]+)")
STARS = [
    "fasterai.all",
    *(f"fasterai.{room}.all" for room in ("core", "sparse", "prune", "regularize", "analyze", "misc", "export")),
]
WHOLE = [f"fasterai.callbacks.{loop}" for loop in ("fastai", "lightning", "huggingface", "plain")]
WHOLE += ["fasterai.familiar", "fasterai.testing", "fasterai.units.rules"]
WHOLE += [f"fasterai.core.{axis}" for axis in ("granularities", "contexts", "criteria", "schedules")]
INSIDE = {"LAYOUTS"}  # what `fasterai.testing` checks by default


def look_up(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def is_ours(name: str, value: Any) -> bool:
    home = getattr(value, "__module__", None) if inspect.isclass(value) or inspect.isroutine(value) else "fasterai"
    return not name.startswith("_") and not inspect.ismodule(value) and str(home).startswith("fasterai")


def public() -> dict[tuple[str, int], str]:
    """Find the public objects: name and identity -> an import path."""
    found = {name: importlib.import_module(name) for name in [*STARS, *WHOLE]}
    paths = [f"fasterai.{name}" for name in dir(fasterai) if name != "__version__"]
    paths += [f"{module}.{name}" for module in STARS for name, value in vars(found[module]).items() if is_ours(name, value)]
    paths += [f"{module}.{name}" for module in WHOLE for name in found[module].__all__ if name not in INSIDE]
    for page in PAGES:
        for module, names in IMPORT.findall(page.read_text(encoding="utf-8")):
            paths += [f"{module}.{name.strip()}" for name in names.split(",")]
    objects = {path: look_up(path) for path in paths if not path.endswith("TYPE_CHECKING")}
    return {(path.rpartition(".")[2], id(value)): path for path, value in objects.items() if not inspect.ismodule(value)}


def documented() -> dict[tuple[str, int], str]:
    """Find the objects of the reference: name and identity -> the path that stands there."""
    paths = [path for page in REFERENCE for path in DIRECTIVE.findall(page.read_text(encoding="utf-8"))]
    assert len(paths) == len(set(paths)), "a name stands twice"
    return {(path.rpartition(".")[2], id(look_up(path))): path for path in paths}


def test_every_public_name_stands_on_a_reference_page() -> None:
    names, there = public(), documented()
    assert len(names) > 120
    missing = sorted(path for key, path in names.items() if key not in there)
    assert missing == [], "add a directive to a page of docs/reference/, for instance `.. autofunction:: " + "".join(
        missing[:1]
    )


def test_a_missing_name_would_be_found() -> None:
    names, there = public(), documented()
    pruner = next(key for key in names if key[0] == "Pruner")
    assert pruner in there
    assert ("Pruner", id(object())) not in there
    assert {"fastai", "lightning", "huggingface"} <= {
        path.split(".")[-2] for key, path in there.items() if key[0] == "HoldCallback"
    }


def test_functions_and_classes_of_the_reference_have_docstrings() -> None:
    objects = {path: look_up(path) for path in documented().values()}
    silent = [path for path, o in objects.items() if (inspect.isroutine(o) or inspect.isclass(o)) and not inspect.getdoc(o)]
    assert silent == []


def says_nothing(path: str, page: str) -> bool:
    """Tell if an entry of a built page has no text below its signature."""
    entry = page.partition(f' id="{path}">')[2].partition("<dd>")[2].partition("<dt ")[0]
    return not re.search(r"<p>\s*\S", entry)


def built(folder: Path, environment: Mapping[str, str]) -> Path:
    """Build the site."""
    sphinx = [sys.executable, "-W", "ignore", "-m", "sphinx", "-q", "-E", "-W", "--keep-going", "-b", "html"]
    run = subprocess.run(
        [*sphinx, "docs", str(folder)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500, check=False
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return folder


@pytest.mark.skipif(importlib.util.find_spec("myst_nb") is None, reason="Sphinx comes with the extra `docs`; .ci/run builds")
@waits_for(built)
def test_the_site_builds_without_a_warning_and_its_index_is_full(beside: Beside) -> None:
    site = beside(built)
    index = (site / "genindex.html").read_text(encoding="utf-8")
    assert [path for path in documented().values() if f"#{path}" not in index] == []
    pages = "".join(page.read_text(encoding="utf-8") for page in (site / "reference").glob("*.html"))
    assert [path for path in documented().values() if says_nothing(path, pages)] == []
    assert "which compete:" in pages and "Type<span" not in pages  # of rows of the catalogues, no field was made
    for page in site.rglob("*.html"):
        if page.parent.name != "_static" and page.name != "search.html":
            text = page.read_text(encoding="utf-8")
            assert "<h1" in text, page
            assert [
                image for image in re.findall(r'<img[^>]* src="([^":]+)"', text) if not (page.parent / image).is_file()
            ] == []
