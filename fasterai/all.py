"""For notebooks: `from fasterai.all import *`. Re-exports only."""

from fasterai.sparse import all as _sparse
from fasterai.sparse.all import *

__all__ = list(_sparse.__all__)
