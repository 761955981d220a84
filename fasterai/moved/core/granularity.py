"""The old home of `Granularities`: a re-export only, so that `from fasterai.core.granularity import ...` goes on working."""

from fasterai.familiar import Granularities

__all__ = ["Granularities"]
