"""The old home of `fasterai.prune.choice.budget`: re-exports only."""

from fasterai.prune.choice.budget import *
