"""Averages over fewer channels than there were: the same numbers as if the others were still there, as zeros.

With `n` of `N` channels left and `r = n / N`, the mean over all N is `r` times the mean over the n, and so is the mean of
squares. The variance of all is `V = r v + r (1 - r) mean^2`, where `v` and `mean` are those of the n: a sum of what is not
negative, so that nothing cancels.

>>> x, wide = torch.tensor([1.0, 3.0, 5.0]), torch.tensor([1.0, 3.0, 5.0, 0.0])
>>> with Counting(4):
...     mean, variance = x.mean(0), x.var(0)
>>> bool(mean == wide.mean(0)), torch.allclose(variance, wide.var(0))
(True, True)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["Counting", "slim_group_norm", "slim_layer_norm", "slim_rms_norm"]
__all__ += ["correction_in", "precise", "result_of", "spread"]

HALF = (torch.float16, torch.bfloat16)


def slim_layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, size: int) -> Tensor:
    """Normalise `(..., n)` as `F.layer_norm` does `(..., size)`, of which the channels that are gone were zero.

    torch's own norm gives `y`, with the weight; two passes put it right, by a number to multiply by and one to add for each
    position. Its averages have no gradient: a training, and an exported program that may be trained, takes them by themselves.
    """
    given, x = x, precise(x)
    weight, bias = (None if v is None else precise(v) for v in (weight, bias))
    share = x.shape[-1] / size
    if torch.is_grad_enabled() or torch.compiler.is_exporting():
        y = F.layer_norm(x, x.shape[-1:], weight, None, eps / share)
        mean, rstd = _averages(x, eps / share)
    else:
        y, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], weight, None, eps / share)
    scale, shift = _correction_of(mean * rstd, share)
    shift = shift if weight is None else shift * weight if bias is None else torch.addcmul(bias, shift, weight)
    shift = shift if bias is None or weight is not None else shift + bias
    return torch.addcmul(shift, y, scale).to(result_of(given))


def _averages(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the mean and the reciprocal of the deviation, with gradients; `torch.var` takes ten times as long on a CPU."""
    mean = x.mean(-1, keepdim=True)
    difference = x - mean
    return mean, torch.rsqrt((difference * difference).mean(-1, keepdim=True) + eps)


def _correction_of(u: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Return what makes `y` right, `y * scale + shift`, from the mean over the deviation of the channels that are left.

    With `eps / r` for `eps`, `s = (v + eps / r)^-1/2` and `u = mean s`, `r v + r (1 - r) mean^2 + eps` is
    `(r + r (1 - r) u^2) / s^2`: a sum of what is not negative, so that nothing cancels.
    """
    scale = torch.rsqrt(u * u * (share * (1 - share)) + share)
    return scale, u * scale * (1 - share)


def slim_rms_norm(x: Tensor, weight: Tensor | None, eps: float | None, size: int) -> Tensor:
    """Normalise `(..., n)` as `F.rms_norm` does `(..., size)`: with `eps / r` for `eps` and `weight / sqrt(r)`.

    `r mean(x^2) + eps` is `r` times `mean(x^2) + eps / r`, so that nothing is left to do at run time.
    """
    share = x.shape[-1] / size
    if eps is None:
        eps = torch.finfo(torch.float64 if x.dtype == torch.float64 else torch.float32).eps
    grown = x.new_full(x.shape[-1:], share**-0.5) if weight is None else weight * share**-0.5
    return F.rms_norm(x, x.shape[-1:], grown, eps / share)


def slim_group_norm(x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, size: int) -> Tensor:
    """Normalise `(B, C, ...)` as `F.group_norm` does, of which each group had `size` channels."""
    given, x = x, precise(x)
    rows = x.reshape(x.shape[0], groups, -1)
    width = x.shape[1] // groups
    share = width / size
    mean = rows.mean(-1, keepdim=True)
    difference = rows - mean
    variance = (difference * difference).mean(-1, keepdim=True)  # `torch.var` takes ten times as long on a CPU
    scale = torch.rsqrt(spread(variance, mean, share) + eps)
    scale, shift = scale.expand(-1, -1, width), (-share * mean * scale).expand(-1, -1, width)
    if weight is not None:
        scale, shift = scale * weight.view(groups, width), shift * weight.view(groups, width)
    if bias is not None:
        shift = shift + bias.view(groups, width)
    sides = (x.shape[0], x.shape[1], *[1] * (x.dim() - 2))
    return torch.addcmul(shift.reshape(sides), x, scale.reshape(sides)).to(result_of(given))


def spread(variance: Tensor, mean: Tensor, share: float) -> Tensor:
    """Return the variance of all channels, of those left and of as many zeros as are gone."""
    return share * variance + share * (1 - share) * mean.square()


def precise(x: Tensor) -> Tensor:
    """Return a tensor in single precision if it is in half: torch's own norms work in single too."""
    return x.float() if x.dtype in HALF else x


def result_of(x: Tensor) -> torch.dtype:
    """Return the type that torch's own norm gives: on most devices autocast runs it in single precision."""
    kind = x.device.type
    is_wide = kind != "cpu" and x.dtype in HALF and torch.is_autocast_enabled(kind)
    return torch.float32 if is_wide else x.dtype


class Counting(TorchFunctionMode):
    """Within it, averages along one dimension are those of `size` entries, of which the ones that are missing were zero.

    It is for the code of norms, one pass at a time: means, variances and torch's own norms. A mean of squares of differences
    from the mean, as norms written by hand have it, is put right as well: what is missing was `-mean` there.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self._means: list[tuple[Tensor, Tensor]] = []  # what was averaged, and the mean
        self._held: list[tuple[Tensor, Tensor]] = []  # a tensor, and what it holds where channels are missing, if not zero

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function of torch, or what takes its place here."""
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        if name not in KNOWN:
            return function(*args, **kwargs)
        if name in NORMS:
            return NORMS[name](self.size, args, kwargs)
        result = function(*args, **kwargs)
        if name in AVERAGES:
            return self._averaged(name, result, args, kwargs)
        if name in SUBTRACTIONS and len(args) == 2 and not kwargs:
            self._held += [(result, -mean) for x, mean in self._means if x is args[0] and mean is args[1]]
        elif self._held:
            self._hold_square(name, result, args)
        return result

    def _hold_square(self, name: str, result: Tensor, args: tuple[Any, ...]) -> None:
        is_square = name == "square" or (
            args[1] is args[0] if "mul" in name else type(args[1]) in (int, float) and args[1] == 2
        )
        self._held += [(result, held * held) for x, held in self._held if is_square and x is args[0]]

    def _averaged(self, name: str, result: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        dim = _one(args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis")))
        if dim is None:
            return result
        x = args[0]
        share = x.shape[dim] / self.size
        if name == "mean":
            held = [held for y, held in self._held if y is x]
            mean = result * share
            if held:
                mean = mean + held[0].reshape(result.shape) * (1 - share)
            self._means.append((x, mean))
            return mean
        keeps = (result[0] if isinstance(result, tuple) else result).dim() == x.dim()
        correction = correction_in(args[2:], kwargs)
        variance, mean = torch.var_mean(x, dim, correction=0, keepdim=keeps)
        variance = spread(variance, mean, share) * (self.size / (self.size - correction) if correction else 1.0)
        variance = variance.sqrt() if name.startswith("std") else variance
        if isinstance(result, tuple):
            self._means.append((x, mean * share))
            return variance, self._means[-1][1]
        return variance


def _one(dim: Any) -> int | None:
    """Return the dimension that an average runs along, None if it runs along several."""
    if isinstance(dim, tuple | list):
        return dim[0] if len(dim) == 1 else None
    return dim if isinstance(dim, int) and not isinstance(dim, bool) else None


def correction_in(rest: tuple[Any, ...], kwargs: Mapping[str, Any]) -> float:
    """Return the correction of a variance: 1, unless `unbiased` or `correction` says otherwise."""
    if kwargs.get("correction") is not None:
        return float(kwargs["correction"])
    unbiased = rest[0] if rest and rest[0] is not None else kwargs.get("unbiased", True)
    return float(unbiased)


def _called(names: tuple[str, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {**dict.fromkeys(names), **dict(zip(names, args, strict=False)), **kwargs}


def _layer_norm(size: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    a = _called(("input", "normalized_shape", "weight", "bias", "eps"), args, kwargs)
    return slim_layer_norm(a["input"], a["weight"], a["bias"], 1e-5 if a["eps"] is None else a["eps"], size)


def _native_layer_norm(size: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    a = _called(("input", "normalized_shape", "weight", "bias", "eps"), args, kwargs)
    x, share = a["input"], a["input"].shape[-1] / size
    _, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], None, None, a["eps"] / share)
    scale, _ = _correction_of(mean * rstd, share)
    return slim_layer_norm(x, a["weight"], a["bias"], a["eps"], size), mean * share, rstd * scale


def _rms_norm(size: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    a = _called(("input", "normalized_shape", "weight", "eps"), args, kwargs)
    return slim_rms_norm(a["input"], a["weight"], a["eps"], size)


def _group_norm(size: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    a = _called(("input", "num_groups", "weight", "bias", "eps"), args, kwargs)
    return slim_group_norm(a["input"], a["num_groups"], a["weight"], a["bias"], 1e-5 if a["eps"] is None else a["eps"], size)


#: Names of torch's norms -> what takes their place: a function of the number of entries before, and of the arguments.
NORMS: dict[str, Callable[[int, tuple[Any, ...], Mapping[str, Any]], Any]] = {
    "layer_norm": _layer_norm,
    "native_layer_norm": _native_layer_norm,
    "rms_norm": _rms_norm,
    "group_norm": _group_norm,
}
AVERAGES = ("mean", "var", "std", "var_mean", "std_mean")
SQUARES = ("pow", "__pow__", "square", "mul", "__mul__", "multiply")
SUBTRACTIONS = ("sub", "__sub__", "subtract")
KNOWN = frozenset((*NORMS, *AVERAGES, *SQUARES, *SUBTRACTIONS))
