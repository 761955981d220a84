"""The old home of `fasterai.graph.rules.consumers`: re-exports only."""

from fasterai.graph.rules.consumers import *
