"""The catalogue of criteria: scores that say how much a weight matters. Weights with higher scores are kept.

A criterion is a frozen value of up to three parts. A function turns evidence (the weight, and more if the criterion needs it)
into scores of the weight's shape. A reducer turns these into scores of units. A rule on units, if there is one, changes the
scores of units by their weights. A criterion never writes into the tensors that it is given.
Over 300 lines, since a catalogue is one file: a formula of two lines for each criterion, and the value that holds them.
To add one: a function `(evidence) -> scores`, a ready-made `Criterion`, its name in `__all__`, a row in
`tests/core/test_criteria.py` and a line in `docs/criteria.md`.
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fasterai.core.checks import NamesReplacements, check_choice, from_catalogue, instead_of_class, noted
from fasterai.core.types import EVIDENCE, Evidence
from fasterai.core.variety import Variety
from fasterai.display import brief, one_line

__all__ = [
    "fisher",
    "fpgm",
    "grasp",
    "hessian",
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

EVIDENCE_FIELDS = frozenset(f.name for f in fields(Evidence))
REDUCERS = ("mean", "sum")
UnitRule = Callable[[Tensor, Tensor], Tensor]
MOST_DISTANCES = 1 << 24  # that are held at once


@dataclass(frozen=True)
class FarFromOthers:
    """A rule on units: the sum of a unit's Euclidean distances to the others, of which pruned ones are none."""

    def __call__(self, scores: Tensor, weights: Tensor) -> Tensor:
        """Return a sum for each unit, 0 for those whose weights are all zero."""
        living = (weights != 0).any(1)
        if weights.shape[1] == 1:  # single weights may be many
            return torch.zeros_like(scores).masked_scatter_(living, _distances_on_a_line(weights[living, 0]).to(scores))
        rows = torch.split(weights, max(1, MOST_DISTANCES // len(weights)))
        return torch.cat([torch.cdist(part, weights) @ living.to(weights.dtype) for part in rows]).to(scores) * living

    def __repr__(self) -> str:
        return "far from others"


def _distances_on_a_line(x: Tensor) -> Tensor:
    """Return the sum of each number's distances to the others: 4, 3 and 5 of 1, 2 and 4... in the order given."""
    ranked, order = x.double().sort()
    below = torch.arange(len(x), device=x.device)
    sums = ranked.cumsum(0)
    found = ranked * (2 * below + 1 - len(x)) + ranked.sum() + ranked - 2 * sums
    return torch.empty_like(found).scatter_(0, order, found)


def _over(x: Tensor, scale: Tensor) -> Tensor:
    """Divide by a scale; where the scale is 0 the result is 0, so that equal scores stay equal."""
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


#: The fields that change the choice, and are shown; the others say how scores may be computed.
SHOWN = ("reducer", "normalizer", "unit_rule")


@dataclass(frozen=True, repr=False)
class Criterion(NamesReplacements):
    """A way to score weights by how much they matter.

    Attributes:
        function: Evidence -> scores, one per weight, higher is kept.
        needs: The evidence that it reads besides the weight, one or a set. A name (`gradient`, `initial`, `previous`,
            `activation`, `hessian_gradient`, ...) is then a field of the evidence. A gatherer of your own is a function or
            callable object `(model, targets, source) -> target's name -> tensor`; the tensors broadcast against the weight, and
            are found in `evidence.gathered` by the gatherer's `name`, or the name of the function. A gatherer that reads the
            batches of the training has an attribute `reads_data = True`.
        reducer: The operation that makes one score of those of a unit's weights: `mean` or `sum`.
        normalizer: A map that makes the unit scores of different targets comparable. Named ones divide by the target's `sum`,
            `mean` or `max`, bring it to zero mean and unit deviation (`standardise`), or take the normal distribution
            function of that (`gaussian`). A function of the unit scores that returns as many is allowed too; None leaves them
            unchanged. Named ones do not change the order inside a target, as long as its sum, mean or max is positive.
        elementwise: True if each score depends only on the evidence at its own place, so that a part can be scored alone.
        nonnegative: True if no score is below 0, and a weight of 0 scores 0.
        ufunc: The same function of the weight as a numpy ufunc, which can write into memory that is held already; or None.
        unit_rule: A function of the scores of a pool's units `(units,)` and their weights `(units, features)` that returns new
            scores `(units,)`, before any normalizer. The weights of a coupled channel are all of its slices, joined. A rule
            with an attribute `reads = "outputs"` is given what the units put out on data, in place of their weights; the
            criterion then needs `outputs`. One with an attribute `compares = True` is refused where there are no such units.
        joint: A function of evidence -> parts, one per weight and of either sign, for units of several weights: a unit's score
            is the square of the sum of its weights' parts, averaged over the batches of `data`, whatever `reducer` is. The
            slices of a coupled channel are added up before the square. None for the sum or mean of scores.
    """

    function: Callable[[Evidence], Tensor]
    needs: frozenset[Any] = frozenset()  # of names and gatherers; one alone, or another collection, becomes one
    reducer: str = "mean"
    normalizer: str | Callable[[Tensor], Tensor] | None = None
    elementwise: bool = False
    nonnegative: bool = False
    ufunc: np.ufunc | None = None
    unit_rule: UnitRule | None = None
    joint: Callable[[Evidence], Tensor] | None = None

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise TypeError(f"function must be a function of evidence, got {self.function!r}")
        one = isinstance(self.needs, str) or callable(self.needs)  # `needs="gradient"`, or one gatherer
        object.__setattr__(self, "needs", frozenset({self.needs} if one else self.needs))
        for name in sorted(need for need in self.needs if not callable(need)):
            check_choice("needs", name, EVIDENCE)
        names = [gatherer_name(need) for need in self.needs if callable(need)]
        if len(set(names)) < len(names):
            raise ValueError(f"needs must have gatherers of different names, got {', '.join(sorted(names))}")
        check_choice("reducer", self.reducer, REDUCERS)
        if self.normalizer is not None and not callable(self.normalizer):
            check_choice("normalizer", self.normalizer, NORMALIZERS)
        if self.unit_rule is not None and not callable(self.unit_rule):
            raise TypeError(f"unit_rule must be a function of unit scores and their weights, got {self.unit_rule!r}")
        if self.joint is not None and not callable(self.joint):
            raise TypeError(f"joint must be a function of evidence, got {self.joint!r}")

    def __repr__(self) -> str:
        changed = [f for f in fields(self) if f.name in SHOWN and getattr(self, f.name) != f.default]
        settings = [f"{f.name}={brief(getattr(self, f.name))}" for f in changed]
        if self.needs:
            needs = sorted(need if isinstance(need, str) else gatherer_name(need) for need in self.needs)
            settings.insert(0, f"needs={', '.join(needs)}")
        return one_line(f"Criterion({'; '.join([self.title, *settings])})")

    @property
    def title(self) -> str:
        """The name of its function, for messages."""
        function: Any = self.function
        for inner in ("function", "func"):  # of a WeightFunction and the like, and of a partial
            function = getattr(function, inner, function)
        return str(getattr(function, "__name__", type(function).__name__)).removeprefix("_")

    @property
    def evidence_names(self) -> tuple[str, ...]:
        """The names of evidence that it needs."""
        return tuple(sorted(need for need in self.needs if isinstance(need, str)))

    @property
    def gatherers(self) -> Mapping[str, Any]:
        """The gatherers that it needs, by name."""
        return {gatherer_name(need): need for need in sorted((n for n in self.needs if callable(n)), key=gatherer_name)}

    def __call__(self, evidence: Evidence, *others: object, **named: object) -> Tensor:
        """Return the scores of the weights, in the shape of the weight and in float32 at least.

        Raises:
            TypeError: The function returns no tensor, or reads evidence and has not been said to.
            ValueError: The function's scores have another shape.
        """
        if others or named or not isinstance(evidence, Evidence):
            got = ", ".join(type(x).__name__ for x in (evidence, *others))
            raise TypeError(
                f"criterion must be called with evidence alone, got {got}; "
                "unit_scores(m, criterion, 'filter') from fasterai.core.all gives the scores of a module"
            )
        with noted(f"raised by the criterion {self.title}, for {evidence.name}"):
            try:
                scores = self.function(evidence.at_least_float32())
            except (AttributeError, TypeError) as error:
                self._tell_of_missing(evidence, error)
                raise
        if not isinstance(scores, Tensor):
            got = brief(scores)
            raise TypeError(f"criterion must return a tensor of scores for {evidence.name}, got {got} from {self.title}")
        if scores.shape != evidence.weight.shape:
            raise ValueError(
                f"criterion must return scores of the weight's shape {tuple(evidence.weight.shape)} "
                f"for {evidence.name}, got {tuple(scores.shape)} from {self.title}"
            )
        return scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores

    def _tell_of_missing(self, evidence: Evidence, error: Exception) -> None:
        """Refuse a function that has failed on evidence that it reads and does not ask for; other errors are its own."""
        names = getattr(getattr(self.function, "__code__", None), "co_names", ())
        missing = [name for name in EVIDENCE if name in names and getattr(evidence, name) is None and name not in self.needs]
        if missing and "NoneType" in str(error):
            needs = f"{{{', '.join(map(repr, missing))}}}"
            raise TypeError(
                f"criterion must ask for the evidence that it reads, got {self.title}, for which "
                f"evidence.{missing[0]} is None; pass Criterion(function, needs={needs})"
            ) from error

    def normalize(self, scores: Tensor, name: str = "a target") -> Tensor:
        """Apply the normalizer to the unit scores of a target, so that they compare with those of others.

        Raises:
            ValueError: The normalizer, a function of the user's own, returns scores of another shape.
        """
        if self.normalizer is None:
            return scores
        with noted(f"raised by the normalizer of the criterion {self.title}, for {name}"):
            found = self.normalizer(scores) if callable(self.normalizer) else NORMALIZERS[self.normalizer](scores)
        return _check_units(f"normalizer of criterion {self.title} for {name}", found, scores)

    def of_parts(self) -> Criterion:
        """Return the criterion whose scores are the parts that are summed up and squared for units; itself if it has none."""
        if self.joint is None:
            return self
        return replace(self, function=self.joint, joint=None, reducer="sum", nonnegative=False, ufunc=None)

    @property
    def reads_outputs(self) -> bool:
        """True if its rule on units looks at what they put out, not at their weights."""
        return getattr(self.unit_rule, "reads", "weights") == "outputs"

    def rank(self, scores: Tensor, weights: Callable[[], Tensor], name: str = "a target") -> Tensor:
        """Apply the rule on units, if there is one, to the unit scores of a pool.

        Args:
            scores: `(units,)`.
            weights: A function that returns the weights of the units, or what they put out, `(units, features)`; called only
                for a rule.
            name: The pool's name, for the message.

        Raises:
            ValueError: The rule returns scores of another shape.
        """
        if self.unit_rule is None:
            return scores
        given = weights()
        with noted(f"raised by the unit_rule of the criterion {self.title}, for {name}"):
            found = self.unit_rule(scores, given)
        return _check_units(f"unit_rule of criterion {self.title} for {name}", found, scores)

    def using(
        self,
        *,
        reducer: str | None = None,
        normalizer: str | Callable[[Tensor], Tensor] | None = None,
        unit_rule: UnitRule | None = None,
    ) -> Criterion:
        """Return the same criterion with another reducer, normaliser or rule on units."""
        changed = {"reducer": reducer, "normalizer": normalizer, "unit_rule": unit_rule}
        given: dict[str, Any] = {name: value for name, value in changed.items() if value}
        return replace(self, **given)


def gatherer_name(gatherer: Any) -> str:
    """Return the name of a gatherer: its `name`, or that of a function.

    Raises:
        TypeError: It has none.
        ValueError: Its name is that of evidence the library gathers, or no name at all.
    """
    name = getattr(gatherer, "name", None) or getattr(gatherer, "__name__", None)
    if not isinstance(name, str):
        raise TypeError(f"needs' gatherers must have a name, got {gatherer!r}; give it an attribute `name`")
    if name in EVIDENCE or not name.isidentifier():
        raise ValueError(f"needs' gatherers must have a name of their own, got {name!r}; give it an attribute `name`")
    return name


def _check_units(part: str, found: Any, scores: Tensor) -> Tensor:
    if not isinstance(found, Tensor) or found.shape != scores.shape:
        got = tuple(found.shape) if isinstance(found, Tensor) else brief(found)
        raise ValueError(f"{part} must return as many scores as it gets, of shape {tuple(scores.shape)}, got {got}")
    return found if found.is_floating_point() else found.float()


@dataclass(frozen=True)
class WeightFunction:
    """A plain function of the weight (a copy, so that it may write into it) as a function of evidence."""

    function: Callable[[Tensor], Tensor]

    def __call__(self, evidence: Evidence) -> Tensor:
        weight = evidence.weight.clone()
        try:
            return self.function(weight)
        except AttributeError as error:
            if error.obj is not weight or error.name not in EVIDENCE_FIELDS:
                raise
            needs = f", needs={{{error.name!r}}}" if error.name in EVIDENCE else ""
            name = getattr(self.function, "__name__", "function")
            raise TypeError(
                f"criteria must be a function of the weight alone, or a Criterion, got the function {name}, which reads "
                f".{error.name} of evidence; wrap it: Criterion({'function' if name == '<lambda>' else name}{needs})"
            ) from error


def as_criterion(criterion: Criterion | Callable[[Tensor], Tensor]) -> Criterion:
    """Make a criterion of a plain function of the weight; return a criterion unchanged.

    Raises:
        TypeError: The argument is neither.
    """
    if isinstance(criterion, Criterion):
        return criterion
    if isinstance(criterion, type):
        raise TypeError(f"criteria must be a criterion, got the class {criterion.__name__}{instead_of_class(criterion)}")
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
    """Make a criterion of random scores, which depend on the seed and the target's name alone.

    The global generator of random numbers is not used.
    """
    return Criterion(_Random(seed))


def variety(
    criterion: Criterion | Callable[[Tensor], Tensor] | str, similarity: str = "cosine", on: str = "weights"
) -> Criterion:
    """Make a criterion by which redundant units go first and rare ones stay; the given one decides within a redundant pair.

    Again and again the most similar pair of a layer is looked up, and the one of the lower score goes. Each layer loses as many
    units as by the given criterion. Inspired by Hubens et al. 2022 (ICIAP, arXiv 2203.05807), of which the abstract was read;
    the similarities and the pairs are ours.

    Args:
        criterion: Any criterion, its name, or a function of the weight; units are to be filters, rows, coupled channels, ...
        similarity: `cosine`, `abs_cosine`, `pearson` or `euclidean`.
        on: What is compared: `weights`, or `activations`, the outputs of the layers on data.

    Raises:
        ValueError: An argument is unknown, the criterion has variety already, or has a rule on weights for `activations`.
    """
    base = as_criterion(from_catalogue("criterion", criterion, sys.modules[__name__]))
    if isinstance(base.unit_rule, Variety):
        raise ValueError(f"criterion must be one without variety, got {base!r}")
    rule = Variety(similarity, on, base.unit_rule)
    if rule.reads == "outputs" and base.unit_rule is not None:
        raise ValueError(
            f"criterion must have no unit_rule of its own for on='activations', got {base!r}; it would be given outputs in "
            "place of weights: take on='weights'"
        )
    needs = base.needs | {"outputs"} if rule.reads == "outputs" else base.needs
    return replace(base, needs=needs, unit_rule=rule)


#: Makers of a criterion of another one, by the name that stands in words such as `variety(large_final)`.
MAKERS: dict[str, Callable[..., Criterion]] = {"variety": variety}


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


def _gate(e: Evidence) -> Tensor:
    return _known(e.gradient) * e.weight


def _snip(e: Evidence) -> Tensor:
    return (_known(e.gradient) * e.weight).abs()


def _grasp(e: Evidence) -> Tensor:
    return e.weight * _known(e.hessian_gradient)


def _hessian(e: Evidence) -> Tensor:
    return e.weight.square() * _known(e.hessian_diagonal)


def _synflow(e: Evidence) -> Tensor:
    return (e.weight * _known(e.synaptic_flow)).abs()


def _wanda(e: Evidence) -> Tensor:
    return e.weight.abs() * _known(e.activation)


def _elementwise(function: Callable[[Evidence], Tensor], *needs: str, **settings: Any) -> Criterion:
    return Criterion(function, frozenset(needs), elementwise=True, **settings)


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

taylor = _elementwise(_taylor, "gradient", joint=_gate)  # (g w)^2, of units (sum of g w)^2: Molchanov et al. 2019
fisher = _elementwise(_taylor, "gradient")  # g^2 w^2: optimal brain damage with squared gradients of batches for the Hessian
hessian = _elementwise(_hessian, "hessian_diagonal")  # w^2 H_ii: optimal brain damage (LeCun et al. 1990), H_ii by Hutchinson
fpgm = Criterion(_large_final, unit_rule=FarFromOthers())  # distances to the others: He et al. 2019 (arXiv 1811.00250)
snip = _elementwise(_snip, "gradient")  # |g w|: Lee et al. 2019 (arXiv 1810.02340); their division by the sum ranks the same
grasp = _elementwise(_grasp, "hessian_gradient")  # w (H g), high is kept: Wang et al. 2020 (arXiv 2002.07376)
synflow = _elementwise(_synflow, "synaptic_flow")  # |w dR/dw|: Tanaka et al. 2020 (arXiv 2006.05467)
wanda = Criterion(_wanda, frozenset({"activation"}))  # |w_ij| ||x_j||_2: Sun et al. 2023 (arXiv 2306.11695)
