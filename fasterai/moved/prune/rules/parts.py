"""The old home of `fasterai.graph.rules.parts`: re-exports only."""

from fasterai.graph.rules.parts import *
