"""The old home of `fasterai.display`: re-exports only."""

from fasterai.display import *
