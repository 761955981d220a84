"""The old home of `fasterai.prune.surgery.plan`: re-exports only."""

from fasterai.prune.surgery.plan import *
