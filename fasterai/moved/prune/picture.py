"""The old home of `fasterai.prune.removal_picture`: re-exports only."""

from fasterai.prune.removal_picture import *
