"""For notebooks: `from fasterai.misc.all import *`. Re-exports only."""

from fasterai.misc.batchnorm import BN_Folder, FoldReport, find_folds, fold_batchnorms
from fasterai.misc.decomposition import DecompositionReport, FC_Decomposer, decompose_linear, factorise_linear

__all__ = [
    "BN_Folder",
    "DecompositionReport",
    "FC_Decomposer",
    "FoldReport",
    "decompose_linear",
    "factorise_linear",
    "find_folds",
    "fold_batchnorms",
]
