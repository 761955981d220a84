"""Values, checks, loop events and the four axes; pure functions of plain tensors."""

import os as _os

__path__.append(_os.path.join(_os.path.dirname(__file__), "..", "moved", "core"))  # old import paths
