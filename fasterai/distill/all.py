"""For notebooks: `from fasterai.distill.all import *`. Re-exports only; the callbacks are fastai's, where that is installed."""

import importlib.util

from fasterai.callbacks.plain import attach
from fasterai.distill import embeddings as _embeddings
from fasterai.distill import features as _features
from fasterai.distill import logits as _logits
from fasterai.distill.average import EMATeacher
from fasterai.distill.cached import CachedTeacher, load_cached_teacher
from fasterai.distill.caching import cache_teacher
from fasterai.distill.distiller import Distiller
from fasterai.distill.embeddings import *
from fasterai.distill.features import *
from fasterai.distill.hardness import Greedy
from fasterai.distill.logits import *
from fasterai.distill.logits import DecoupledKD
from fasterai.distill.maps import attention_maps, plot_attention_maps
from fasterai.distill.matching import get_model_layers, get_module_by_name, match_feature_layers
from fasterai.distill.recorder import RouteRecorder
from fasterai.distill.route import Route
from fasterai.distill.route_result import RouteResult
from fasterai.distill.teachers import NetworkTeacher, SeveralTeachers, Teacher
from fasterai.distill.tokens import Tokens

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
