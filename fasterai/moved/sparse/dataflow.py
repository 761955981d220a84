"""The old home of `fasterai.model.dataflow`: re-exports only."""

from fasterai.model.dataflow import *
