"""The old home of `fasterai.prune.surgery.replay`: re-exports only."""

from fasterai.prune.surgery.replay import *
from fasterai.prune.surgery.replay import GRADUAL_FORMAT as FORMAT  # noqa: F401 - its old name
