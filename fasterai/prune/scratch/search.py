"""Pruning from scratch: the widths of a small network, found before any weight is trained.

Wang et al. 2020, Pruning from Scratch (AAAI), as their official code does it: the random weights are fixed, gates on channels
are learned, the highest gates of the whole network decide the widths, a network of these widths is trained from new weights.
The place of the gates (in the weights that read a channel), the groups of the channel graph, the exact budget and the order of
equal gates are ours.
"""

from __future__ import annotations

import copy
import os
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fasterai.analyze.cost import cost
from fasterai.core.checks import check_count, check_fraction, check_number, not_one_of
from fasterai.core.saved import settings_in_words
from fasterai.graph.channels import channel_graph
from fasterai.model.inputs import arguments, as_batch, few_samples, positional
from fasterai.model.names import unwrap
from fasterai.model.progress import keep_random_state, put_random_state_
from fasterai.model.supported import check_runs, check_whole
from fasterai.prune.choice.budget import Budget
from fasterai.prune.goal import read_layers
from fasterai.prune.scratch.found import FromScratch, Width
from fasterai.prune.scratch.gating import Gating
from fasterai.prune.scratch.learning import Recipe, learn_gates, on_device, read_data
from fasterai.prune.scratch.renewal import Reset, check_renews, renewed
from fasterai.prune.scratch.structure import (
    check_budget,
    choose_channels,
    cut_,
    find_structure,
    warn_of_share,
    widened,
)

__all__ = ["search_from_scratch"]


def search_from_scratch(
    model: nn.Module,
    data: Iterable[Any],
    budget: Budget,
    *,
    epochs: int = 10,
    steps: int | None = None,
    gamma: float = 0.5,
    level: float = 0.2,
    lr: float = 0.01,
    expand: float = 1.0,
    dense: nn.Module | None = None,
    example_inputs: Any = None,
    loss: Callable[..., Tensor] | None = None,
    ignored_layers: Iterable[nn.Module | str] | None = None,
    round_to: int = 1,
    exact: bool = True,
    reset: Reset | None = None,
    seed: int = 0,
    folder: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> FromScratch:
    """Find the widths of a small network on random weights, and make a fresh network of these widths, to be trained as usual.

    Each group of coupled channels has a gate for each channel. The gates are learned on random weights that do not train: what
    is minimised is `loss + gamma (mean(gates) - level)^2`. Then the channels with the highest gates of the whole network stay,
    as many as the budget allows, at least one of each group.

    Args:
        model: The network, trained or not: its weights are not read. It is not changed.
        data: Batches `(x, y)`, or what the network takes by keywords; a loader, or a list.
        budget: The share of the MACs or parameters that may be left, of `dense`.
        epochs: Passes over the data.
        steps: The number of steps at most.
        gamma: The weight of the regulariser of the gates.
        level: The mean of all gates that it asks for, in [0, 1].
        lr: The learning rate of the gates, for Adam.
        expand: A factor by which every group is widened for the search, at least 1; published are 1.25.
        dense: The network that the budget is a share of, where `model` is a wider one of the same kind; `model` before it is
            expanded, if left out.
        example_inputs: A tensor or tuple that the network runs on; a few samples of the first batch if left out.
        loss: The loss function `(output, *targets) -> scalar`; if left out, cross-entropy or the loss that the network returns.
        ignored_layers: Modules, or their names, whose outputs keep their number.
        round_to: A multiple that the kept channels of a group are rounded up to.
        exact: False if channels may go as well that are averaged over where they are not zero, which moves the outputs.
        reset: A function of a network that sets its weights as its maker does. It is called after the `reset_parameters` of all
            modules, and needed where these leave any weight out.
        seed: All random numbers follow from it: weights, the data's order where it is torch's, numpy's or Python's. The
            generators are put back.
        folder: A folder that keeps the gates after each epoch. The same call goes on where it was interrupted, bit for bit; one
            with another budget takes the gates as they are.
        progress: True to show a progress bar.

    Returns:
        The small network with new random weights, the gates, the widths, and the cost beside that of the dense network.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: An argument is out of range, the data hold no labels, the loss is not finite, the network has no channels
            that may go, or it cannot be widened or followed; or the budget is met already, or below what can be reached.
    """
    recipe = _recipe(epochs, steps, gamma, level, lr)
    factor, seed = _factor(expand, dense), check_count("seed", seed, 0)
    round_to = check_count("round_to", round_to)
    _check_kind(budget)
    layers = read_layers(check_renews(check_whole(model)), ignored_layers or ())
    standard = unwrap(model) if dense is None else unwrap(check_whole(dense))
    own = {"expand": factor, "exact": exact, "ignored_layers": sorted(layers), "loss": loss, "seed": seed}
    words = settings_in_words(**asdict(recipe), **own)
    with _seeded(seed):
        batches = read_data(data)
        inputs = _inputs(model, batches, example_inputs)
        fresh = renewed(copy.deepcopy(unwrap(model)).train(), reset, seed)
        given = find_structure(fresh, inputs, layers, exact)
        wide = given if factor == 1 else widened(given, factor, layers, exact)
        whole = cost(standard, inputs)
        check_budget(wide, budget, standard, whole, round_to)
        renewed(wide.model, reset, seed)
        trial = copy.deepcopy(wide.model)
        gating = Gating(trial, wide.graph)
        _seed(seed)
        place = None if folder is None else Path(folder)
        learned = learn_gates(trial, gating, batches, recipe, loss, folder=place, words=words, progress=progress)
        kept = choose_channels(wide, learned.gates, learned.averages, budget, standard, round_to)
        plan, sound = cut_(wide, kept)
        small = renewed(wide.model, reset, seed)
    first = given.counts if dense is None else _counts(standard, inputs, exact)
    left = dict(zip(wide.counts, (int(keep.sum()) for keep in sound.kept), strict=True))
    widths = {name: Width(first.get(name, n), n, left[name]) for name, n in wide.counts.items()}
    gates, costs = gating.split(learned.gates), (whole, cost(small, inputs))
    result = FromScratch(small, widths, gates, budget, *costs, learned, plan, sound.refused, seed, reset)
    warn_of_share(budget, result.share, sound.refused)
    return result


def _recipe(epochs: int, steps: int | None, gamma: float, level: float, lr: float) -> Recipe:
    return Recipe(
        check_count("epochs", epochs),
        None if steps is None else check_count("steps", steps),
        check_number("gamma", gamma, at_least=0),
        check_fraction("level", level),
        check_number("lr", lr, above=0),
    )


def _factor(expand: float, dense: nn.Module | None) -> float:
    factor = check_number("expand", expand, at_least=1)
    if factor > 1 and dense is not None:
        raise ValueError(f"expand must be 1 where dense is given, got {expand!r}: model is the wider network then")
    return factor


def _check_kind(budget: object) -> None:
    if not isinstance(budget, Budget):
        raise not_one_of("budget", "a Budget, as Budget(macs=0.5)", budget)
    if budget.kind not in ("macs", "params"):
        raise ValueError(f"budget must be of macs or params, got {budget!r}: widths found twice have to be the same")


def _inputs(model: nn.Module, data: Iterable[Any], example_inputs: Any) -> tuple[Any, ...]:
    """Return the given inputs, or a few samples of the first batch, on the model's device."""
    if example_inputs is None:
        batch = next(iter(data))
        found = few_samples(arguments(model, on_device(as_batch(batch), next(model.parameters()).device)))
    else:
        found = positional(example_inputs)
    check_runs(model, found)
    return found


def _counts(model: nn.Module, inputs: tuple[Any, ...], exact: bool) -> dict[str, int]:
    return {group.name: group.channels for group in channel_graph(model, inputs, exact).groups}


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Set the global generators of torch, numpy and Python to a seed for a while."""
    before = keep_random_state()
    try:
        _seed(seed)
        yield
    finally:
        put_random_state_(before)


def _seed(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
