"""For notebooks: `from fasterai.distill.all import *`. Re-exports only; the callbacks are fastai's, where that is installed."""

import importlib.util

from fasterai.callbacks.plain import attach
from fasterai.distill.distiller import Distiller

if importlib.util.find_spec("fastai") is not None:
    from fasterai.callbacks.fastai import KnowledgeDistillationCallback, ParticipantCallback

else:
    from fasterai.callbacks.missing import KnowledgeDistillationCallback, ParticipantCallback  # type: ignore[assignment]

__all__ = ["Distiller", "KnowledgeDistillationCallback", "ParticipantCallback", "attach"]
