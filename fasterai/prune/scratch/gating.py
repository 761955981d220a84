"""Gates of coupled channels: numbers in [0, 1] by which a network's channels are multiplied, without a change of its code.

A channel is multiplied behind all that makes it (the norm, the nonlinearity, the sum of a residual network), in the slices of
the weights that read it. Behind a ReLU that is what the published gate gives, which stands between the norm and the ReLU, as
`relu(g x) = g relu(x)`. A gate of 0 is the network without the channel, whatever the nonlinearity. At the weight that makes the
channel a norm in training mode would undo the gate, and where two ways are multiplied it would count twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from fasterai.graph.channels import ChannelGraph, Group, Place
from fasterai.graph.labels import Array
from fasterai.prune.surgery.plan import tensor_of, tensors_of

__all__ = ["Gating"]


class Gating:
    """Places of a network's tensors at which gates stand, all gates in one vector.

    Args:
        model: The network; not changed.
        graph: Its channel graph, with the groups that get gates, one for each channel.

    Attributes:
        names: The groups' names.
        counts: The number of gates of each group, in the order of the vector.
    """

    def __init__(self, model: nn.Module, graph: ChannelGraph) -> None:
        self.names = tuple(group.name for group in graph.groups)
        self.counts = tuple(group.channels for group in graph.groups)
        tensors = tensors_of(model)
        self._tensors = {name: tensor_of(tensors, name) for group in graph.groups for name, _ in group.places}
        self._lookups: dict[Place, Tensor] = {}
        firsts = np.cumsum([0, *self.counts[:-1]])
        for group, first in zip(graph.groups, firsts.tolist(), strict=True):
            for place, indices in _gated(group, graph.readers):
                self._note(place, indices, int(first))

    def _note(self, place: Place, indices: Array, first: int) -> None:
        """Note for each index of a place the number of its gate; what has none gets the number behind the last one."""
        tensor = self._tensors[place[0]]
        if not tensor.is_floating_point():
            return
        if place not in self._lookups:
            none = sum(self.counts)
            self._lookups[place] = torch.full((tensor.shape[place[1]],), none, device=tensor.device)
        gates = torch.arange(first, first + len(indices), device=tensor.device)
        self._lookups[place][torch.as_tensor(indices, device=tensor.device)] = gates[:, None].expand(indices.shape)

    def tensors(self, gates: Tensor) -> dict[str, Tensor]:
        """Return name -> tensor times gates, for those that gates stand at; for `torch.func.functional_call`.

        Args:
            gates: The gates, `(sum(counts),)`.
        """
        padded = torch.cat([gates, gates.new_ones(1)])
        found: dict[str, Tensor] = {}
        for (name, d), lookup in self._lookups.items():
            tensor = found.get(name, self._tensors[name])
            shape = [-1 if i == d else 1 for i in range(tensor.dim())]
            found[name] = tensor * padded[lookup].to(tensor.dtype).view(shape)
        return found

    def split(self, gates: Tensor) -> dict[str, Tensor]:
        """Return group's name -> its gates, `(channels,)`."""
        return dict(zip(self.names, torch.split(gates, list(self.counts)), strict=True))


def _gated(group: Group, readers: Iterable[Place]) -> Iterator[tuple[Place, Array]]:
    """Yield the places at which a group's gates stand.

    They are the weights that read the channels. Where none does, as where their mean is read, they are the weight after which
    the group is named and its bias.
    """
    reading = [(place, indices) for place, indices in group.places.items() if place in readers]
    yield from reading or _making(group)


def _making(group: Group) -> Sequence[tuple[Place, Array]]:
    weight = group.name.partition(" #")[0]
    names = (weight, weight.removesuffix("weight") + "bias")
    return [(place, indices) for place, indices in group.places.items() if place[0] in names]
