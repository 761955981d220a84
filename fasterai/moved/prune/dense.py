"""The old home of `fasterai.prune.surgery.dense_shapes`: re-exports only."""

from fasterai.prune.surgery.dense_shapes import *
