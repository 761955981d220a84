"""The old home of `fasterai.prune.surgery.model_copies`: re-exports only."""

from fasterai.prune.surgery.model_copies import *
