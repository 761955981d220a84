"""The old home of `fasterai.model.supported`: re-exports only."""

from fasterai.model.supported import *
