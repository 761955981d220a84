"""For notebooks: `from fasterai.misc.all import *`. Re-exports only; the reports that calls return are importable by name.

The callback is fastai's, where that is installed.
"""

import importlib.util

from fasterai.misc.batchnorm import BN_Folder, find_folds, fold_batchnorms
from fasterai.misc.batchnorm import FoldReport as FoldReport
from fasterai.misc.convolutions import VALID_METHODS, Conv_Decomposer, decompose_convolutions, factorise_convolution
from fasterai.misc.convolutions import ConvolutionReport as ConvolutionReport
from fasterai.misc.decomposition import DecompositionReport as DecompositionReport
from fasterai.misc.decomposition import FC_Decomposer, decompose_linear, factorise_linear
from fasterai.misc.ternary.files import load_ternary, save_ternary
from fasterai.misc.ternary.norms import measure_norms_
from fasterai.misc.ternary.report import TernaryLayer as TernaryLayer
from fasterai.misc.ternary.report import TernaryReport as TernaryReport
from fasterai.misc.ternary.ternarize import find_ternary, ternarize
from fasterai.misc.ternary.training import TernaryTraining

if importlib.util.find_spec("fastai") is not None:
    from fasterai.callbacks.fastai import TernarizeCallback
else:
    from fasterai.callbacks.missing import TernarizeCallback  # type: ignore[assignment]

__all__ = [
    "BN_Folder",
    "Conv_Decomposer",
    "FC_Decomposer",
    "TernarizeCallback",
    "TernaryTraining",
    "VALID_METHODS",
    "decompose_convolutions",
    "decompose_linear",
    "factorise_convolution",
    "factorise_linear",
    "find_folds",
    "find_ternary",
    "fold_batchnorms",
    "load_ternary",
    "measure_norms_",
    "save_ternary",
    "ternarize",
]
