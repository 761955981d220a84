"""Functions of torch that make tensors, taken up by traces: `torch.zeros(x.shape[0], 8)`, as first states are made.

`torch.fx` follows what is done with a stand-in of a tensor, and such functions are given none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch.fx import Proxy
from torch.utils._pytree import tree_leaves

__all__ = ["traced_makers"]

MAKERS = ("zeros", "ones", "full", "empty", "arange", "linspace", "eye", "rand", "randn")


@contextmanager
def traced_makers() -> Iterator[None]:
    """Let functions that make tensors take stand-ins of sizes, for a while."""
    before = {name: getattr(torch, name) for name in MAKERS}
    try:
        for name, function in before.items():
            setattr(torch, name, _traced(function))
        yield
    finally:
        for name, function in before.items():
            setattr(torch, name, function)


def _traced(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def make(*args: Any, **kwargs: Any) -> Any:
        given = next((x for x in tree_leaves((args, kwargs)) if isinstance(x, Proxy)), None)
        if given is None:
            return function(*args, **kwargs)
        return given.tracer.create_proxy("call_function", function, args, kwargs)

    return make
