"""The old home of `fasterai.prune.small_files`: re-exports only."""

from fasterai.prune.small_files import *
