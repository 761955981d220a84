"""The old home of the decomposer of convolutions: a re-export only."""

from fasterai.misc.convolutions import VALID_METHODS, Conv_Decomposer

__all__ = ["VALID_METHODS", "Conv_Decomposer"]
