"""The old home of `fasterai.graph.channels`: re-exports only."""

from fasterai.graph.channels import *
