"""For notebooks: `from fasterai.analyze.all import *`. Re-exports only."""

from fasterai.analyze.comparison import Comparison, compare
from fasterai.analyze.cost import Cost, cost
from fasterai.analyze.latency import Latency, LatencyComparison, compare_latency, latency
from fasterai.analyze.sensitivity import Sensitivity, sensitivity
from fasterai.core import all as _core
from fasterai.core.all import *
from fasterai.sparse.sparsifier import Sparsifier

__all__ = [
    *_core.__all__,
    "Comparison",
    "Cost",
    "Latency",
    "LatencyComparison",
    "Sensitivity",
    "Sparsifier",
    "compare",
    "compare_latency",
    "cost",
    "latency",
    "sensitivity",
]
