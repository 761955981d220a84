"""The old home of `fasterai.model.running`: re-exports only."""

from fasterai.model.running import *
