"""The old home of `fasterai.graph.exported`: re-exports only."""

from fasterai.graph.exported import *
