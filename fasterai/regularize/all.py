"""For notebooks: `from fasterai.regularize.all import *`. Re-exports only; callbacks are fastai's, if it is there."""

import importlib.util

from fasterai.callbacks.plain import attach
from fasterai.core import all as _core
from fasterai.core.all import *
from fasterai.core.contexts import *
from fasterai.core.criteria import *
from fasterai.core.schedules import *
from fasterai.familiar import *
from fasterai.prune.removal import remove
from fasterai.regularize import penalties as _penalties
from fasterai.regularize.penalties import *
from fasterai.regularize.penalties import L1, GroupLasso, Growing, Slimming
from fasterai.regularize.regularizer import Regularizer

if importlib.util.find_spec("fastai") is not None:
    from fasterai.callbacks.fastai import ParticipantCallback, RegularizeCallback

else:
    from fasterai.callbacks.missing import ParticipantCallback, RegularizeCallback  # type: ignore[assignment]

__all__ = [
    "GroupLasso",
    "Growing",
    "L1",
    "ParticipantCallback",
    "RegularizeCallback",
    "Regularizer",
    "Slimming",
    "attach",
    "remove",
]
__all__ += _penalties.__all__
__all__ += _core.__all__
