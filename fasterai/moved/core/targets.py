"""The old home of targets, layouts and names: re-exports only."""

from fasterai.model.layouts import *
from fasterai.model.names import *
from fasterai.model.targets import *
