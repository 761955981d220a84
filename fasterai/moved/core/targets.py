"""The old home of `fasterai.model.targets`: re-exports only."""

from fasterai.model.targets import *
