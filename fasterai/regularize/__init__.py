"""Penalties on the units of a model, which drive whole units to zero while it trains."""

import os as _os

__path__.append(_os.path.join(_os.path.dirname(__file__), "..", "moved", "regularize"))  # old import paths
