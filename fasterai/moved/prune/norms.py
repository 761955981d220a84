"""The old home of the norms behind layers: re-exports only."""

from fasterai.model.norms import Norm, norms_behind

__all__ = ["Norm", "norms_behind"]
