"""The catalogue of criteria: how much a weight matters. Higher is kept.

A criterion is a frozen value: what is known of a target (the weight and, only if it says so, more) -> scores of the
weight's shape. It never writes into what it is given.
To add one: a function `(evidence) -> scores`, a ready-made `Criterion`, its name in `__all__`, a row in
`tests/core/test_criteria.py` and a line in `docs/criteria.md`.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fasterai.core.checks import check_choice
from fasterai.core.types import EVIDENCE, Evidence

__all__ = [
    "grasp",
    "large_final",
    "large_init",
    "large_init_large_final",
    "magnitude_increase",
    "mov_large_final",
    "movement",
    "movmag",
    "random",
    "small_final",
    "small_init",
    "small_init_small_final",
    "snip",
    "squared_final",
    "synflow",
    "taylor",
    "updating_magnitude_increase",
    "updating_movement",
    "updating_movmag",
    "wanda",
]

REDUCERS = ("mean", "sum")


def _over(x: Tensor, scale: Tensor) -> Tensor:
    """Quotients, and 0 where the scale is 0: equal scores stay equal."""
    return torch.where(scale == 0, torch.zeros_like(x), x / scale)


def _standardise(x: Tensor) -> Tensor:
    return _over(x - x.mean(), x.std(correction=0))


NORMALIZERS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda x: _over(x, x.sum()),
    "mean": lambda x: _over(x, x.mean()),
    "max": lambda x: _over(x, x.max()),
    "standardise": _standardise,
    "gaussian": lambda x: torch.special.ndtr(_standardise(x)),
}


@dataclass(frozen=True)
class Criterion:
    """How much a weight matters.

    Attributes:
        function: Evidence -> scores, one per weight, higher is kept.
        needs: What it reads besides the weight: of `gradient`, `initial`, `previous`, `activation`, `hessian_gradient`,
            `synaptic_flow`.
        reducer: How the scores of a unit's weights become one: `mean` or `sum`.
        normalizer: What the unit scores of a target are divided by or mapped through before targets are compared:
            `sum`, `mean`, `max`, `standardise` (zero mean, unit deviation), `gaussian` (the normal distribution function
            of these), or None. It never changes the order inside a target as long as sum, mean and max are positive.
        elementwise: Each score depends on nothing but the evidence at its own place, so a part can be scored alone.
        nonnegative: No score is below 0, and a weight of 0 scores 0.
        ufunc: The same function of the weight in numpy, if there is one: it can write into held memory.
    """

    function: Callable[[Evidence], Tensor]
    needs: frozenset[str] = frozenset()
    reducer: str = "mean"
    normalizer: str | None = None
    elementwise: bool = False
    nonnegative: bool = False
    ufunc: np.ufunc | None = None

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise TypeError(f"function must be a function of evidence, got {self.function!r}")
        object.__setattr__(self, "needs", frozenset(self.needs))
        for name in sorted(self.needs):
            check_choice("needs", name, EVIDENCE)
        check_choice("reducer", self.reducer, REDUCERS)
        if self.normalizer is not None:
            check_choice("normalizer", self.normalizer, NORMALIZERS)

    def __call__(self, evidence: Evidence) -> Tensor:
        """Scores of the weights, shape of the weight, in float32 at least.

        Raises:
            ValueError: The function's scores have another shape.
        """
        scores = self.function(evidence.at_least_float32())
        if scores.shape != evidence.weight.shape:
            raise ValueError(
                f"criterion must return scores of the weight's shape {tuple(evidence.weight.shape)} "
                f"for {evidence.name}, got {tuple(scores.shape)}"
            )
        return scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores

    def normalize(self, scores: Tensor) -> Tensor:
        """The unit scores of a target, made comparable with other targets'."""
        return scores if self.normalizer is None else NORMALIZERS[self.normalizer](scores)

    def using(self, *, reducer: str | None = None, normalizer: str | None = None) -> Criterion:
        """The same criterion with another reducer or normaliser."""
        return replace(self, reducer=reducer or self.reducer, normalizer=normalizer or self.normalizer)


@dataclass(frozen=True)
class WeightFunction:
    """A plain function of the weight (a copy, so that it may write into it) as a function of evidence."""

    function: Callable[[Tensor], Tensor]

    def __call__(self, evidence: Evidence) -> Tensor:
        return self.function(evidence.weight.clone())


def as_criterion(criterion: Criterion | Callable[[Tensor], Tensor]) -> Criterion:
    """A criterion from a criterion or a plain function of the weight.

    Raises:
        TypeError: It is neither.
    """
    if isinstance(criterion, Criterion):
        return criterion
    if callable(criterion):
        return Criterion(WeightFunction(criterion))
    raise TypeError(f"criteria must be a criterion, its name, or a function of the weight, got {criterion!r}")


def _known(value: Tensor | None) -> Tensor:
    assert value is not None, "evidence is gathered by what a criterion says it needs"
    return value


@dataclass(frozen=True)
class _Random:
    """Uniform scores from a seed and the target's name: the same on every rank, and in every call."""

    seed: int = 0

    def __call__(self, e: Evidence) -> Tensor:
        # torch's generator on a CPU takes 32 bits of its seed, which is what the checksum has.
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {e.name}".encode()))
        return torch.rand(e.weight.shape, generator=generator).to(e.weight.device)

    def anew(self, draw: int) -> _Random:
        """Return the scores of another draw, for rules that draw at each move of the masks."""
        return _Random(self.seed + draw)


def Random(seed: int = 0) -> Criterion:  # noqa: N802 - reads as the other values that take settings
    """Random scores that depend on the seed and the target's name alone; the global generator is not touched."""
    return Criterion(_Random(seed))


def _large_final(e: Evidence) -> Tensor:
    return e.weight.abs()


def _squared_final(e: Evidence) -> Tensor:
    return e.weight.square()


def _small_final(e: Evidence) -> Tensor:
    return -e.weight.abs()


def _large_init(e: Evidence) -> Tensor:
    return _known(e.initial).abs()


def _small_init(e: Evidence) -> Tensor:
    return -_known(e.initial).abs()


def _large_init_large_final(e: Evidence) -> Tensor:
    return torch.minimum(e.weight.abs(), _known(e.initial).abs())


def _small_init_small_final(e: Evidence) -> Tensor:
    return -torch.maximum(e.weight.abs(), _known(e.initial).abs())


def _magnitude_increase(e: Evidence) -> Tensor:
    return e.weight.abs() - _known(e.initial).abs()


def _movement(e: Evidence) -> Tensor:
    return (e.weight - _known(e.initial)).abs()


def _movmag(e: Evidence) -> Tensor:
    return (e.weight.abs() - _known(e.initial).abs()).abs()


def _mov_large_final(e: Evidence) -> Tensor:
    return (e.weight * (e.weight - _known(e.initial))).abs()


def _updating_magnitude_increase(e: Evidence) -> Tensor:
    return e.weight.abs() - _known(e.previous).abs()


def _updating_movement(e: Evidence) -> Tensor:
    return (e.weight - _known(e.previous)).abs()


def _updating_movmag(e: Evidence) -> Tensor:
    return (e.weight.abs() - _known(e.previous).abs()).abs()


def _taylor(e: Evidence) -> Tensor:
    return (_known(e.gradient) * e.weight).square()


def _snip(e: Evidence) -> Tensor:
    return (_known(e.gradient) * e.weight).abs()


def _grasp(e: Evidence) -> Tensor:
    return e.weight * _known(e.hessian_gradient)


def _synflow(e: Evidence) -> Tensor:
    return (e.weight * _known(e.synaptic_flow)).abs()


def _wanda(e: Evidence) -> Tensor:
    return e.weight.abs() * _known(e.activation)


def _elementwise(function: Callable[[Evidence], Tensor], *needs: str) -> Criterion:
    return Criterion(function, frozenset(needs), elementwise=True)


def _of_magnitude(function: Callable[[Evidence], Tensor], ufunc: np.ufunc) -> Criterion:
    return Criterion(function, elementwise=True, nonnegative=True, ufunc=ufunc)


# Hubens 2022, FasterAI (Electronics 11, 3789), section on criteria; w is the weight now, w_i when the sparsifier was made,
# w_p when the masks last moved.
random = Random()  # uniform
large_final = _of_magnitude(_large_final, np.absolute)  # |w|
squared_final = _of_magnitude(_squared_final, np.square)  # w^2
small_final = _elementwise(_small_final)  # -|w|
large_init = _elementwise(_large_init, "initial")  # |w_i|
small_init = _elementwise(_small_init, "initial")  # -|w_i|
large_init_large_final = _elementwise(_large_init_large_final, "initial")  # min(|w|, |w_i|)
small_init_small_final = _elementwise(_small_init_small_final, "initial")  # -max(|w|, |w_i|)
magnitude_increase = _elementwise(_magnitude_increase, "initial")  # |w| - |w_i|
movement = _elementwise(_movement, "initial")  # |w - w_i|
movmag = _elementwise(_movmag, "initial")  # ||w| - |w_i||
mov_large_final = _elementwise(_mov_large_final, "initial")  # |w (w - w_i)|
updating_magnitude_increase = _elementwise(_updating_magnitude_increase, "previous")  # |w| - |w_p|
updating_movement = _elementwise(_updating_movement, "previous")  # |w - w_p|
updating_movmag = _elementwise(_updating_movmag, "previous")  # ||w| - |w_p||

taylor = _elementwise(_taylor, "gradient")  # (g w)^2: Molchanov et al. 2019 (arXiv 1906.10771), first order
snip = _elementwise(_snip, "gradient")  # |g w|: Lee et al. 2019 (arXiv 1810.02340); their division by the sum ranks the same
grasp = _elementwise(_grasp, "hessian_gradient")  # w (H g), high is kept: Wang et al. 2020 (arXiv 2002.07376)
synflow = _elementwise(_synflow, "synaptic_flow")  # |w dR/dw|: Tanaka et al. 2020 (arXiv 2006.05467)
wanda = Criterion(_wanda, frozenset({"activation"}))  # |w_ij| ||x_j||_2: Sun et al. 2023 (arXiv 2306.11695)
