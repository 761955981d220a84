"""The old home of `fasterai.model.inputs`: re-exports only."""

from fasterai.model.inputs import *
