"""L4. Score coupled channels, mask the lowest, take them out, check: in one call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fasterai.core import contexts
from fasterai.core import criteria as criterion_catalogue
from fasterai.core.checks import check_choice, check_count, check_fraction, from_catalogue, unknown
from fasterai.core.contexts import Context, Global, Local, PerTarget
from fasterai.core.criteria import Criterion, as_criterion
from fasterai.core.schedules import Schedule, as_schedule, lin
from fasterai.core.selection import TensorScores
from fasterai.core.targets import unwrap
from fasterai.core.types import Evidence, Layout, Limits
from fasterai.prune.graph import ChannelGraph, Group, channel_graph
from fasterai.prune.labels import Flags
from fasterai.prune.plan import tensors_of
from fasterai.prune.removal import Removal, mask_channels_, removable, remove_channels

__all__ = ["Pruner", "channel_scores"]

Ratio = float | Mapping[str, float]
OVER_PLACES: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda x: x.sum(0),
    "mean": lambda x: x.mean(0),
    "max": lambda x: x.amax(0),
}


class Pruner:
    """Takes the channels that matter least out of a model.

    Args:
        model: The model; `prune_model` changes it in place.
        pruning_ratio: The share of the channels that go, in [0, 1], or a dict of names of layers to shares (context `local`;
            other layers stay as they are).
        context: `local` ranks inside each group of coupled channels, `global` all together.
        criteria: How much a weight matters: a criterion of the weight alone, its name, or a function of the weight.
        schedule: Which share of the ratio is reached at which of the `iterative_steps`.
        ignored_layers: Modules, or their names, whose outputs stay, besides all that has to stay anyway.
        example_inputs: A tensor or tuple that the model runs on.
        iterative_steps: In how many calls of `prune_model` the ratio is reached.
        over_places: How the scores of a channel's slices, one for each weight it runs through, become one: `sum`, `mean`
            or `max`.
        round_to: Kept channels of a group are rounded up to a multiple of it.

    Raises:
        ValueError: An argument is out of range or unknown, or there are no example inputs.
    """

    def __init__(
        self,
        model: nn.Module,
        pruning_ratio: Ratio,
        context: Context | str,
        criteria: Criterion | Callable[[Tensor], Tensor] | str,
        schedule: Schedule | Callable[[float], float] = lin,
        ignored_layers: Iterable[nn.Module | str] | None = None,
        example_inputs: Any = None,
        *,
        iterative_steps: int = 1,
        over_places: str = "sum",
        round_to: int | None = None,
    ) -> None:
        for value in pruning_ratio.values() if isinstance(pruning_ratio, Mapping) else [pruning_ratio]:
            check_fraction("pruning_ratio", value)
        if example_inputs is None:
            raise ValueError("example_inputs must be given: the channels are found by following them through the model")
        self.context = from_catalogue("context", context, contexts)
        if not isinstance(self.context, Local | Global):
            raise ValueError(f"context must be 'local' or 'global', got {context!r}")
        if isinstance(pruning_ratio, Mapping) and not isinstance(self.context, Local):
            raise ValueError("pruning_ratio must be one number for context 'global', got a dict; pass context='local'")
        self.model = model
        self.pruning_ratio = pruning_ratio
        self.criteria = as_criterion(from_catalogue("criteria", criteria, criterion_catalogue))
        if self.criteria.needs:
            needs = ", ".join(sorted(self.criteria.needs))
            raise ValueError(f"criteria must read nothing but the weight here, got one that needs {needs}")
        self.schedule = as_schedule(schedule)
        self.inputs = tuple(example_inputs) if isinstance(example_inputs, tuple | list) else (example_inputs,)
        self.iterative_steps = check_count("iterative_steps", iterative_steps)
        self.over_places = check_choice("over_places", over_places, OVER_PLACES)
        self.round_to = None if round_to is None else check_count("round_to", round_to)
        self.ignored_layers = _names_of(model, ignored_layers or ())
        self._original: dict[str, int] = {}
        self._step = 0

    def prune_model(self, optimizer: Any = None) -> Removal:
        """Score, mask, take out, check; the next of `iterative_steps`.

        Args:
            optimizer: Whose state is cut alike; torch's or fastai's.

        Returns:
            What was taken out, what could not go and why, and how far the outputs moved at the removal.

        Raises:
            ValueError: The model cannot be followed, a dict names no layer, or all steps were taken. Nothing is changed then.
        """
        if self._step >= self.iterative_steps:
            raise ValueError(
                f"iterative_steps must be at least the number of calls, got {self.iterative_steps} and a further call"
            )
        removal = self.prune_to(self.schedule((self._step + 1) / self.iterative_steps), optimizer)
        self._step += 1
        return removal

    def prune_to(self, share: float, optimizer: Any = None) -> Removal:
        """Take out channels until a share of the `pruning_ratio` is reached, counted from the channels there were at first.

        Args:
            share: Of the ratio, in [0, 1].
            optimizer: Whose state is cut alike; torch's or fastai's.

        Raises:
            ValueError: The share is out of range, the model cannot be followed, or a dict names no layer. Nothing is
                changed then.
        """
        check_fraction("share", share)
        graph = self._allowed(channel_graph(self.model, self.inputs))
        self._original = self._original or {g.name: g.channels for g in graph.groups}
        kept = self._choose(graph, share)
        chosen, refused = self._mask_removable(graph, kept)
        removal = remove_channels(self.model, graph, chosen, self.inputs, optimizer=optimizer)
        return replace(removal, refused={**refused, **removal.refused})

    @torch.no_grad()
    def _mask_removable(self, graph: ChannelGraph, kept: list[Flags]) -> tuple[list[Flags], dict[str, str]]:
        """Mask the channels that can go; those of a group that cannot get their weights back."""
        before = {p: p.detach().clone() for p in unwrap(self.model).parameters()}
        mask_channels_(self.model, graph, kept)
        chosen, refused, _ = removable(self.model, graph, kept, self.inputs)
        if refused:
            for parameter, weights in before.items():
                parameter.copy_(weights)
            mask_channels_(self.model, graph, chosen)
        return chosen, refused

    def print_sparsity(self) -> None:
        """Print how many channels of each group are left."""
        graph = channel_graph(self.model, self.inputs)
        for group in graph.groups:
            before = self._original.get(group.name, group.channels)
            print(f"{group.name}: {group.channels} of {before} channels")  # noqa: T201 - what it is for

    def _allowed(self, graph: ChannelGraph) -> ChannelGraph:
        """The groups whose channels no ignored layer makes."""
        made = [{n.rpartition(".")[0] for n, d in g.places if (n, d) not in graph.readers} for g in graph.groups]
        groups = tuple(g for g, names in zip(graph.groups, made, strict=True) if not names & self.ignored_layers)
        if not groups:
            raise ValueError("model must have channels that may go, got none; channel_graph(model, inputs).pinned says why")
        return ChannelGraph(groups, graph.pinned, graph.readers)

    def _choose(self, graph: ChannelGraph, share: float) -> list[Flags]:
        scores = [TensorScores(g.name, channel_scores(self.model, g, self.criteria, self.over_places)) for g in graph.groups]
        layouts = [Layout((g.channels,), (frozenset({"out"}),)) for g in graph.groups]
        context, sparsity = self._to_prune(graph, share)
        keeps = context(scores, layouts, sparsity, Limits(round_to=self.round_to))
        return [keep.cpu().numpy() for keep in keeps]

    def _to_prune(self, graph: ChannelGraph, share: float) -> tuple[Context, float]:
        """What goes now, as shares of what is still there, so that the whole is the ratio of what there was."""
        there = {g.name: g.channels for g in graph.groups}
        ratios = self._ratios(graph)
        if isinstance(self.context, Global):
            wanted = round(share * float(self.pruning_ratio) * sum(self._original.values()))  # type: ignore[arg-type]
            gone = sum(self._original.values()) - sum(there.values())
            return self.context, max(0, wanted - gone) / max(1, sum(there.values()))
        shares = {}
        for name, ratio in ratios.items():
            wanted = round(share * ratio * self._original[name]) - (self._original[name] - there[name])
            shares[name] = max(0, wanted) / there[name]
        return PerTarget(shares), 1.0

    def _ratios(self, graph: ChannelGraph) -> dict[str, float]:
        if not isinstance(self.pruning_ratio, Mapping):
            return {g.name: self.pruning_ratio for g in graph.groups}
        makers = {n.rpartition(".")[0]: g.name for g in graph.groups for n, d in g.places if (n, d) not in graph.readers}
        for name in self.pruning_ratio:
            if name not in makers:
                raise unknown("pruning_ratio's keys", name, makers, "the name of a layer whose outputs may go, of")
        return {makers[name]: ratio for name, ratio in self.pruning_ratio.items()}


@torch.no_grad()
def channel_scores(model: nn.Module, group: Group, criterion: Criterion, over_places: str = "sum") -> Tensor:
    """The score of each coupled channel of a group, `(channels,)`.

    Of every weight with two or more dimensions that a channel runs through, the scores of its slice become one by the
    criterion's reducer; these become one by `over_places`. Biases and norms have no say.
    """
    tensors = tensors_of(model)
    parts = []
    for (name, d), indices in group.places.items():
        weight = tensors[name][0]._parameters.get(tensors[name][1])
        if weight is None or weight.dim() < 2:
            continue
        slices = criterion(Evidence(name, weight.detach())).movedim(d, 0).reshape(weight.shape[d], -1)
        per_index = slices.mean(1) if criterion.reducer == "mean" else slices.sum(1)
        per_channel = per_index[torch.as_tensor(indices, device=weight.device)]
        parts.append(per_channel.mean(1) if criterion.reducer == "mean" else per_channel.sum(1))
    return criterion.normalize(OVER_PLACES[over_places](torch.stack(parts)))


def _names_of(model: nn.Module, layers: Iterable[nn.Module | str]) -> frozenset[str]:
    """The names of layers, and of those inside them."""
    names = {id(m): n for n, m in unwrap(model).named_modules()}
    found: set[str] = set()
    for layer in layers:
        name = layer if isinstance(layer, str) else names.get(id(layer))
        if name is None or name not in names.values():
            raise unknown(
                "ignored_layers", str(layer)[:60], [n for n in names.values() if n], "modules of the model or their names, of"
            )
        found |= {n for n in names.values() if n == name or n.startswith(f"{name}.")}
    return frozenset(found)
