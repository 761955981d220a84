"""The old home of `fasterai.prune.surgery.optimizers`: re-exports only."""

from fasterai.prune.surgery.optimizers import *
