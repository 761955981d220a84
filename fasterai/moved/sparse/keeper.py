"""The old home of `fasterai.units`: re-exports only."""

from fasterai.sparse.record import MaskRecord as Keeper

__all__ = ["Keeper"]
