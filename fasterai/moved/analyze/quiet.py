"""The old home of `fasterai.model.running`: re-exports only."""

from fasterai.model.inputs import positional
from fasterai.model.running import at_rest, copies, device_name, device_of, wait_for

__all__ = ["at_rest", "copies", "device_name", "device_of", "positional", "wait_for"]
