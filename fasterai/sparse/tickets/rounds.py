"""Finding a lottery ticket: rounds of training, pruning and going back."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Real
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fasterai.core.checks import check_count, check_fraction
from fasterai.core.contexts import Context
from fasterai.core.criteria import Criterion
from fasterai.core.granularities import Granularity
from fasterai.core.loop import Participant
from fasterai.core.saved import settings_in_words
from fasterai.core.schedules import Schedule
from fasterai.model.progress import keep_random_state, put_random_state_
from fasterai.model.snapshots import put_back_, take_snapshot
from fasterai.sparse.sparsifier import Sparsifier
from fasterai.sparse.tickets.point import RewindPoint
from fasterai.sparse.tickets.states import Progress, read_progress, write_progress
from fasterai.sparse.tickets.ticket import Ticket
from fasterai.units.choice import Goal

__all__ = ["find_ticket", "plan_rounds"]

SURVIVORS = 0.8  # the share of the units that a round leaves by default, as is usual for tickets
#: Arguments of the `Sparsifier` that may be passed on, of which those that are data are no settings.
OPTIONS = ("targets", "layer_type", "min_keep", "round_to", "nm", "data", "loss", "example_inputs")
DATA = ("data", "loss", "example_inputs")
Train = Callable[[nn.Module, list[Participant]], object]


def find_ticket(
    train: Train,
    model: nn.Module,
    sparsity: float,
    granularity: Granularity | str = "weight",
    context: Context | str = "global",
    criteria: Criterion | Callable[[Tensor], Tensor] | str = "large_final",
    schedule: Schedule | Callable[[float], float] | str | None = None,
    *,
    rounds: int | None = None,
    rewind: float = 0.0,
    rewind_epoch: int | None = None,
    folder: str | os.PathLike[str] | None = None,
    **options: Any,
) -> Ticket:
    """Find a lottery ticket by rounds of training, pruning and going back (Frankle & Carbin 2019).

    Each round calls `train(model, participants)`, which trains the model once, from its first step to its last, with the
    participants in the loop: `attach(optimizer, *participants, ...)`, or `ParticipantCallback(*participants)`. Then units are
    pruned by the weights that it leaves, and all parameters and buffers get back the values of the moment `rewind` of the
    first round (Frankle et al. 2020), masked. At the end the model holds the ticket's masked weights. If anything fails, the
    model is as it was.

    Args:
        train: The training. What it returns is noted if it is a number, such as an accuracy: that of the ticket of the round
            before, which it has trained.
        model: The model with its first weights, wrapped or not.
        sparsity: The share of units to prune by the last round, in (0, 1).
        granularity: The granularity that groups weights into units, or its name.
        context: The context that chooses among units, or its name.
        criteria: The criterion that says how much a weight matters, its name, or a function of the weight.
        schedule: A schedule by which each round prunes while it trains, up to its share; by default a round prunes after it.
        rounds: The number of rounds, each of which leaves the same share of the units. By default each prunes 20 % of them, the
            last one what is left to do: `1 - 0.8 ** k` after round k.
        rewind: The moment to go back to, as a position of the first round's training in [0, 1): 0 is before its first step.
        rewind_epoch: The same as an epoch, whose beginning is gone back to, for loops that know their epochs.
        folder: A folder for the state after each round and its ticket, `round_01.safetensors` and so on. The same call goes on
            after the last whole round, with the random numbers of torch, numpy and Python that it would have drawn.
        **options: Of the `Sparsifier`: `targets`, `layer_type`, `min_keep`, `round_to`, `nm`, `example_inputs`, and `data` and
            `loss` for criteria that read data.

    Returns:
        The ticket of the last round.

    Raises:
        ValueError: An argument is out of range, a round would prune nothing, `rewind` is at the end of the training or beyond,
            `train` does not let the participants take part, or the folder is of another call.
        TypeError: An argument is of the wrong type.
    """
    if not callable(train):
        raise TypeError(f"train must be a function (model, participants), got {type(train).__name__}")
    moment = check_moment(rewind, rewind_epoch)
    share = _check_sparsity(sparsity)
    _check_options(options)
    axes: dict[str, Any] = {"granularity": granularity, "context": context, "criteria": criteria}

    axes |= {} if schedule is None else {"schedule": schedule}
    first = Sparsifier(model, **axes, sparsity=share, **options)
    _check_data(first, schedule is None)
    shares = plan_rounds(first, share, rounds)
    words = settings_in_words(
        sparsity=share,
        granularity=first.granularity,
        context=first.context,
        criteria=first.criteria,
        schedule=None if schedule is None else first.schedule,
        rounds=len(shares),
        rewind=rewind if rewind_epoch is None else f"epoch {rewind_epoch}",
        **{name: value for name, value in options.items() if name not in DATA},
    )
    place = None if folder is None else Path(folder)
    make = None if schedule is None else partial(Sparsifier, model, **axes, **options)
    search = Search(train, first, make, shares, moment, words, place)
    start = take_snapshot(model)
    try:
        return search.run(start)
    except BaseException:
        put_back_(model, start)
        raise


def plan_rounds(sparsifier: Sparsifier, sparsity: float, rounds: int | None) -> list[float]:
    """Return the sparsity after each round, in (0, 1].

    >>> from torch import nn
    >>> sparsifier = Sparsifier(nn.Linear(10, 10), context="global")
    >>> [round(share, 3) for share in plan_rounds(sparsifier, 0.5, None)], plan_rounds(sparsifier, 0.75, 2)
    ([0.2, 0.36, 0.488, 0.5], [0.5, 0.75])

    Args:
        sparsifier: The sparsifier, which knows the units.
        sparsity: The sparsity after the last round.
        rounds: The number of rounds; None for 20 % of the units that are left in each, where that prunes a unit at all.

    Raises:
        ValueError: A round would prune nothing.
    """
    left = 1 - sparsity
    if rounds is None:
        full = math.ceil(math.log(left) / math.log(SURVIVORS) - 1e-9)
        shares = [1 - SURVIVORS**k for k in range(1, full)] + [sparsity]
    else:
        count = check_count("rounds", rounds)
        shares = [1 - left ** (k / count) for k in range(1, count)] + [sparsity]
    asked = [_asked(sparsifier, share) for share in shares]
    idle = [k for k, (before, after) in enumerate(zip([0, *asked], asked, strict=False)) if after <= before]
    if rounds is None and asked[-1]:
        return [share for share, n, later in zip(shares, asked, [*asked[1:], math.inf], strict=True) if 0 < n < later]
    if idle:
        units = sum(pool.count for pool in sparsifier._record.active)
        raise ValueError(
            f"rounds must leave a unit to prune to each of them, got {len(shares)} for {asked[-1]:,} of {units:,} units, where "
            f"round {idle[0] + 1} would prune none; pass fewer rounds, or a finer granularity"
        )
    return shares


def _asked(sparsifier: Sparsifier, sparsity: float) -> int:
    sparsifier.context.check(sparsity)
    return Goal(sparsifier.context, sparsity).total({pool.name: pool.count for pool in sparsifier._record.active})


@dataclass(frozen=True)
class Search:
    """The rounds of one call.

    Attributes:
        train: The user's training.
        first: The sparsifier of all rounds that prune after their training.
        make: A function `(sparsity=...)` that makes a sparsifier for a round that prunes in its training, None if none does.
        shares: The sparsity after each round.
        moment: The moment that is gone back to.
        words: The settings in words.
        folder: The folder of the states, if there is one.
    """

    train: Train
    first: Sparsifier
    make: Callable[..., Sparsifier] | None
    shares: Sequence[float]
    moment: dict[str, Any]
    words: dict[str, str]
    folder: Path | None

    def run(self, start: dict[str, Tensor]) -> Ticket:
        """Go through the rounds that are left, and return the last one's ticket."""
        progress = read_progress(self.folder, self.words, start)
        while (k := len(progress.results)) < len(self.shares):
            progress = self._round(k, progress)
            if self.folder is not None:
                self._ticket(progress).save(self.folder / f"round_{k + 1:02}.safetensors")
                write_progress(self.folder, self.words, start, progress)
        ticket = self._ticket(progress)
        ticket.apply(self.model)
        self.first.finalize()
        return ticket

    @property
    def model(self) -> nn.Module:
        """The model."""
        return self.first.model

    def _round(self, k: int, before: Progress) -> Progress:
        """Train, prune and go back once; `k` counts from 0."""
        sparsifier = self._sparsifier(k, before)
        company: list[Participant] = [sparsifier] if self.make else [sparsifier.hold()] if k else []
        point = RewindPoint(self.model, before.weights or None, company, **self.moment)
        put_random_state_(before.random)
        result = self.train(self.model, [point, *company])
        point.check_used()
        sparsifier.apply_masks()
        if not (self.make and point.is_completed):
            sparsifier.sparsify_model(self.shares[k])
        state = sparsifier.state_dict()
        put_back_(self.model, point.weights)
        sparsifier.finalize()
        number = float(result) if isinstance(result, Real) and not isinstance(result, bool) else None
        return Progress(point.weights, state, (*before.results, number), keep_random_state())

    def _sparsifier(self, k: int, progress: Progress) -> Sparsifier:
        """Return the sparsifier of a round, with the masks of the round before applied to the weights of the moment."""
        sparsifier = self.make(sparsity=self.shares[k]) if self.make else self.first
        if k:
            put_back_(self.model, progress.weights)
            sparsifier.load_state_dict(progress.masks)
            sparsifier.apply_masks()
        return sparsifier

    def _ticket(self, progress: Progress) -> Ticket:
        self.first.load_state_dict(progress.masks)
        ticket = Ticket.of(self.first, progress.weights, **self.words, round=f"{len(progress.results)} of {len(self.shares)}")
        return Ticket(ticket.weights, ticket.units, ticket.settings, progress.results)


def check_moment(rewind: float, rewind_epoch: int | None) -> dict[str, Any]:
    """Return the arguments of a `RewindPoint` that say when.

    Raises:
        ValueError: The moment is not within the training, or given twice.
        TypeError: A number is of the wrong type.
    """
    if rewind_epoch is not None:
        if rewind:
            raise ValueError(f"rewind_epoch must be None beside rewind, got {rewind_epoch!r} and rewind={rewind!r}")
        return {"epoch": check_count("rewind_epoch", rewind_epoch, 0)}
    if isinstance(rewind, Real) and not isinstance(rewind, bool) and rewind >= 1:
        raise ValueError(
            f"rewind must be a position before the end of the training, in [0, 1), got {rewind!r}; for an epoch "
            "pass rewind_epoch="
        )
    return {"position": check_fraction("rewind", rewind)}


def _check_sparsity(sparsity: object) -> float:
    share = check_fraction("sparsity", sparsity)
    if share in (0, 1):
        raise ValueError(f"sparsity must be above 0 and below 1, got {sparsity!r}")
    return share


def _check_options(options: dict[str, Any]) -> None:
    for name in options:
        if name not in OPTIONS:
            raise TypeError(f"options must be of {', '.join(OPTIONS)}, got {name}")


def _check_data(sparsifier: Sparsifier, prunes_after: bool) -> None:
    """Refuse a criterion that reads data where there is none: it would fail after the first training."""
    sparsifier.check_seen()
    scorer = sparsifier._scorer
    if prunes_after and (scorer.reads_batches or (scorer.source.data is None and "gradient" in scorer.needs)):
        raise ValueError(
            f"data must be given for {sparsifier.criteria.title}, which reads some after each round, got None; pass "
            "data=[(x, y), ...] and loss=, or a schedule, by which a round prunes while it trains"
        )
