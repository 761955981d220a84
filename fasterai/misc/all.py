"""For notebooks: `from fasterai.misc.all import *`. Re-exports only; the reports that calls return are importable by name."""

from fasterai.misc.batchnorm import BN_Folder, find_folds, fold_batchnorms
from fasterai.misc.batchnorm import FoldReport as FoldReport
from fasterai.misc.decomposition import DecompositionReport as DecompositionReport
from fasterai.misc.decomposition import FC_Decomposer, decompose_linear, factorise_linear

__all__ = ["BN_Folder", "FC_Decomposer", "decompose_linear", "factorise_linear", "find_folds", "fold_batchnorms"]
