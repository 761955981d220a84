"""Changes to a model that keep its outputs: batch norms folded into their layers, linear layers factorised."""

import os as _os

__path__.append(_os.path.join(_os.path.dirname(__file__), "..", "moved", "misc"))  # old import paths
