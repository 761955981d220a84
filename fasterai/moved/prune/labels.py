"""The old home of `fasterai.graph.labels`: re-exports only."""

from fasterai.graph.labels import *
