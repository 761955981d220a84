"""From targets to unit scores: a criterion with its evidence, and a granularity that makes units of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fasterai.core.criteria import Criterion
from fasterai.core.granularities import Coupled, Granularity
from fasterai.core.loop import Batch
from fasterai.core.selection import EvidenceScores, Scores, TensorScores
from fasterai.core.types import Evidence, Target
from fasterai.model.cuts import Cut, sliced
from fasterai.units.evidence import GATHERERS, Source
from fasterai.units.pool import Pool, WeightScores

__all__ = ["Scorer"]


class Scorer:
    """Scores the units of targets, and remembers earlier weights if the criterion asks for them.

    Attributes:
        criterion: How much a weight matters.
        granularity: What a unit is.
        source: Where evidence comes from that is not in the weights.
    """

    def __init__(self, criterion: Criterion, granularity: Granularity, source: Source, targets: Sequence[Target]) -> None:
        self.criterion = criterion
        self.granularity = granularity
        self.source = self._given = source
        self._initial = self._copies("initial", targets)
        self._previous = self._copies("previous", targets)

    def _copies(self, need: str, targets: Sequence[Target]) -> dict[str, Tensor]:
        return {t.name: t.parameter.detach().clone() for t in targets} if need in self.criterion.needs else {}

    @property
    def looks_at_pruned(self) -> bool:
        """Whether the weights of pruned units have a say in the scores of others."""
        apart = self.criterion.elementwise and self.criterion.normalizer is None and not isinstance(self.granularity, Coupled)
        return not (apart and self.criterion.needs <= {"initial"})

    def begin(self, loss: Callable[..., Tensor] | None) -> None:
        """Take over a loop's loss for the time of a run, unless the user gave one."""
        self.source = replace(self._given, loss=self._given.loss or loss)

    @property
    def reads_batches(self) -> bool:
        """Whether evidence is gathered from the loop's batches: the criterion reads data, and the user gave none."""
        needs = self.criterion.needs & (set(GATHERERS) - {"gradient"})
        known = {"synaptic_flow"} if self._given.inputs is not None else set()
        return self._given.data is None and bool(needs - known)

    def see(self, batch: Batch) -> None:
        """Note the loop's batch, if it is read."""
        if self.reads_batches:
            self.source = replace(self.source, batch=batch)

    def end(self) -> None:
        """Let go of what the loop gave."""
        self.source = self._given

    def __call__(self, model: nn.Module, pools: Sequence[Pool], keep: Mapping[str, Tensor]) -> list[Scores]:
        """The unit scores of each pool.

        Args:
            model: The model, for evidence that is found by running it.
            pools: What to score; masked weights are zero.
            keep: Pool's name -> decisions so far.

        Raises:
            ValueError: The criterion's evidence is not there.
        """
        targets = list({t.name: t for pool in pools for t in pool.targets}.values())
        known: dict[str, Mapping[str, Tensor]] = {"initial": self._initial, "previous": self._previous}
        for need in sorted(self.criterion.needs):
            if need not in known:
                known[need] = GATHERERS[need](model, targets, self.source)
            elif lost := [t.name for t in targets if t.name not in known[need]]:
                raise ValueError(
                    f"criteria needs the {need} weights of {lost[0]}, which are not held any more: finalize() let them go, or "
                    "the loaded state had none"
                )

        def evidence(target: Target) -> Evidence:
            own: dict[str, Any] = {need: known[need][target.name] for need in self.criterion.needs}
            return Evidence(target.name, target.parameter.detach(), **own)

        def by_part(target: Target, so_far: Tensor | None = None) -> Scores | None:
            """The scores of a target's weights, worked out where they are read; None if that cannot be done."""
            found = evidence(target)
            if not self.criterion.elementwise or found.weight.device.type != "cpu" or not _is_dense(found):
                return None
            return EvidenceScores(target.name, found.map(lambda x: x.view(target.layout.shape)), self.criterion, so_far)

        by_weight = WeightScores(lambda t: self.criterion(evidence(t)), self.criterion.reducer, by_part)
        each = [by_part(p.targets[0], keep.get(p.name)) if self._alone else None for p in pools]
        return [weights or self._units(p, by_weight, keep.get(p.name)) for p, weights in zip(pools, each, strict=True)]

    def _units(self, pool: Pool, by_weight: WeightScores, so_far: Tensor | None) -> Scores:
        scores = pool.on_one_scale(pool.score(by_weight), so_far)
        return TensorScores(pool.name, self.criterion.normalize(scores), so_far)

    @property
    def _alone(self) -> bool:
        """Whether each weight is scored by itself."""
        return self.granularity.is_weight and self.criterion.elementwise and self.criterion.normalizer is None

    @torch.no_grad()
    def note_move(self, pools: Sequence[Pool]) -> None:
        """Remember the weights as those of the last move of the masks."""
        for t in (t for pool in pools for t in pool.targets) if self._previous else ():
            self._previous[t.name].copy_(t.parameter)

    def after_cut(self, cut: Cut) -> None:
        """Follow the model's parameters, which have got smaller."""
        self._initial = {n: sliced(w, cut, n) for n, w in self._initial.items()}
        self._previous = {n: sliced(w, cut, n) for n, w in self._previous.items()}

    def retarget(self, targets: Sequence[Target]) -> None:
        """Score other targets from now on; of those that are new, the weights are remembered as they are now."""
        self._initial = {**self._copies("initial", targets), **_of(self._initial, targets)}
        self._previous = {**self._copies("previous", targets), **_of(self._previous, targets)}

    def forget(self) -> None:
        """Let go of the copies of earlier weights."""
        self._initial, self._previous = {}, {}

    def state_dict(self) -> dict[str, Any]:
        """Copies of the remembered weights, by target name."""
        return {
            "initial": {n: w.clone() for n, w in self._initial.items()},
            "previous": {n: w.clone() for n, w in self._previous.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any], targets: Sequence[Target]) -> None:
        """Take over remembered weights: copies, on the targets' devices."""
        devices = {t.name: t.parameter.device for t in targets}
        self._initial = {n: w.to(devices[n], copy=True) for n, w in state["initial"].items()}
        self._previous = {n: w.to(devices[n], copy=True) for n, w in state["previous"].items()}


def _of(weights: Mapping[str, Tensor], targets: Sequence[Target]) -> dict[str, Tensor]:
    return {t.name: weights[t.name] for t in targets if t.name in weights}


def _is_dense(evidence: Evidence) -> bool:
    tensors = [x for x in vars(evidence).values() if isinstance(x, Tensor)]
    return all(x.is_contiguous() and x.shape == evidence.weight.shape for x in tensors)
