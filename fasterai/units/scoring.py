"""Unit scores of targets: a criterion scores weights by its evidence, and a granularity makes scores of units of these.

Over 300 lines, since one class gathers, scores, and remembers what later scores need.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from fasterai.core.criteria import Criterion
from fasterai.core.granularities import Granularity
from fasterai.core.loop import Batch
from fasterai.core.selection import EvidenceScores, Scores, TensorScores
from fasterai.core.types import Evidence, Target, no_mask
from fasterai.model.cuts import Cut, sliced
from fasterai.units.evidence import GATHERERS, Source
from fasterai.units.looks import Look, look_at
from fasterai.units.own_evidence import gather
from fasterai.units.pool import Pool, WeightScores
from fasterai.units.trial import check_compared, try_criteria

__all__ = ["Scorer"]


#: Named evidence that is gathered from batches. A gatherer of the user's own says so itself.
READS_DATA = frozenset(GATHERERS) - {"gradient"}
Masks = Callable[[str], Tensor | None]


class Scorer:
    """A scorer of the units of targets; it remembers earlier weights if the criterion needs them.

    Attributes:
        criterion: The criterion that scores weights.
        granularity: The granularity that makes units of weights.
        source: The data, loss and inputs that evidence is computed from.
        others: Further criteria that it can score by.
        looks: Pool's name -> what is remembered of its first look, from the first move on.

    Raises:
        TypeError: A trial of a criterion of the weight alone returns no tensor (`try_criteria`).
        ValueError: It returns scores of another shape, or NaN; or it compares units, and there are none that can be
            (`check_compared`).
    """

    others: tuple[Criterion, ...] = ()  # pickles of earlier versions have none, nor what follows
    looks: Mapping[str, Look] = MappingProxyType({})
    #: Pool's name -> scores and scale of the last choice, until its move is noted.
    _chosen: Mapping[str, tuple[Tensor, Tensor]] = MappingProxyType({})

    def __init__(
        self,
        criterion: Criterion,
        granularity: Granularity,
        source: Source,
        targets: Sequence[Target],
        others: Sequence[Criterion] = (),
    ) -> None:
        self.criterion = criterion
        self.granularity = granularity
        self.others = tuple(others)
        self.source = self._given = source
        self._initial = self._copies("initial", targets)
        self._previous = self._copies("previous", targets)
        try_criteria((criterion, *self.others), targets)
        check_compared((criterion, *self.others), granularity, targets)

    @property
    def needs(self) -> frozenset[str]:
        """The evidence that its criteria need, gathered or remembered."""
        return self.criterion.needs.union(*(other.needs for other in self.others))

    def _copies(self, need: str, targets: Sequence[Target]) -> dict[str, Tensor]:
        return {t.name: t.parameter.detach().clone() for t in targets} if need in self.needs else {}

    @property
    def looks_at_pruned(self) -> bool:
        """True if the weights of pruned units change the scores of others."""
        apart = self.criterion.elementwise and self.criterion.normalizer is None and self.criterion.unit_rule is None
        return not (apart and not self.granularity.shares_weights and self.criterion.needs <= {"initial"})

    def begin(self, loss: Callable[..., Tensor] | None) -> None:
        """Take over a loop's loss for the time of a run, unless the user gave one."""
        self.source = replace(self._given, loss=self._given.loss or loss)

    @property
    def reads_batches(self) -> bool:
        """True if evidence is gathered from the batches of the training: the criterion reads data, and the user gave none."""
        needs = {n for n in self.needs if getattr(n, "reads_data", n in READS_DATA)}
        known = {"synaptic_flow"} if self._given.inputs is not None else set()
        return self._given.data is None and bool(needs - known)

    def take_less(self, inputs: tuple[Any, ...], less: Callable[[Batch], Batch]) -> None:
        """Go on with a model that takes less of its inputs.

        Args:
            inputs: Example inputs as it takes them now.
            less: A function that makes of a batch of the user's data what the model takes of it now.
        """
        self.source = self._given = replace(self._given, inputs=inputs, less=less)

    def see(self, batch: Batch) -> None:
        """Note the loop's batch, if it is read."""
        if self.reads_batches:
            self.source = replace(self.source, batch=batch)

    def end(self) -> None:
        """Forget the loss and the batch of the training."""
        self.source = self._given

    def __call__(
        self,
        model: nn.Module,
        pools: Sequence[Pool],
        keep: Mapping[str, Tensor],
        criterion: Criterion | None = None,
        *,
        masks: Masks | None = None,
    ) -> list[Scores]:
        """Return the unit scores of each pool.

        Args:
            model: The model, for evidence that is found by running it.
            pools: The pools to score; masked weights are zero.
            keep: Pool's name -> decisions so far.
            criterion: One of `others` to score by; the scorer's own if left out.
            masks: A function of a target's name that returns its mask so far, None where it is dense; called only for criteria
                that read it.

        Raises:
            ValueError: The criterion's evidence is missing.
        """
        by = self.criterion if criterion is None else criterion
        if self._is_alone(by):
            weighed = self._by_weight(model, _targets(pools), by, self.source, masks=masks)
            parts = [weighed.by_part(p.targets[0], keep.get(p.name)) for p in pools]
            return [w or TensorScores(p.name, p.score(weighed), keep.get(p.name)) for p, w in zip(pools, parts, strict=True)]
        outputs = GATHERERS["outputs"](model, _targets(pools), self.source) if by.reads_outputs else None
        units = self._units(model, pools, by, masks, outputs=outputs)
        looks: Mapping[str, Look] = self.looks if criterion is None else {}
        found: list[Scores] = []
        chosen: dict[str, tuple[Tensor, Tensor]] = {}
        for pool, raw in zip(pools, units, strict=True):
            so_far, look = keep.get(pool.name), looks.get(pool.name)
            scores = self._ranked(pool, by, raw, so_far, outputs)
            if pool.is_looked_at:
                chosen[pool.name] = scores, scale = look_at(scores, so_far, look)
                scores = pool.on_one_scale(scores, scale)
            found.append(TensorScores(pool.name, by.normalize(scores, pool.name), so_far))
        if criterion is None:
            self._chosen = chosen
        return found

    def _units(
        self,
        model: nn.Module,
        pools: Sequence[Pool],
        by: Criterion,
        masks: Masks | None,
        *,
        outputs: Mapping[str, Tensor] | None = None,
        masked: bool = False,
    ) -> list[Tensor]:
        """Return the scores of the pools' units, as their weights and evidence make them.

        Args:
            model: The model.
            pools: The pools.
            by: The criterion.
            masks: As for a call.
            outputs: What the layers put out, where it is known.
            masked: True to score the weights as the masks will leave them.
        """
        of_weights = partial(self._by_weight, model, _targets(pools), by, masks=masks, masked=masked, outputs=outputs)
        if by.joint is None or self.granularity.is_weight:
            scores = of_weights(self.source)
            return [pool.score(scores) for pool in pools]
        total: list[Tensor] = []
        sources = self.source.singly("gradients")
        for source in sources:
            scores = of_weights(source)
            found = [pool.score(scores).square() for pool in pools]
            total = [a + b for a, b in zip(total, found, strict=True)] if total else found
        return [x / len(sources) for x in total]

    def _by_weight(
        self,
        model: nn.Module,
        targets: Sequence[Target],
        by: Criterion,
        source: Source,
        *,
        masks: Masks | None,
        masked: bool = False,
        outputs: Mapping[str, Tensor] | None = None,
    ) -> WeightScores:
        """Return the scores of weights, whose evidence is gathered now; each weight is scored when it is asked for."""
        known: dict[str, Mapping[str, Tensor]] = {"initial": self._initial, "previous": self._previous}
        for need in by.evidence_names:
            if need == "outputs" and outputs is not None:
                known[need] = outputs
            elif need not in known:
                known[need] = GATHERERS[need](model, targets, source)
            elif lost := [t.name for t in targets if t.name not in known[need]]:
                raise ValueError(
                    f"criteria needs the {need} weights of {lost[0]}, which are not held any more: finalize() dropped them, or "
                    "the loaded state had none"
                )
        brought = gather(by, model, targets, source)
        one = by if self.granularity.is_weight else by.of_parts()

        def evidence(target: Target) -> Evidence:
            weight, mask = target.parameter.detach(), masks(target.name) if masked and masks is not None else None
            return Evidence(
                target.name,
                weight if mask is None else weight * mask,
                layout=target.layout,
                gathered={name: found[target.name] for name, found in brought.items()},
                masked=no_mask if masks is None else cache(partial(masks, target.name)),
                **{need: known[need].get(target.name) for need in by.evidence_names},  # type: ignore[arg-type]
            )

        def by_part(target: Target, so_far: Tensor | None = None) -> Scores | None:
            """Return scores that are computed part by part as they are read; None if the criterion or the device forbids it."""
            found = replace(evidence(target), layout=None)
            if not one.elementwise or found.weight.device.type != "cpu" or not _is_dense(found):
                return None
            return EvidenceScores(target.name, found.map(lambda x: x.view(target.layout.shape)), one, so_far)

        return WeightScores(lambda t: one(evidence(t)), one.reducer, by_part, is_signed=one is not by)

    def _ranked(
        self, pool: Pool, by: Criterion, scores: Tensor, so_far: Tensor | None, outputs: Mapping[str, Tensor] | None
    ) -> Tensor:
        """Apply the criterion's rule on units, unless nothing is left to tell apart."""
        if so_far is not None and not bool(so_far.any()):
            return scores
        vectors = pool.vectors_of_units if outputs is None else partial(pool.outputs_of_units, outputs)
        return by.rank(scores.reshape(-1), vectors, pool.name).view(scores.shape)

    def _is_alone(self, by: Criterion) -> bool:
        """Tell if each weight is scored by itself."""
        return self.granularity.is_weight and by.elementwise and by.normalizer is None and by.unit_rule is None

    @torch.no_grad()
    def note_move(
        self,
        model: nn.Module,
        pools: Sequence[Pool],
        keep: Mapping[str, Tensor] = MappingProxyType({}),
        masks: Masks | None = None,
    ) -> None:
        """Remember the weights as those at the last change of the masks, and how channels were scored for it.

        Args:
            model: The model.
            pools: The pools that were scored.
            keep: Pool's name -> the new decisions.
            masks: A function of a target's name that returns its new mask; None where weights are as they will be.
        """
        for t in _targets(pools) if self._previous else ():
            self._previous[t.name].copy_(t.parameter)
        looked = [p for p in pools if p.name in self._chosen]
        then = self._scores_after(model, looked, masks) or [None] * len(looked)
        found = {
            pool.name: Look.after(*self._chosen[pool.name], keep.get(pool.name), now)
            for pool, now in zip(looked, then, strict=True)
        }
        others = {name: look.without_channels() for name, look in self.looks.items()}  # which have lost weights as well
        self.looks, self._chosen = others | {name: look for name, look in found.items() if bool(look.scale > 0)}, {}

    def _scores_after(self, model: nn.Module, pools: Sequence[Pool], masks: Masks | None) -> Sequence[Tensor | None]:
        """Return what units' weights alone score after a move; nothing where scores are not of the weights alone."""
        if self.criterion.needs or self.criterion.unit_rule is not None:
            return []
        try:
            return self._units(model, pools, self.criterion, masks, masked=True)
        except Exception:  # of the user's own function, which may be bound to the shapes that there were: the move is done
            return []

    def cut_choice(self, pools: Sequence[Pool], cut: Cut) -> None:
        """Take channels out of the last choice, whose move is still to be noted; `pools` are those before the cut."""
        there = [p for p in pools if p.name in self._chosen]
        self._chosen = {p.name: (p.cut_keep(self._chosen[p.name][0], cut, p), self._chosen[p.name][1]) for p in there}

    def forget_looks(self, but: Collection[str] = ()) -> None:
        """Look at pools anew, but for some."""
        self.looks = {name: look for name, look in self.looks.items() if name in but}

    def after_cut(self, cut: Cut) -> None:
        """Follow the model's parameters, which have got smaller."""
        self._initial = {n: sliced(w, cut, n) for n, w in self._initial.items()}
        self._previous = {n: sliced(w, cut, n) for n, w in self._previous.items()}
        self.looks = {n: look.without_channels() for n, look in self.looks.items()}

    def retarget(self, targets: Sequence[Target]) -> None:
        """Score other targets from now on; for new ones, the present weights are remembered as the earlier ones."""
        self._initial = {**self._copies("initial", targets), **_of(self._initial, targets)}
        self._previous = {**self._copies("previous", targets), **_of(self._previous, targets)}

    def forget(self) -> None:
        """Drop the copies of earlier weights."""
        self._initial, self._previous = {}, {}

    def state_dict(self) -> dict[str, Any]:
        """Return copies of the remembered weights, by target name, and of first looks, by pool's name."""
        return {
            "initial": {n: w.clone() for n, w in self._initial.items()},
            "previous": {n: w.clone() for n, w in self._previous.items()},
            "looks": {n: look.to_dict() for n, look in self.looks.items()},
        }

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Refuse a saved state that lacks remembered weights of a target.

        Raises:
            ValueError: It does; one is named.
        """
        for need, own in (("initial", self._initial), ("previous", self._previous)):
            if missing := [name for name in own if name not in state[need]]:
                raise ValueError(
                    f"state's {need} weights must be those of all targets, which the criterion reads, got them without "
                    f"{missing[0]}"
                )

    def load_state_dict(self, state: Mapping[str, Any], targets: Sequence[Target]) -> None:
        """Load remembered weights, as copies on the targets' devices; states of earlier versions have no looks."""
        devices = {t.name: t.parameter.device for t in targets}
        self._initial = {n: w.to(devices[n], copy=True) for n, w in state["initial"].items()}
        self._previous = {n: w.to(devices[n], copy=True) for n, w in state["previous"].items()}
        self.looks = {n: Look.from_dict(saved) for n, saved in state.get("looks", {}).items()}


def _targets(pools: Sequence[Pool]) -> list[Target]:
    return list({t.name: t for pool in pools for t in pool.targets}.values())


def _of(weights: Mapping[str, Tensor], targets: Sequence[Target]) -> dict[str, Tensor]:
    return {t.name: weights[t.name] for t in targets if t.name in weights}


def _is_dense(evidence: Evidence) -> bool:
    tensors = [x for x in (*vars(evidence).values(), *evidence.gathered.values()) if isinstance(x, Tensor)]
    return all(x.is_contiguous() and x.shape == evidence.weight.shape for x in tensors)
