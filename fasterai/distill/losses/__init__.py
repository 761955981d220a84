"""Losses: their two kinds, the catalogues, adapters, and what a loss may be given as.

The public fasterai has its losses under this path, so that they are found here too.
"""

from typing import Any


def __getattr__(name: str) -> Any:
    """Give a loss of any catalogue: `from fasterai.distill.losses import SoftTarget`."""
    from fasterai.distill.losses import given, logits

    known = {**given.known_losses(), "DecoupledKD": logits.DecoupledKD} if not name.startswith("_") else {}
    if name in known:
        return known[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
