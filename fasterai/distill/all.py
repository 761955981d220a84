"""For notebooks: `from fasterai.distill.all import *`. Re-exports only; the callbacks are fastai's, where that is installed."""

import importlib.util

from fasterai.callbacks.plain import attach
from fasterai.distill import features as _features
from fasterai.distill import logits as _logits
from fasterai.distill.distiller import Distiller
from fasterai.distill.features import *
from fasterai.distill.logits import *
from fasterai.distill.tokens import Tokens

if importlib.util.find_spec("fastai") is not None:
    from fasterai.callbacks.fastai import KnowledgeDistillationCallback, ParticipantCallback

else:
    from fasterai.callbacks.missing import KnowledgeDistillationCallback, ParticipantCallback  # type: ignore[assignment]

__all__ = ["Distiller", "KnowledgeDistillationCallback", "ParticipantCallback", "Tokens", "attach"]
__all__ += _features.__all__
__all__ += _logits.__all__
