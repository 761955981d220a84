"""Distillation: small networks that learn from large ones."""

import os as _os

__path__.append(_os.path.join(_os.path.dirname(__file__), "..", "moved", "distill"))  # old import paths
