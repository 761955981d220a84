"""The old home of `fasterai.familiar`: re-exports only."""

from fasterai.familiar import *
