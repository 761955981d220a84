"""The old home of `fasterai.prune.surgery.slim_attention`: re-exports only."""

from fasterai.prune.surgery.slim_attention import *
