"""The old home of `fasterai.model.masks`: re-exports only."""

from fasterai.model.masks import *
