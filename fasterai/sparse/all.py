"""For notebooks: `from fasterai.sparse.all import *`. Re-exports only; the callbacks are fastai's, where that is installed."""

import importlib.util

from fasterai.callbacks.plain import attach
from fasterai.core import all as _core
from fasterai.core.all import *
from fasterai.core.contexts import *
from fasterai.core.criteria import *
from fasterai.core.schedules import *
from fasterai.familiar import *
from fasterai.sparse.dynamic.acdc import ACDC
from fasterai.sparse.dynamic.regrow import SET, RigL, StaticSparse
from fasterai.sparse.dynamic.thresholds import STR
from fasterai.sparse.nm.sad import SAD as SAD
from fasterai.sparse.nm.sad import sad
from fasterai.sparse.nm.semi_structured import SemiStructured as SemiStructured
from fasterai.sparse.nm.semi_structured import to_semi_structured
from fasterai.sparse.nm.srste import SRSTE, STE
from fasterai.sparse.sparsifier import Sparsifier
from fasterai.sparse.tickets.lottery import LotteryTicket
from fasterai.sparse.tickets.rounds import find_ticket
from fasterai.sparse.tickets.ticket import Ticket

if importlib.util.find_spec("fastai") is not None:
    from fasterai.callbacks.fastai import (
        ACDCCallback,
        HoldCallback,
        ParticipantCallback,
        RigLCallback,
        SETCallback,
        SparsifyCallback,
        SRSTECallback,
        StaticCallback,
        STECallback,
        STRCallback,
    )

else:
    from fasterai.callbacks.missing import (  # type: ignore[assignment]
        ACDCCallback,
        HoldCallback,
        ParticipantCallback,
        RigLCallback,
        SETCallback,
        SparsifyCallback,
        SRSTECallback,
        StaticCallback,
        STECallback,
        STRCallback,
    )

__all__ = ["HoldCallback", "LotteryTicket", "ParticipantCallback", "Sparsifier", "SparsifyCallback", "Ticket", "attach"]
__all__ += ["SRSTE", "SRSTECallback", "STE", "STECallback", "find_ticket", "sad", "to_semi_structured"]
__all__ += ["ACDC", "ACDCCallback", "RigL", "RigLCallback", "SET", "SETCallback", "STR", "STRCallback"]
__all__ += ["StaticCallback", "StaticSparse"]
__all__ += _core.__all__
