"""The old home of `fasterai.graph.rules.weights`: re-exports only."""

from fasterai.graph.rules.weights import *
