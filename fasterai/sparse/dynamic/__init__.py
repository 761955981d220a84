"""Dynamic sparse training: masks that start at random and move, phases that alternate, thresholds that are learned."""

from fasterai.sparse.dynamic.acdc import ACDC
from fasterai.sparse.dynamic.regrow import SET, RigL, StaticSparse
from fasterai.sparse.dynamic.thresholds import STR

__all__ = ["ACDC", "SET", "STR", "RigL", "StaticSparse"]
