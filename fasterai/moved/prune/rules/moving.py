"""The old home of `fasterai.graph.rules.moving`: re-exports only."""

from fasterai.graph.rules.moving import *
