"""For notebooks: `import fasterai.analyze.all as analyze`, then `analyze.cost(model, x)`. Re-exports only.

`cost`, `compare`, `latency` are words that a notebook has uses of its own for. So `from fasterai.analyze.all import *` gives
this module by the name `analyze`, with the criteria and schedules; `from fasterai.analyze.all import cost` works too.
"""

from fasterai.analyze import all as analyze  # noqa: PLW0406 - the star brings this module by its name
from fasterai.analyze.catalogues import plot_contexts as plot_contexts
from fasterai.analyze.catalogues import plot_criteria as plot_criteria
from fasterai.analyze.catalogues import plot_granularities as plot_granularities
from fasterai.analyze.catalogues import plot_schedules as plot_schedules
from fasterai.analyze.comparison import Comparison as Comparison
from fasterai.analyze.comparison import compare as compare
from fasterai.analyze.cost import Cost as Cost
from fasterai.analyze.cost import cost as cost
from fasterai.analyze.filters import plot_filters as plot_filters
from fasterai.analyze.filters import plot_similarity as plot_similarity
from fasterai.analyze.latency import Latency as Latency
from fasterai.analyze.latency import LatencyComparison as LatencyComparison
from fasterai.analyze.latency import compare_latency as compare_latency
from fasterai.analyze.latency import latency as latency
from fasterai.analyze.sensitivity import LayerSensitivity as LayerSensitivity
from fasterai.analyze.sensitivity import Sensitivity as Sensitivity
from fasterai.analyze.sensitivity import SensitivityAnalyzer, analyze_sensitivity
from fasterai.analyze.sensitivity import SensitivityResult as SensitivityResult
from fasterai.analyze.sensitivity import sensitivity as sensitivity
from fasterai.core import all as _core
from fasterai.core.all import *
from fasterai.core.contexts import *
from fasterai.core.criteria import *
from fasterai.core.schedules import *
from fasterai.familiar import *
from fasterai.sparse.sparsifier import Sparsifier

__all__ = ["SensitivityAnalyzer", "Sparsifier", "analyze", "analyze_sensitivity"]
__all__ += _core.__all__
