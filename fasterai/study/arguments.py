"""Arguments of `fasterai study` and `python -m fasterai.study`; importing it loads nothing heavy."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

__all__ = ["ABOUT", "add_study_arguments", "read_only"]

ABOUT = """\
Compares methods over a grid of settings and seeds, and writes a table, a picture and a CSV. Without NAME it lists the studies.

What is done is kept in a storage of Optuna: a file in the output folder, or a data base that many processes on many machines
share. The same command goes on where it was interrupted, tries once more what has failed, and takes no run twice; started
several times at once, the processes share the work.
"""


def add_study_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of a study to a parser."""
    add = parser.add_argument
    add("name", nargs="?", metavar="NAME", help="of the study; without it they are listed")
    add("--data", type=Path, help="a folder with one sub-folder of images a class (default: scikit-learn's digits)")
    add("--size", default="small", help="tiny, small (two CPU cores) or full (an accelerator) (default: %(default)s)")
    add("-o", "--folder", type=Path, help="folder to write (default: study-NAME)")
    add("--storage", metavar="URL", help="of an Optuna storage to share (default: sqlite:///FOLDER/study.db)")
    add("--seeds", type=int, nargs="+", metavar="N", help="instead of the study's own")
    add("--only", action="append", default=[], metavar="AXIS=VALUE", help="a part of the grid; may be given several times")
    add("--device", default="cpu", help="of the networks: cpu, cuda, ... (default: %(default)s)")


def read_only(texts: list[str], settings: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """Read `axis=value` into the values of a grid that are written so.

    Raises:
        ValueError: A text has no `=`.
    """
    only: dict[str, list[Any]] = {}
    for text in texts:
        axis, sign, value = text.partition("=")
        if not sign:
            raise ValueError(f"--only must be AXIS=VALUE, got {text!r}")
        known = [one[axis] for one in settings if axis in one]
        meant = next((one for one in known if str(one) == value or _number(value) == one), value)
        only.setdefault(axis, []).append(meant)
    return only


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
