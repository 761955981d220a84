"""For notebooks: `from fasterai.all import *`, the star imports of all packages in one. Re-exports only."""

from fasterai.analyze import all as _analyze
from fasterai.analyze.all import *
from fasterai.distill import all as _distill
from fasterai.distill.all import *
from fasterai.export import all as _export
from fasterai.export.all import *
from fasterai.misc import all as _misc
from fasterai.misc.all import *
from fasterai.prune import all as _prune
from fasterai.prune.all import *
from fasterai.regularize import all as _regularize
from fasterai.regularize.all import *
from fasterai.sparse import all as _sparse
from fasterai.sparse.all import *

__all__: list[str] = []
__all__ += _analyze.__all__
__all__ += _distill.__all__
__all__ += _export.__all__
__all__ += _misc.__all__
__all__ += _prune.__all__
__all__ += _regularize.__all__
__all__ += _sparse.__all__
