"""Forms in which logits are kept: all of them or the largest, in half or full precision."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fasterai.display import Brief

__all__ = ["DTYPES", "RowForm"]

DTYPES = {"float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True, repr=False)
class RowForm(Brief):
    """Form in which the logits of a sample are kept.

    With `top_k` the k largest of C logits are kept with their places, and the mean of the others as
    `log(sum exp(others) / (C - k))`. Given back, each of the others has this value: by a softmax at temperature 1 the k classes
    have the shares that they had, and the rest shares what is left. At T > 1 the rest gets at least its due (the mean of powers
    1/T is at most the power of the mean), at T < 1 at most.

    Attributes:
        shape: The logits of a sample: `(C,)`, `(T, C)` or `(C, H, W)`.
        dtype: "float16" or "float32".
        top_k: The number of logits that are kept of each row; None for all.
    """

    shape: tuple[int, ...]
    dtype: str
    top_k: int | None = None

    @property
    def axis(self) -> int:
        """The dimension of the classes in a batch of logits: the second of four, else the last."""
        return 1 if len(self.shape) > 2 else len(self.shape)

    @property
    def classes(self) -> int:
        """The number of classes."""
        return self.shape[self.axis - 1]

    def shapes(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Return the dtype and the shape of a sample in each part that is kept."""
        if self.top_k is None:
            return {"logits": (DTYPES[self.dtype], self.shape)}
        places = tuple(n for i, n in enumerate(self.shape, 1) if i != self.axis)
        kept = (*places, self.top_k)
        integer = torch.int16 if self.classes <= 1 << 15 else torch.int32
        rest = {"rest": (DTYPES[self.dtype], places)} if self.top_k < self.classes else {}
        return {"logits": (DTYPES[self.dtype], kept), "indices": (integer, kept)} | rest

    def pack(self, logits: Tensor) -> dict[str, Tensor]:
        """Return the parts that are kept of logits `(B, *shape)`.

        Raises:
            ValueError: Logits are not finite, or too large for half precision.
        """
        self._check(logits)
        kinds = self.shapes()
        if self.top_k is None:
            return {"logits": logits.to(kinds["logits"][0])}
        rows = logits.movedim(self.axis, -1).float()
        values, indices = rows.topk(self.top_k, -1)
        parts = {"logits": values, "indices": indices}
        if "rest" in kinds:
            others = rows.scatter(-1, indices, -math.inf)
            parts["rest"] = others.logsumexp(-1) - math.log(self.classes - self.top_k)
        return {name: x.to(kinds[name][0]) for name, x in parts.items()}

    def unpack(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Return logits `(B, *shape)` in float32."""
        values = parts["logits"].float()
        if self.top_k is None:
            return values
        rest = parts["rest"].float() if "rest" in parts else values[..., 0]
        rows = rest.unsqueeze(-1).repeat(*[1] * rest.dim(), self.classes)
        return rows.scatter_(-1, parts["indices"].long(), values).movedim(-1, self.axis)

    def _check(self, logits: Tensor) -> None:
        largest = float(logits.detach().abs().max())  # NaN if one is
        if not math.isfinite(largest):
            found = "NaN" if math.isnan(largest) else "infinity"
            raise ValueError(f"teacher must return finite logits, got {found} among them")
        most = torch.finfo(DTYPES[self.dtype]).max
        if largest > most:
            raise ValueError(
                f"dtype must hold the teacher's logits, got float16, whose largest is {most:,.0f}, for one of {largest:.3g}; "
                "pass dtype=torch.float32"
            )
