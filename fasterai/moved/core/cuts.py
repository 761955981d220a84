"""The old home of `fasterai.model.cuts`: re-exports only."""

from fasterai.model.cuts import *
