"""The old home of `fasterai.graph.rules`: re-exports only."""

from fasterai.graph.rules import *
