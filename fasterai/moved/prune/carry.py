"""The old home of `fasterai.model.optimizers`: re-exports only."""

from fasterai.model.cuts import kept_slices as sliced  # noqa: F401 - its old name
from fasterai.model.optimizers import *
