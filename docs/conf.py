"""Sphinx settings: `pip install -e '.[docs]' && sphinx-build docs docs/_build` writes the site."""

import shutil
from pathlib import Path

import fasterai

HERE = Path(__file__).parent
# Sphinx reads below its own folder only; the notebooks keep the outputs that they are committed with.
shutil.copytree(HERE.parent / "nbs", HERE / "nbs", dirs_exist_ok=True, ignore=shutil.ignore_patterns(".ipynb_checkpoints"))

project = "fasterai"
author = "The fasterai authors"
copyright = "2026, The fasterai authors"
version = release = fasterai.__version__

extensions = ["myst_nb"]
nb_execution_mode = "off"
myst_heading_anchors = 3
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "fasterai"
