"""The old home of `fasterai.graph.norms`: re-exports only."""

from fasterai.graph.norms import *
