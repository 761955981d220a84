"""The old home of the decomposer of linear layers: a re-export only."""

from fasterai.misc.decomposition import FC_Decomposer

__all__ = ["FC_Decomposer"]
