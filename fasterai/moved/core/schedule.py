"""The old home of `schedules`: re-exports only, so that `from fasterai.core.schedule import ...` goes on working."""

from fasterai.core.schedules import (
    Schedule,
    agp,
    cos,
    dsd,
    iterative,
    lin,
    one_cycle,
    one_shot,
    sched_agp,
    sched_cos,
    sched_dsd,
    sched_iterative,
    sched_lin,
    sched_onecycle,
    sched_oneshot,
)
from fasterai.familiar import available_schedules

__all__ = [
    "Schedule",
    "agp",
    "available_schedules",
    "cos",
    "dsd",
    "iterative",
    "lin",
    "one_cycle",
    "one_shot",
    "sched_agp",
    "sched_cos",
    "sched_dsd",
    "sched_iterative",
    "sched_lin",
    "sched_onecycle",
    "sched_oneshot",
]
