"""The old home of `fasterai.graph.rules.spatial`: re-exports only."""

from fasterai.graph.rules.spatial import *
