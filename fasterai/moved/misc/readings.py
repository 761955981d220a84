"""The old home of `fasterai.model.readings`: re-exports only."""

from fasterai.model.readings import *
