"""For notebooks: `from fasterai.distill.all import *`. Re-exports only; the callbacks are fastai's, where that is installed."""

from fasterai.callbacks.plain import attach
from fasterai.distill.distiller import Distiller
from fasterai.distill.features import MGD, ActivationBoundaries, Attention, Contrastive, FitNet, ReviewKD, Similarity

__all__ = [
    "MGD",
    "ActivationBoundaries",
    "Attention",
    "Contrastive",
    "Distiller",
    "FitNet",
    "ReviewKD",
    "Similarity",
    "attach",
]
