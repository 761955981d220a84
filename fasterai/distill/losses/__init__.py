"""Losses: their two kinds, the catalogues, adapters, and what a loss may be given as.

The public fasterai has its losses under this path, so that they are found here too.
"""

from typing import Any


def __getattr__(name: str) -> Any:
    """Give a loss of any catalogue: `from fasterai.distill.losses import SoftTarget`."""
    if name[:1].isupper():  # a file has a name in small letters
        from fasterai.distill.losses.given import known_losses
        from fasterai.distill.losses.logits import DecoupledKD

        known = {**known_losses(), "DecoupledKD": DecoupledKD}
        if name in known:
            return known[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
