"""The old home of `fasterai.prune.surgery.optimizers`: re-exports only."""

from fasterai.model.cuts import kept_slices as sliced  # noqa: F401 - its old name
from fasterai.prune.surgery.optimizers import *
