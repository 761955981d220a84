"""The old home of `fasterai.prune.surgery.replay`: re-exports only."""

from fasterai.prune.surgery.replay import *
