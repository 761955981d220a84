"""Sensitivity of a model: its score while one target at a time is pruned."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fasterai.analyze.layer_sensitivity import LayerSensitivity, SensitivityResult
from fasterai.analyze.sensitivity_report import Ranked, Sensitivity
from fasterai.core.checks import check_fraction, unknown
from fasterai.core.criteria import Criterion
from fasterai.core.granularities import Granularity
from fasterai.display import one_line
from fasterai.model.names import unwrap
from fasterai.model.running import evaluating, undisturbed
from fasterai.model.supported import check_model
from fasterai.model.targets import TargetsLike
from fasterai.sparse.sparsifier import Sparsifier

__all__ = [
    "LayerSensitivity",
    "Ranked",
    "Sensitivity",
    "SensitivityAnalyzer",
    "SensitivityResult",
    "analyze_sensitivity",
    "sensitivity",
]

SPARSITIES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def sensitivity(
    model: nn.Module,
    evaluate: Callable[[nn.Module], float],
    *,
    granularity: Granularity | str = "weight",
    criteria: Criterion | Callable[[Tensor], Tensor] | str = "large_final",
    sparsities: Sequence[float] = SPARSITIES,
    targets: TargetsLike | None = None,
    higher_is_better: bool = True,
    progress: bool = True,
    **options: Any,
) -> Sensitivity:
    """Score a model at several sparsities of one target at a time; all other targets stay unpruned.

    The weights and buffers are afterwards what they were, bit for bit, also if `evaluate` fails; so are modes and torch's
    random generators. For each evaluation the model is in eval mode, and the generators stand where they stood at the first.

    Args:
        model: The model, wrapped or not.
        evaluate: The model -> its score, an accuracy or a loss on data of yours. It is called once with the model as it is
            and once for each target and sparsity.
        granularity: The weights that share one decision, as for `Sparsifier`.
        criteria: The importance of a weight, as there.
        sparsities: The shares of each target to prune, in [0, 1], rising.
        targets: Names, globs or a predicate, as for `Sparsifier`; its default if left out.
        higher_is_better: True where a higher score is better; False for a loss.
        progress: True to show a progress bar.
        **options: Further arguments of `Sparsifier`: `layer_type`, `example_inputs`, `data`, `loss`, `min_keep`, `round_to`.
            Counts are exact, of coupled channels too, unless `round_to` is given.

    Raises:
        TypeError: `evaluate` does not return a number, or an argument is of the wrong type.
        ValueError: An argument is out of range, or the score of the model as it is is not finite.
    """
    check_model(model, holds_values=True)
    asked = _check_sparsities(sparsities)
    if not callable(evaluate):
        raise TypeError(f"evaluate must be a function of the model, got {evaluate!r} ({type(evaluate).__name__})")
    for name in ("context", "sparsity", "schedule", "nm"):
        if name in options:
            raise TypeError(f"options must be what a Sparsifier takes beside its context and sparsity, got {name}")
    sparsifier = Sparsifier(model, granularity, "local", criteria, targets=targets, **{"round_to": 1, **options})
    report = sparsifier.report()
    units = {row.name: row.units for row in report.rows if row.name not in report.left_out}  # frozen ones cannot be pruned
    if not units:
        sparsifier.check_seen()
        raise ValueError("targets must train, and all are frozen: name them with targets= to prune them all the same")
    scores: dict[str, list[float]] = {name: [] for name in units}
    reached: dict[str, list[float]] = {name: [] for name in units}
    with undisturbed(model), evaluating(model), _put_back(model) as put_back, _bar(len(units) * len(asked), progress) as step:
        baseline = _score(model, evaluate, put_back)
        if not math.isfinite(baseline):
            raise ValueError(f"evaluate must return a finite score of the model as it is, got {baseline!r}")
        for name in units:
            for sparsity in asked:
                sparsifier.sparsify_model({name: sparsity})
                reached[name].append(sparsifier.sparsity[name])
                scores[name].append(_score(model, evaluate, put_back))
                sparsifier.reset()
                step(name)
    found = {name: tuple(values) for name, values in scores.items()}
    shares = {name: tuple(values) for name, values in reached.items()}
    return Sensitivity(baseline, asked, found, shares, units, higher_is_better, repr(sparsifier.granularity))


def _check_sparsities(sparsities: Sequence[float]) -> tuple[float, ...]:
    asked = tuple(check_fraction("sparsities", s) for s in sparsities)
    if not asked or list(asked) != sorted(set(asked)):
        raise ValueError(f"sparsities must be at least one share, rising, got {tuple(sparsities)!r}")
    return asked


def _score(model: nn.Module, evaluate: Callable[[nn.Module], float], put_back: Callable[[], None]) -> float:
    """Evaluate a model once, and restore weights, buffers, modes and random generators afterwards."""
    try:
        with undisturbed(model), evaluating(model):
            score = evaluate(model)
    finally:
        put_back()
    try:
        return float(score)
    except (TypeError, ValueError) as error:
        raise TypeError(f"evaluate must return a number, got {score!r} ({type(score).__name__})") from error


@contextmanager
def _put_back(model: nn.Module) -> Iterator[Callable[[], None]]:
    """Give a function that restores the present values of all parameters and buffers; it is also called at the end."""
    held = [*model.parameters(), *model.buffers()]
    values = [x.detach().clone() for x in held]

    @torch.no_grad()
    def put_back() -> None:
        for x, value in zip(held, values, strict=True):
            x.copy_(value)

    try:
        yield put_back
    finally:
        put_back()


@contextmanager
def _bar(total: int, shown: bool) -> Iterator[Callable[[str], None]]:
    """Show a progress bar, and give the function that advances it by one target."""
    from tqdm.auto import tqdm

    with tqdm(total=total, desc="sensitivity", disable=not shown) as bar:

        def step(name: str) -> None:
            bar.set_postfix_str(name, refresh=False)
            bar.update()

        yield step


class SensitivityAnalyzer:
    """Sensitivities of a model, by the names of the public fasterai; `sensitivity` is the simpler call.

    Args:
        model: The model.
        sample: Example inputs, which `pruning` needs to follow channels through the model.
        eval_fn: The model -> its score.
        criteria: The importance of a weight, as for `Sparsifier`.
        higher_is_better: True where a higher score is better.
        metric_name: The name of the score, for texts.
    """

    VALID_COMPRESSIONS = frozenset({"sparsity", "pruning"})

    def __init__(
        self,
        model: nn.Module,
        sample: Any,
        eval_fn: Callable[[nn.Module], float],
        *,
        criteria: Criterion | Callable[[Tensor], Tensor] | str = "large_final",
        higher_is_better: bool = True,
        metric_name: str = "accuracy",
    ) -> None:
        check_model(model, holds_values=True)
        self.model, self.sample, self.eval_fn = model, sample, eval_fn
        self.criteria, self.higher_is_better, self.metric_name = criteria, higher_is_better, metric_name

    def __repr__(self) -> str:
        return one_line(f"<SensitivityAnalyzer of {type(unwrap(self.model)).__name__}, by {self.metric_name}>")

    def analyze(
        self,
        compression: str = "sparsity",
        level: float = 0.5,
        *,
        granularity: Granularity | str = "weight",
        layers: Sequence[str] | None = None,
        verbose: bool = True,
        **options: Any,
    ) -> SensitivityResult:
        """Score the model with one layer at a time pruned.

        Args:
            compression: `sparsity` for weights of the granularity, `pruning` for the channels that go together.
            level: The share of each layer, in [0, 1].
            granularity: For `sparsity`, as for `Sparsifier`.
            layers: Names of the layers; all if left out.
            verbose: True to show a progress bar.
            **options: Further arguments of `sensitivity`.

        Raises:
            ValueError: `compression` is not known, or another argument is out of range.
        """
        if compression not in self.VALID_COMPRESSIONS:
            hint = "there is no quantisation here; torchao has it" if compression == "quantization" else None
            raise unknown("compression", compression, sorted(self.VALID_COMPRESSIONS), hint=hint)
        level = check_fraction("level", level)
        pruning = compression == "pruning"
        measured = sensitivity(
            self.model,
            self.eval_fn,
            granularity="coupled" if pruning else granularity,
            criteria=self.criteria,
            sparsities=(level,),
            targets=layers,
            higher_is_better=self.higher_is_better,
            progress=verbose,
            **({"example_inputs": self.sample} if pruning else {}),
            **options,
        )
        rows = [self._row(name, measured) for name in measured.scores]
        return SensitivityResult(compression, level, measured.baseline, rows, self.metric_name, self.higher_is_better, measured)

    def _row(self, name: str, measured: Sensitivity) -> LayerSensitivity:
        module_name, _, attribute = name.rpartition(".")
        module = unwrap(self.model).get_submodule(module_name)
        label = module_name or name if attribute == "weight" else name
        count = module._parameters[attribute].numel()  # type: ignore[union-attr]
        (score,), (drop,) = measured.scores[name], measured.drops(name)
        return LayerSensitivity(label, type(module).__name__, count, measured.baseline, score, drop)

    def sweep(
        self, compression: str = "sparsity", levels: Sequence[float] = (0.25, 0.5, 0.75), **options: Any
    ) -> list[SensitivityResult]:
        """Score the model at several shares; the further arguments are those of `analyze`."""
        for level in levels:
            check_fraction("levels", level)
        return [self.analyze(compression, level, **options) for level in levels]


def analyze_sensitivity(
    model: nn.Module,
    sample: Any,
    eval_fn: Callable[[nn.Module], float],
    compression: str = "sparsity",
    level: float = 0.5,
    *,
    criteria: Criterion | Callable[[Tensor], Tensor] | str = "large_final",
    higher_is_better: bool = True,
    metric_name: str = "accuracy",
    **options: Any,
) -> SensitivityResult:
    """Score a model with one layer at a time pruned, by the names of the public fasterai; see `SensitivityAnalyzer.analyze`."""
    named: dict[str, Any] = {"criteria": criteria, "higher_is_better": higher_is_better, "metric_name": metric_name}
    return SensitivityAnalyzer(model, sample, eval_fn, **named).analyze(compression, level, **options)
