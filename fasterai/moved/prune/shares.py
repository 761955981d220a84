"""The old home of `fasterai.prune.choice.cost_left`: re-exports only."""

from fasterai.prune.choice.cost_left import *
