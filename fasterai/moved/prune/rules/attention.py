"""The old home of `fasterai.graph.rules.attention`: re-exports only."""

from fasterai.graph.rules.attention import *
