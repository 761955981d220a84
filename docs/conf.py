"""Sphinx settings: `pip install -e '.[docs]' && sphinx-build -W docs docs/_build` writes the site."""

import inspect
import re
import shutil
from pathlib import Path
from typing import Any

import fasterai

HERE = Path(__file__).parent
# Sphinx reads below its own folder only; the notebooks keep the outputs that they are committed with.
# Those of before go first: one that was renamed since would stay.
shutil.rmtree(HERE / "nbs", ignore_errors=True)
shutil.copytree(
    HERE.parent / "nbs",
    HERE / "nbs",
    dirs_exist_ok=True,
    ignore=shutil.ignore_patterns(".ipynb_checkpoints"),
)

project = "fasterai"
author = "The fasterai authors"
copyright = "2026, The fasterai authors"
version = release = fasterai.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
nb_execution_mode = "off"
myst_heading_anchors = 3
html_theme = "furo"
html_title = "fasterai"
html_css_files = ["site.css"]
html_static_path = ["_static"]

# The reference: docstrings are Google's, with code in single backticks and types in the signature.
default_role = "code"
add_module_names = False
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
python_maximum_signature_line_length = 88
python_use_unqualified_type_names = True

COLON = "\ufdd0"  # stands for a colon while Napoleon looks
CATALOGUES = {
    f"fasterai.core.{name}": f"{name}.md"
    for name in ("granularities", "contexts", "criteria", "schedules")
}


def row_of(page: str, name: str) -> list[str]:
    """Return what the table of a catalogue's page says of an entry, a line for each column that is not empty."""
    header: list[str] = []
    for line in (HERE / page).read_text(encoding="utf-8").splitlines():
        cells = [
            cell.strip().replace(r"\|", "|")
            for cell in re.split(r"(?<!\\)\|", line)[1:-1]
        ]
        if not cells:
            header = []
        elif not header:
            header = cells
        elif f"`{name}`" in cells[0]:
            return [
                f"- {what}: {_plain(said)}"
                for what, said in zip(header[1:], cells[1:], strict=True)
                if said not in ("", "-")
            ]
    raise LookupError(f"{page} has no row of {name}")


def _plain(said: str) -> str:
    """Turn a cell's Markdown into reStructuredText: bars, stars and underscores are themselves."""
    return re.sub(r"([|*_])", r"\\\1", said)


def before_napoleon(
    app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    """Give a class without a docstring its base's, and hide colons that are no fields."""
    if what == "class" and not any(lines):
        lines[:] = [*(inspect.getdoc(obj) or "").splitlines(), ""]
    if what in ("attribute", "property"):  # what stands before a colon is no type
        lines[:] = [line.replace(":", COLON) for line in lines]


def after_napoleon(
    app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    """Give a ready-made value the row of its catalogue, instead of its class's docstring."""
    module, _, value = name.rpartition(".")
    if what == "data":
        page = CATALOGUES.get(module)
        lines[:] = [*row_of(page, value), ""] if page else [""]
    lines[:] = [line.replace(COLON, ":") for line in lines]


def point_at_notebooks(app: Any, name: str, source: list[str]) -> None:
    """Turn links to `nbs/`, which lies beside this folder in the repository, to its copy in here."""
    source[0] = source[0].replace("](../nbs/", "](nbs/")


def setup(app: Any) -> None:
    """Register what this file adds to Sphinx."""
    app.connect("autodoc-process-docstring", before_napoleon, priority=400)
    app.connect("autodoc-process-docstring", after_napoleon, priority=600)
    app.connect("source-read", point_at_notebooks)
