"""Forward passes in float64, of networks too whose code asks for float32: rounding is told from a real change by them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

__all__ = ["InFloat64"]

LOW = frozenset({torch.float32, torch.float16, torch.bfloat16})


class InFloat64(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it lasts, every floating point number that an operation reads or makes is of float64.

    A tensor that the code asks for in float32, as by `x.float()` or `torch.arange(n, dtype=torch.float32)`, comes in float64.

    >>> with InFloat64():
    ...     (torch.ones(2).float() / 3).dtype
    torch.float64
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given, named = tree_map(_wide, (args, kwargs or {}))
        return tree_map(_wide, func(*given, **named))


def _wide(x: Any) -> Any:
    if isinstance(x, Tensor):
        return x.double() if x.dtype in LOW else x
    return torch.float64 if isinstance(x, torch.dtype) and x in LOW else x
