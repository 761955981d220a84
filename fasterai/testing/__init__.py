"""Checks of the promises that catalogue entries make: plain functions for our own tests, and for entries of your own.

Each check takes one entry, returns nothing, and raises AssertionError with the promise that is broken.
To add one: a function `check_<axis>(entry)` that is run over the whole catalogue in the tests.

>>> from fasterai.core.schedules import Custom, sched_lin
>>> check_schedule(Custom(sched_lin, start_pct=0.25))
"""

from fasterai.testing.catalogues import LAYOUTS, check_context, check_criterion, check_granularity, check_schedule
from fasterai.testing.distillation import check_distillation_loss
from fasterai.testing.participants import check_participant

__all__ = [
    "LAYOUTS",
    "check_context",
    "check_criterion",
    "check_distillation_loss",
    "check_granularity",
    "check_participant",
    "check_schedule",
]
