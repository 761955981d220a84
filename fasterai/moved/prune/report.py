"""The old home of `fasterai.prune.removal_report`: re-exports only."""

from fasterai.prune.removal_report import *
