"""For notebooks: `from fasterai.distill.all import *`. Re-exports only; the callbacks are fastai's, where that is installed."""

from fasterai.callbacks.plain import attach
from fasterai.distill.distiller import Distiller

__all__ = ["Distiller", "attach"]
