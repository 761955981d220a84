"""A move of the masks: scores, choice, record and notice, in this order; and what is told about what could not be seen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor, nn

from fasterai.core.checks import warn
from fasterai.core.contexts import Context
from fasterai.core.selection import count_true
from fasterai.core.types import Limits, Move
from fasterai.model.cuts import announce_move
from fasterai.sparse.record import MaskRecord
from fasterai.units.channel_pools import warn_of_rounding
from fasterai.units.choice import Goal, choose
from fasterai.units.pool import Pool
from fasterai.units.rules import Moment, Rule
from fasterai.units.scoring import Scorer

__all__ = ["move_masks", "tell_of_rounding", "warn_without_flow"]

Agree = Callable[[Callable[[], list[Tensor]]], list[Tensor]]


def move_masks(
    record: MaskRecord,
    scorer: Scorer,
    goal: Goal,
    pools: Sequence[Pool],
    limits: Limits,
    rule: Rule,
    *,
    moment: Moment | None = None,
    agree: Agree = lambda chosen: chosen(),
) -> Move:
    """Choose what is pruned; the masks and what is noted with them change together, or not at all.

    The new masks are not applied yet. Followers of the model hear of the pools whose decisions are others than before.

    Args:
        record: What is pruned so far; it takes over the choice.
        scorer: Scores the units.
        goal: How many are to go.
        pools: Whose units compete; those of others stay as they are.
        limits: What has to be respected besides.
        rule: How the decisions follow from those so far.
        moment: The moment of the training; None for pruning at once.
        agree: Makes several processes take the same choice.

    Returns:
        The decisions that have changed, before and after.

    Raises:
        ValueError: A score is NaN or infinite, or the criterion's evidence is not there.
    """
    if _hides_pruned(scorer, goal.context, limits.may_fall, rule, moment):
        record.apply_()

    def chosen() -> list[Tensor]:
        score = partial(scorer, record.model, pools, record.keep, masks=record.mask_of)
        return choose(pools, score(), goal, limits, rule=rule, moment=moment, grow=score, by=scorer.criterion)

    keeps = agree(chosen)
    move = record.replace({p.name: k for p, k in zip(pools, keeps, strict=True)})
    if move.after:
        latent = rule.chooses_anew(moment)  # masks then hide weights that go on training
        scorer.note_move(record.model, pools, record.keep, None if latent else record.mask_of)
        announce_move(record.model, move)
    return move


def _hides_pruned(scorer: Scorer, context: Context, may_fall: bool, rule: Rule, moment: Moment | None) -> bool:
    """Tell if pruned weights, which the optimizer has moved, must be zero again before the choice."""
    if rule.chooses_anew(moment):
        return False
    returning = may_fall or rule.exchanged(moment) > 0
    return returning or context.looks_at_pruned or scorer.looks_at_pruned


def tell_of_rounding(record: MaskRecord, goal: Goal, pools: Sequence[Pool], round_to: int | None) -> None:
    """Warn that fewer units have gone than were asked for, where that is not what the user has asked for by `round_to`."""
    if record.maker.rounds_by_default:
        counts = {p.name: p.count for p in pools}
        gone = sum(k.numel() - count_true(k) for k in (record.keep[p.name] for p in pools))
        warn_of_rounding(goal.total(counts), gone, sum(counts.values()), round_to)


def warn_without_flow(record: MaskRecord) -> None:
    """Warn of what cannot be known without example inputs."""
    norms = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in record.model.modules())
    unnamed = [t.name for t in record.targets if t.name not in record.selection.named]
    if norms or len(unnamed) > 1:
        last = f"{unnamed[-1]} is pruned like the others" if unnamed else "all were named"
        warn(
            f"without example_inputs it cannot be seen which target makes the model's output ({last}), nor which norm "
            f"reads which {record.granularity!r} (none is silenced): pass example_inputs=, or name the targets with targets=",
        )
