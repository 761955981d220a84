"""The old home of `fasterai.units.scoring`: re-exports only."""

from fasterai.units.scoring import *
