"""The old home of `fasterai.units.partners`: re-exports only."""

from fasterai.units.partners import *
