"""Studies: a grid of settings and seeds, run by any number of processes, with a table, a picture and a CSV.

Importing it loads no Optuna; that is needed when a study runs.
"""

from __future__ import annotations

from fasterai.study.catalogue import STUDIES, find_study
from fasterai.study.description import SIZES, Size, Study
from fasterai.study.engine import run
from fasterai.study.pretraining import pretraining
from fasterai.study.result import Result

__all__ = ["SIZES", "STUDIES", "Result", "Size", "Study", "find_study", "pretraining", "run"]
