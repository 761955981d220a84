"""Modules of a kind that have code of their own for the channel graph to follow.

Where channels have gone from the middle of a computation, as from a mean over all of them, a module goes on with what is
known of the rest. That is right and hard to follow; the code that it stands for, over what is left, has the same operations.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

__all__ = ["as_followed"]


@contextmanager
def as_followed(model: nn.Module) -> Iterator[None]:
    """Give modules the class that theirs names as `follows`, for a while; shapes stay, and values need not."""
    before = [(module, type(module)) for module in model.modules() if "follows" in vars(type(module))]
    try:
        for module, own in before:
            module.__class__ = vars(own)["follows"]
        yield
    finally:
        for module, own in before:
            module.__class__ = own
