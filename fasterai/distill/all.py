"""For notebooks: `from fasterai.distill.all import *`. Re-exports only; the callbacks are fastai's, where that is installed."""

import importlib.util

from fasterai.callbacks.plain import attach
from fasterai.distill.average import EMATeacher
from fasterai.distill.cache.cached import CachedTeacher, load_cached_teacher
from fasterai.distill.cache.caching import cache_teacher
from fasterai.distill.distiller import Distiller
from fasterai.distill.losses import embeddings as _embeddings
from fasterai.distill.losses import features as _features
from fasterai.distill.losses import logits as _logits
from fasterai.distill.losses.embeddings import *
from fasterai.distill.losses.features import *
from fasterai.distill.losses.logits import *
from fasterai.distill.losses.logits import DecoupledKD
from fasterai.distill.losses.tokens import Tokens
from fasterai.distill.maps import attention_maps, plot_attention_maps
from fasterai.distill.matching import get_model_layers, get_module_by_name, match_feature_layers
from fasterai.distill.routes.hardness import Greedy
from fasterai.distill.routes.recorder import RouteRecorder
from fasterai.distill.routes.result import RouteResult
from fasterai.distill.routes.route import Route
from fasterai.distill.teachers import NetworkTeacher, SeveralTeachers, Teacher

if importlib.util.find_spec("fastai") is not None:
    from fasterai.callbacks.fastai import KnowledgeDistillationCallback, ParticipantCallback

else:
    from fasterai.callbacks.missing import KnowledgeDistillationCallback, ParticipantCallback  # type: ignore[assignment]

__all__ = [
    "CachedTeacher",
    "DecoupledKD",
    "Distiller",
    "EMATeacher",
    "Greedy",
    "KnowledgeDistillationCallback",
    "NetworkTeacher",
    "ParticipantCallback",
    "Route",
    "RouteRecorder",
    "RouteResult",
    "SeveralTeachers",
    "Teacher",
    "Tokens",
    "attach",
    "attention_maps",
    "cache_teacher",
    "get_model_layers",
    "get_module_by_name",
    "load_cached_teacher",
    "match_feature_layers",
    "plot_attention_maps",
]
__all__ += _embeddings.__all__
__all__ += _features.__all__
__all__ += _logits.__all__
