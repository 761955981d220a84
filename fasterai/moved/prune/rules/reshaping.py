"""The old home of `fasterai.graph.rules.reshaping`: re-exports only."""

from fasterai.graph.rules.reshaping import *
