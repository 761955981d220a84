"""The old home of `fasterai.graph.rules.trace`: re-exports only."""

from fasterai.graph.rules.trace import *
