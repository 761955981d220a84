"""The old home of `watch`: re-exports only."""

from fasterai.model.norms import Flow, watch

__all__ = ["Flow", "watch"]
