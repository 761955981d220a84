"""Catalogue of the studies: the modules beside this one that hold a `STUDY`. To add one, write its name here."""

from __future__ import annotations

import importlib

from fasterai.core.checks import check_choice
from fasterai.study.description import Study

__all__ = ["STUDIES", "find_study"]

STUDIES = (
    "channel_criteria",
    "criteria",
    "distillation",
    "distilled_pruning",
    "dynamic",
    "experts",
    "features",
    "granularities",
    "nm",
    "pretraining",
    "regularization",
    "retrieval",
    "routed_experts",
    "routes",
    "schedules",
    "scratch",
    "ternary",
    "tickets",
    "transformers",
    "variety",
)


def find_study(name: str) -> Study:
    """Return a study by its name.

    Raises:
        ValueError: There is none; the known ones are listed.
    """
    study: Study = importlib.import_module(f"fasterai.study.{check_choice('study', name, STUDIES)}").STUDY
    return study
