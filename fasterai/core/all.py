"""For notebooks: `from fasterai.core.all import *`. Re-exports only.

The catalogues of criteria, schedules and contexts and the familiar calls come whole, so that a new entry arrives by itself;
granularities are given by their names, `"filter"`. What is left out, because it would change what a user has, is removed at
the end with its reason, and stays importable by name (`import Linear as Linear`). The stars that hold this one import the
catalogues once more: mypy follows no `__all__ +=`, and would not find `from fasterai.sparse.all import agp`.
"""

from fasterai import familiar as _familiar
from fasterai.core import contexts as _contexts
from fasterai.core import criteria as _criteria
from fasterai.core import schedules as _schedules
from fasterai.core.contexts import *
from fasterai.core.contexts import NM
from fasterai.core.criteria import *
from fasterai.core.criteria import Criterion, Random, variety
from fasterai.core.granularities import Block as Block
from fasterai.core.granularities import Coupled, Keep
from fasterai.core.schedules import *
from fasterai.core.schedules import (
    AGP,
    DSD,
    Alternating,
    Cosine,
    Iterative,
    OneCycle,
    OneShot,
    Piecewise,
    Schedule,
    sched_agp,
    sched_dsd,
    sched_iterative,
    sched_onecycle,
    sched_oneshot,
)
from fasterai.core.schedules import Linear as Linear
from fasterai.core.schedules import sched_cos as sched_cos
from fasterai.core.schedules import sched_lin as sched_lin
from fasterai.familiar import *
from fasterai.model.layouts import register_axes

schedules = tuple(_schedules.__all__)

__all__ = [
    "AGP",
    "Alternating",
    "Cosine",
    "Coupled",
    "Criterion",
    "DSD",
    "Iterative",
    "Keep",
    "NM",
    "OneCycle",
    "OneShot",
    "Piecewise",
    "Random",
    "Schedule",
    "register_axes",
    "sched_agp",
    "sched_dsd",
    "sched_iterative",
    "sched_onecycle",
    "sched_oneshot",
    "schedules",
    "variety",
]
__all__ += _contexts.__all__
__all__ += _criteria.__all__
__all__ += _schedules.__all__
__all__ += _familiar.__all__
__all__.remove("global_")  # given as "global", its name
__all__.remove("random")  # Python's module; given as "random", or as Random(seed)
