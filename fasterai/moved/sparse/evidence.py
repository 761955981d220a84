"""The old home of `fasterai.units.evidence`: re-exports only."""

from fasterai.units.evidence import *
