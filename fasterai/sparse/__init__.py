"""The sparsifier and what stands around it."""

import os as _os

__path__.append(_os.path.join(_os.path.dirname(__file__), "..", "moved", "sparse"))  # old import paths
