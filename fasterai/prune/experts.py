"""Experts of a mixture removed whole: their slices of all stacks and biases, and their outputs of the gate."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from fasterai.core import criteria as criterion_catalogue
from fasterai.core.checks import check_count, from_catalogue, warn
from fasterai.core.criteria import Criterion, as_criterion
from fasterai.core.granularities import Coupled
from fasterai.graph.experts import ExpertGraph, expert_graph
from fasterai.graph.labels import Flags
from fasterai.model.inputs import arguments, as_batch, positional
from fasterai.model.names import unwrap
from fasterai.model.optimizers import check_optimizer, check_trained
from fasterai.model.outputs import movement, tolerance
from fasterai.model.running import at_rest
from fasterai.model.running import copies as copies_of
from fasterai.model.supported import check_whole
from fasterai.prune.check import Sound, outputs_of
from fasterai.prune.gates import Gates, Which, check_any, check_left, read_which, without_experts
from fasterai.prune.probes import probes
from fasterai.prune.removal import Removal, take_out
from fasterai.prune.surgery.model_copies import Copies, matching_copies
from fasterai.prune.surgery.modules import EXPERTS
from fasterai.prune.surgery.operate import Surgery
from fasterai.prune.surgery.plan import Plan, make_plan
from fasterai.units.channel_pools import channel_pools
from fasterai.units.evidence import Source
from fasterai.units.scoring import Scorer

__all__ = ["expert_scores", "remove_experts", "without_experts"]

USAGE = "usage"
Numbers = Mapping[str, Sequence[int]]
By = Criterion | Callable[[Tensor], Tensor] | str


def remove_experts(
    model: nn.Module,
    example_inputs: Any,
    count: int | None = None,
    *,
    which: Which | None = None,
    criteria: By = USAGE,
    data: Iterable[Any] | None = None,
    loss: Callable[..., Tensor] | None = None,
    optimizer: Any = None,
    copies: Copies = None,
    measure: bool = True,
) -> Removal:
    """Remove whole experts; the model computes what it did with their gates closed, a softmax over the rest.

    All of an expert goes: its slice of every stack and bias, and its output of the gate. Where a gate chooses a few experts,
    as many as it chooses have to stay. Before anything is changed the small model is held against the model with these
    experts' logits at minus infinity (`without_experts`), on other inputs and batch sizes too.

    Args:
        model: The model; changed in place. Parameters stay the same objects.
        example_inputs: A tensor or tuple that the model runs on.
        count: The number of experts that go from each mixture, those of the lowest scores.
        which: Instead of `count`, the numbers of the experts, for each mixture or by its name.
        criteria: As for `expert_scores`, with `count`.
        data: As for `expert_scores`.
        loss: As for `expert_scores`.
        optimizer: The optimizer whose state is cut alike; torch's or fastai's.
        copies: Models of the same structure that lose the same experts.
        measure: True to count and time the model before and after.

    Raises:
        TypeError: The model is no module, or a number is none.
        ValueError: Both or none of `count` and `which` are given, there is no mixture or no such expert, too few are left, or
            the small model would compute something else. Nothing is changed then.
    """
    inputs = positional(example_inputs)
    check_optimizer(optimizer)
    check_trained(check_whole(model), optimizer)
    matching_copies(copies, unwrap(model))
    if (count is None) == (which is None):
        raise ValueError(f"count must be given, or which instead, got count={count!r} and which={which!r}")
    experts = expert_graph(model, inputs)
    if which is None:
        check_left(experts, dict.fromkeys(experts.experts, check_count("count", count)), f"count={count}")
        which = _lowest(_scores(model, inputs, experts, criteria, data, loss), check_count("count", count))
    gone = read_which(experts, which)
    kept = [_kept(g.channels, gone.get(g.name, ())) for g in experts.graph.groups]
    plan = make_plan(model, experts.graph, kept)
    plan = replace(plan, attributes=(*plan.attributes, *_counts(unwrap(model), experts, gone)))
    sound = Sound(kept, difference=_check(model, experts, gone, plan, inputs))
    trained = {"optimizer": optimizer, "copies": copies}
    return replace(take_out(model, experts.graph, sound, inputs, **trained, measure=measure, plan=plan), units="experts")


def expert_scores(
    model: nn.Module,
    example_inputs: Any,
    criteria: By = USAGE,
    *,
    data: Iterable[Any] | None = None,
    loss: Callable[..., Tensor] | None = None,
) -> dict[str, Tensor]:
    """Score the experts of each mixture; the lowest go first.

    Args:
        model: The model, wrapped or not; not changed.
        example_inputs: A tensor or tuple that the model runs on.
        criteria: `usage` is the mean of what the gate gives an expert, in [0, 1], zero where it is not chosen. Or a criterion
            of the catalogue: it scores the weights of the stacks, and an expert has the sum over the stacks of the means of its
            slices.
        data: Batches `(x, y)` for `usage`, which else is that on the example inputs, and for criteria that need data.
        loss: The loss function for criteria that need gradients.

    Returns:
        Name of a mixture, after its gate's weight -> scores `(expert,)`.

    Raises:
        ValueError: There is no mixture, or the criterion is unknown or lacks its data.
    """
    inputs = positional(example_inputs)
    return _scores(model, inputs, expert_graph(model, inputs), criteria, data, loss)


def _scores(
    model: nn.Module, inputs: tuple[Any, ...], experts: ExpertGraph, criteria: By, data: Any, loss: Any
) -> dict[str, Tensor]:
    check_any(experts)
    if isinstance(criteria, str) and criteria == USAGE:
        return _usage(model, inputs, experts, data)
    by = as_criterion(from_catalogue("criteria", criteria, criterion_catalogue))
    over = Coupled(relative=False)
    pools = []
    for pool in channel_pools(model, experts.graph, over):
        stacks = tuple(t for n, t in pool.parameters.items() if n in experts.stacks[pool.name])
        pools.append(replace(pool, targets=stacks, makers=frozenset(t.name for t in stacks)))
    targets = list({t.name: t for p in pools for t in p.targets}.values())
    scorer = Scorer(by, over, Source(data=data, loss=loss, inputs=inputs), targets)
    return {s.name: s.tensor() for s in scorer(model, pools, {})}


@torch.no_grad()
def _usage(model: nn.Module, inputs: tuple[Any, ...], experts: ExpertGraph, data: Any) -> dict[str, Tensor]:
    """Return the mean of what each gate gives its experts, over all that the batches send through it."""
    total = {name: torch.zeros(n, dtype=torch.float64) for name, n in experts.experts.items()}
    rows = dict.fromkeys(total, 0)
    for given in [inputs] if data is None else (arguments(model, as_batch(item)) for item in data):
        with at_rest(unwrap(model)), Gates(model, experts, {}) as gates:
            unwrap(model)(*copies_of(given))
        for name, logits in _seen(gates).items():
            weights = _given(logits.double(), experts.top_k.get(name))
            total[name] += weights.reshape(-1, weights.shape[-1]).sum(0).cpu()
            rows[name] += weights.numel() // weights.shape[-1]
    return {name: (total[name] / rows[name]).float() for name in total}


def _given(logits: Tensor, top_k: int | None) -> Tensor:
    """Return what a gate gives its experts: the softmax of the logits, over the chosen ones if it chooses."""
    if top_k is not None:
        chosen = torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, logits.topk(top_k, -1).indices, True)
        logits = logits.masked_fill(~chosen, -math.inf)
    return logits.softmax(-1)


def _seen(gates: Gates) -> dict[str, Tensor]:
    """Return the logits of a pass; refuse a model whose gates are worked out in a way that cannot be watched."""
    for name, found in gates.logits.items():
        if not found:
            raise ValueError(
                f"model must work its gate out by a linear layer or a matmul, got {name}, which was not seen in it"
            )
    return {name: torch.cat([x.reshape(-1, x.shape[-1]) for x in found]) for name, found in gates.logits.items()}


def _lowest(scores: Mapping[str, Tensor], count: int) -> dict[str, list[int]]:
    """Return the experts of the lowest scores; equal ones in their order."""
    return {name: torch.argsort(s, stable=True)[:count].tolist() for name, s in scores.items()}


def _kept(count: int, gone: Sequence[int]) -> Flags:
    return ~np.isin(np.arange(count), list(gone))


def _counts(model: nn.Module, experts: ExpertGraph, gone: Numbers) -> list[tuple[str, str, Any, Any]]:
    """Find the numbers of experts that modules and their configs keep about the mixtures below them."""
    sizes = {name: (n, n - len(gone.get(name, ()))) for name, n in experts.experts.items()}
    changed: list[tuple[str, str, Any, Any]] = []
    holders: dict[int, str] = {}
    for prefix, module in model.named_modules():
        dot = f"{prefix}." if prefix else ""
        below = {sizes[g.name] for g in experts.graph.groups if any(n.startswith(dot) for n, _ in g.places)}
        config = vars(module).get("config")
        for holder, way in ((module, ""), (config, "config.")) if hasattr(config, "__dict__") else ((module, ""),):
            kept = [(a, vars(holder)[a]) for a in EXPERTS if a in vars(holder) and id(holder) not in holders]
            found = [(a, n) for a, n in kept if isinstance(n, int) and any(n == before for before, _ in below)]
            if found and len(below if not way else set(sizes.values())) > 1:
                warn(f"mixtures are left with different numbers of experts, which {dot}{way}{found[0][0]} cannot tell")
                found = []
            changed += [(prefix, f"{way}{a}", n, after) for a, n in found for _, after in below if n != after]
            holders[id(holder)] = prefix
    return changed


def _check(model: nn.Module, experts: ExpertGraph, gone: Numbers, plan: Plan, inputs: tuple[Any, ...]) -> float:
    """Return how far the outputs move from those with closed gates, as a share of their scale; refuse more than rounding."""
    moved, dtype = _moved(model, experts, gone, plan, inputs)
    if tolerance("removal", dtype) < moved <= tolerance("doubtful", dtype):
        wide = copy.deepcopy(unwrap(model)).double()
        widened = tree_map(lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x, inputs)
        precise, dtype = _moved(wide, experts, gone, plan, widened)
        moved = moved if precise <= tolerance("removal", dtype) else math.inf
    elif moved > tolerance("removal", dtype):
        moved = math.inf
    if moved == math.inf:
        raise ValueError(
            "model must compute the same without experts as with their gates closed, got outputs that move by more than "
            "rounding: what it does with them depends on their number, or is no softmax over them"
        )
    return moved


def _moved(
    model: nn.Module, experts: ExpertGraph, gone: Numbers, plan: Plan, inputs: tuple[Any, ...]
) -> tuple[float, torch.dtype]:
    """Compare a model with closed gates, and the same with these experts removed; it is left as it was."""
    runs, dtype = [], torch.float32
    for i, probe in enumerate(probes(inputs)):
        with Gates(model, experts, gone) as gates:
            wanted = outputs_of(model, probe)
        if not isinstance(wanted, Exception) and not any(bool(x.isnan().any()) for x in wanted):
            _seen(gates)
            runs.append((probe, wanted))
            dtype = next((x.dtype for x in wanted if x.is_floating_point()), dtype)
        elif i == 0 and isinstance(wanted, Exception):
            raise ValueError(f"example_inputs must be arguments that the model runs on, got {wanted}") from wanted
    surgery = Surgery(model, plan)
    try:
        return max((_share(wanted, outputs_of(model, probe)) for probe, wanted in runs), default=math.inf), dtype
    finally:
        surgery.undo()


def _share(wanted: Sequence[Tensor], found: Sequence[Tensor] | Exception) -> float:
    if isinstance(found, Exception):
        raise ValueError(
            f"model must run with fewer experts, got {found}: a number of experts that it keeps has to be an attribute of one "
            f"of these names: {', '.join(EXPERTS)}"
        ) from found
    if [x.shape for x in found] != [x.shape for x in wanted]:
        return math.inf
    return max((movement(a, b).share for a, b in zip(wanted, found, strict=True)), default=math.inf)
