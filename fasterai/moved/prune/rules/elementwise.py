"""The old home of `fasterai.graph.rules.elementwise`: re-exports only."""

from fasterai.graph.rules.elementwise import *
