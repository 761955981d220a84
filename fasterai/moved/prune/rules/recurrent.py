"""The old home of `fasterai.graph.rules.recurrent`: re-exports only."""

from fasterai.graph.rules.recurrent import *
