"""Removal of channels: groups of coupled channels are found in the network's own operations."""

import os as _os

__path__.append(_os.path.join(_os.path.dirname(__file__), "..", "moved", "prune"))  # old import paths
