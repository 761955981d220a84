"""Norms over fewer channels than there were: the same results as if the others were still there, as zeros.

With `n` of `N` channels left and `r = n / N`, the mean over all N is `r` times the mean over the n; so is the mean of squares.

>>> x, norm = torch.tensor([[1.0, 3.0, 5.0]]), SlimLayerNorm(3, elementwise_affine=False)
>>> norm.dense_size = 4
>>> wide = torch.nn.functional.layer_norm(torch.tensor([[1.0, 3.0, 5.0, 0.0]]), (4,))
>>> torch.allclose(norm(x), wide[:, :3])
True
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fasterai.model.names import plain_name

__all__ = ["SLIM_NORMS", "SlimLayerNorm", "can_be_slim", "dense_size", "put_dense_size", "slimmable"]


class SlimLayerNorm(nn.LayerNorm):
    """`nn.LayerNorm` after channels that were zero have been removed; made of one by a removal.

    Parameters, names and the call are those of `nn.LayerNorm`.

    Attributes:
        dense_size: Number of channels before anything was removed.
    """

    dense_size: int

    def forward(self, x: Tensor) -> Tensor:
        """Return `(..., channel)` normalised over the channels that are left and the zeros that are gone."""
        share = self.normalized_shape[0] / self.dense_size
        y, mean, rstd = torch.native_layer_norm(x, self.normalized_shape, None, None, self.eps)
        # Of the n, the variance is v = rstd^-2 - eps. Of all N it is V = r v + r (1 - r) mean^2, a sum of what is not negative.
        wide = share * (rstd.pow(-2) - self.eps) + share * (1 - share) * mean.square()
        scale = torch.rsqrt(wide + self.eps)
        y = y * (scale / rstd).to(y.dtype) + ((1 - share) * mean * scale).to(y.dtype)
        if self.weight is None:
            return y
        return y * self.weight if self.bias is None else torch.addcmul(self.bias, y, self.weight)


#: Class of a norm -> the class that takes its place once channels are removed.
SLIM_NORMS: dict[type[nn.Module], type[nn.Module]] = {nn.LayerNorm: SlimLayerNorm}


def slimmable(model: nn.Module) -> frozenset[str]:
    """Return the names of the modules that can go on with fewer channels, told how many there were."""
    return frozenset(plain_name(name) for name, module in model.named_modules() if can_be_slim(module))


def can_be_slim(module: nn.Module | None) -> bool:
    """Tell if a module is a norm over one dimension that can go on with fewer channels, told how many there were."""
    known = type(module) in SLIM_NORMS or type(module) in SLIM_NORMS.values()
    return known and len(getattr(module, "normalized_shape", ())) == 1


def dense_size(module: nn.Module) -> int:
    """Return the number of channels that a norm had before anything was removed."""
    return int(getattr(module, "dense_size", module.normalized_shape[0]))  # type: ignore[index,arg-type]


def put_dense_size(module: nn.Module, size: int | None) -> None:
    """Make a norm a slim one that had so many channels, or with None one that knows of no others again; in place."""
    if size is None:
        vars(module).pop("dense_size", None)
        module.__class__ = {slim: dense for dense, slim in SLIM_NORMS.items()}.get(type(module), type(module))
    else:
        module.__class__ = SLIM_NORMS.get(type(module), type(module))
        module.dense_size = size  # type: ignore[assignment]
