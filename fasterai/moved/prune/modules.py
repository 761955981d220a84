"""The old home of `fasterai.prune.surgery.modules`: re-exports only."""

from fasterai.prune.surgery.modules import *
