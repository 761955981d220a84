"""Norms over fewer channels than there were: the same results as if the others were still there, as zeros.

A norm's class is changed in place, so that its parameters, names, hooks and call stay; those of torch have a class here, and
others, whoever wrote them, one that runs their own code within `Counting`.

>>> x, norm = torch.tensor([[1.0, 3.0, 5.0]]), SlimLayerNorm(3, elementwise_affine=False)
>>> norm.dense_size = 4
>>> wide = torch.nn.functional.layer_norm(torch.tensor([[1.0, 3.0, 5.0, 0.0]]), (4,))
>>> torch.allclose(norm(x), wide[:, :3])
True
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from fasterai.model.names import plain_name
from fasterai.model.slim_averages import Counting, slim_group_norm, slim_layer_norm, slim_rms_norm

__all__ = [
    "SLIM_NORMS",
    "SlimGroupNorm",
    "SlimLayerNorm",
    "SlimRMSNorm",
    "can_be_slim",
    "dense_size",
    "is_slim",
    "put_dense_size",
    "slimmable",
]


class SlimLayerNorm(nn.LayerNorm):
    """`nn.LayerNorm` after channels that were zero have been removed; made of one by a removal.

    Parameters, names and the call are those of `nn.LayerNorm`.

    Attributes:
        dense_size: Number of channels before anything was removed.
    """

    dense_size: int

    def forward(self, input: Tensor) -> Tensor:
        """Return normalised `(..., channel)` over the channels that are left and the zeros that are gone."""
        return slim_layer_norm(input, self.weight, self.bias, self.eps, self.dense_size)


class SlimRMSNorm(nn.RMSNorm):
    """`nn.RMSNorm` after channels that were zero have been removed; made of one by a removal.

    Attributes:
        dense_size: Number of channels before anything was removed.
    """

    dense_size: int

    def forward(self, x: Tensor) -> Tensor:
        """Return normalised `(..., channel)` over the channels that are left and the zeros that are gone."""
        return slim_rms_norm(x, self.weight, self.eps, self.dense_size)


class SlimGroupNorm(nn.GroupNorm):
    """`nn.GroupNorm` after the same number of channels, which were zero, has been removed from each of its groups.

    Attributes:
        dense_size: Number of channels of a group before anything was removed.
    """

    dense_size: int

    def forward(self, input: Tensor) -> Tensor:
        """Return normalised `(B, channel, ...)` over the channels of each group that are left and the zeros that are gone."""
        return slim_group_norm(input, self.num_groups, self.weight, self.bias, self.eps, self.dense_size)


#: Class of a norm -> the class that takes its place once channels are removed.
SLIM_NORMS: dict[type[nn.Module], type[nn.Module]] = {
    nn.LayerNorm: SlimLayerNorm,
    nn.RMSNorm: SlimRMSNorm,
    nn.GroupNorm: SlimGroupNorm,
}


class _SlimModule(nn.Module):
    """Module of any class after channels that it averages over have been removed: its own code, told how many there were."""

    dense_class: type[nn.Module]
    dense_size: int

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with Counting(self.dense_size):
            return super().forward(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy and pickle by the class that it was: this one is made on the spot."""
        return (_empty, (self.dense_class,), *object.__reduce_ex__(self, protocol)[2:])


def _as_written(self: Any, x: Tensor) -> Any:  # an RMS norm as most of the transformers have it, letter by letter
    dtype = x.dtype
    x = x.to(torch.float32)
    variance = x.pow(2).mean(-1, keepdim=True)
    x = x * torch.rsqrt(variance + self.variance_epsilon)
    return self.weight * x.to(dtype)


def _is_as_written(dense: type[nn.Module]) -> bool:
    """Tell if a class's code is that of `_as_written`, whatever its variables are called."""
    code, mine = getattr(dense.forward, "__code__", None), _as_written.__code__
    parts = ("co_code", "co_names", "co_consts", "co_argcount", "co_kwonlyargcount")
    return all(getattr(code, part, None) == getattr(mine, part) for part in parts) and (
        dense.forward.__globals__.get("torch") is torch
    )


class _SlimAsWritten(_SlimModule):
    """Module whose code is `_as_written`: what `Counting` makes of it, without its watch, which takes as long again."""

    weight: Tensor
    variance_epsilon: float

    def forward(self, x: Tensor) -> Tensor:
        dtype = x.dtype
        x = x.to(torch.float32)
        variance = x.pow(2).mean(-1, keepdim=True) * (x.shape[-1] / self.dense_size)
        x = x * torch.rsqrt(variance + self.variance_epsilon)
        return self.weight * x.to(dtype)


@cache
def _slim_class(dense: type[nn.Module]) -> type[nn.Module]:
    """Return the class that takes the place of a norm's, made once."""
    if dense in SLIM_NORMS:
        return SLIM_NORMS[dense]
    slim = _SlimAsWritten if _is_as_written(dense) else _SlimModule
    return type(f"Slim{dense.__name__}", (slim, dense), {"__doc__": dense.__doc__, "dense_class": dense})


def _empty(dense: type[nn.Module]) -> nn.Module:
    slim: type[nn.Module] = _slim_class(dense)  # type: ignore[arg-type]
    return slim.__new__(slim)


def slimmable(model: nn.Module) -> frozenset[str]:
    """Return the names of the modules that can go on with fewer channels, told how many there were."""
    return frozenset(plain_name(name) for name, module in model.named_modules() if can_be_slim(module))


def can_be_slim(module: nn.Module | None) -> bool:
    """Tell if a module can be told how many channels there were: a norm over one dimension, or a class not of torch's."""
    if module is None or is_slim(module):
        return module is not None
    if type(module) in SLIM_NORMS:
        return not isinstance(module, nn.LayerNorm | nn.RMSNorm) or len(module.normalized_shape) == 1
    is_known = type(module).__module__.startswith(("torch.", "fasterai."))
    strange = isinstance(module, nn.MultiheadAttention | torch.jit.ScriptModule | torch.fx.GraphModule)
    return not (is_known or strange or is_parametrized(module))


def is_slim(module: nn.Module) -> bool:
    """Tell if a module has been told how many channels there were."""
    return isinstance(module, (_SlimModule, *SLIM_NORMS.values()))


def is_torchs(module: nn.Module) -> bool:
    """Tell if a module is one of torch's norms, slim or not: it computes nothing but its norm."""
    return type(module) in SLIM_NORMS or type(module) in SLIM_NORMS.values()


def dense_size(module: nn.Module) -> int | None:
    """Return over how many channels a norm was before anything was removed; None where its attributes do not say."""
    if is_slim(module):
        return int(vars(module)["dense_size"])
    if isinstance(module, nn.GroupNorm):
        return module.num_channels // module.num_groups
    shape = vars(module).get("normalized_shape")
    return shape[0] if isinstance(shape, tuple) and len(shape) == 1 else None


def put_dense_size(module: nn.Module, size: int | None) -> None:
    """Make a norm a slim one that had so many channels, or with None one that knows of no others again; in place."""
    dense = getattr(type(module), "dense_class", {s: d for d, s in SLIM_NORMS.items()}.get(type(module), type(module)))
    if size is None:
        vars(module).pop("dense_size", None)
        module.__class__ = dense
    else:
        module.__class__ = _slim_class(dense)  # type: ignore[arg-type]
        module.dense_size = size  # type: ignore[assignment]
