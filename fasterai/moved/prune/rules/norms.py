"""The old home of `fasterai.graph.rules.norms`: re-exports only."""

from fasterai.graph.rules.norms import *
