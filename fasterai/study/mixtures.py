"""Networks and tasks of the studies of experts, made on the spot: oscillators for blended experts, rules for chosen ones."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasterai.core.participant import Participant
from fasterai.study.description import Size
from fasterai.study.workbench import take_steps

__all__ = ["OSCILLATORS", "BlendedLayer", "BlendedMixture", "Samples", "make_frames", "make_rules", "train_samples"]

OSCILLATORS = 4
#: Length of a run of the oscillators, and of a step between two frames, in steps of the integration.
FRAMES, STEPS, STEP = 25, 6, 0.1
#: Rules and symbols of the sequences, and how many symbols one has.
RULES, SYMBOLS, LENGTH = 48, 32, 10


class Samples(NamedTuple):
    """Inputs and what is to be predicted from them, one row for each sample."""

    inputs: Tensor
    outputs: Tensor


class BlendedLayer(nn.Module):
    """A linear layer for each expert, blended into one for each sample: `W = sum_e g_e W_e`."""

    def __init__(self, experts: int, inputs: int, outputs: int) -> None:
        super().__init__()
        bound = math.sqrt(6 / (inputs + outputs))
        self.weight = nn.Parameter(torch.empty(experts, outputs, inputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(experts, outputs))

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        """Return the outputs `(B, out)` for inputs `(B, in)` and the shares of the experts `(B, expert)`."""
        weight = torch.einsum("be,eoi->boi", gate, self.weight)
        return torch.baddbmm((gate @ self.bias).unsqueeze(-1), weight, x.unsqueeze(-1)).squeeze(-1)


class BlendedMixture(nn.Module):
    """A gate and three blended layers, after the mode-adaptive networks of Zhang et al. (2018); two layers are hidden.

    Args:
        inputs: Numbers of a frame.
        outputs: Numbers that are predicted.
        experts: Number of experts.
        hidden: Width of the hidden layers.
        gated: Those numbers of a frame, from the last, that the gate reads.
    """

    def __init__(self, inputs: int, outputs: int, experts: int = 8, hidden: int = 32, gated: int = 3) -> None:
        super().__init__()
        self.gated = gated
        self.gate = nn.Sequential(nn.Linear(gated, 16), nn.ELU(), nn.Linear(16, experts))
        sizes = [inputs, hidden, hidden, outputs]
        self.layers = nn.ModuleList(BlendedLayer(experts, a, b) for a, b in itertools.pairwise(sizes))

    def forward(self, x: Tensor) -> Tensor:
        """Return what is predicted from frames `(B, in)`."""
        gate = self.gate(x[:, -self.gated :]).softmax(-1)
        for layer in self.layers[:-1]:
            x = F.elu(layer(x, gate))
        return self.layers[-1](x, gate)  # type: ignore[no-any-return]


def make_frames(count: int, seed: int) -> Samples:
    """Make frames of a ring of oscillators whose stiffness follows a phase, and the changes to the next frame.

    An oscillator is pulled back by a spring, which is stiff in one half of the phase and soft in the other, each a quarter of
    the phase after the one before; it is coupled to its neighbours by the sine of their distance, damped, and driven.

    Args:
        count: Number of frames.
        seed: Of the starts, and of how fast the phase turns in each run.

    Returns:
        `(N, 11)`: four places, four speeds, the phase's cosine and sine, and how fast it turns; `(N, 8)`: the change of places
        and speeds, scaled to a variance of about 1.
    """
    generator = torch.Generator().manual_seed(seed)
    runs = -(-count // FRAMES)
    place, speed = (torch.randn(runs, OSCILLATORS, generator=generator) for _ in range(2))
    phase = torch.rand(runs, 1, generator=generator) * math.tau
    turns = 0.5 + torch.rand(runs, 1, generator=generator)
    after = math.tau / OSCILLATORS * torch.arange(OSCILLATORS)
    frames, changes = [], []
    for _ in range(FRAMES):
        frames.append(torch.cat([place, speed, phase.cos(), phase.sin(), turns], 1))
        first = torch.cat([place, speed], 1)
        for _ in range(STEPS):
            stiff = 1.5 + 1.2 * torch.tanh(4 * (phase + after).sin())
            pull = sum((place.roll(way, 1) - place).sin() for way in (1, -1))
            speed = speed + STEP * (pull - stiff * place - 0.1 * speed + 0.8 * (phase - after).cos())
            place, phase = place + STEP * speed, phase + STEP * turns
        changes.append(torch.cat([place, speed], 1) - first)
    return Samples(torch.cat(frames)[:count], torch.cat(changes)[:count])


def make_rules(count: int, seed: int) -> Samples:
    """Make sequences that begin with the name of a rule; each further symbol follows from the one before by that rule.

    A rule is one of 48 permutations of 32 symbols, the same for every seed. The first symbol after the name is drawn.

    Returns:
        Sequences `(N, 10)`, and the next symbol at each place `(N, 10)`: -100 at the name, whose next one is drawn.
    """
    orders = torch.Generator().manual_seed(0)
    rules = torch.stack([torch.randperm(SYMBOLS, generator=orders) for _ in range(RULES)])
    generator = torch.Generator().manual_seed(seed)
    rule = torch.randint(RULES, (count,), generator=generator)
    sequence = [SYMBOLS + rule, torch.randint(SYMBOLS, (count,), generator=generator)]
    for _ in range(LENGTH - 1):
        sequence.append(rules[rule, sequence[-1]])
    symbols = torch.stack(sequence, 1)
    outputs = symbols[:, 1:].clone()
    outputs[:, 0] = -100
    return Samples(symbols[:, :-1], outputs)


def train_samples(
    network: nn.Module,
    samples: Samples,
    loss: Callable[[Tensor, Tensor], Tensor],
    participants: Sequence[Participant] = (),
    *,
    size: Size,
    seed: int,
    half_way: Callable[[torch.optim.Optimizer], object] | None = None,
) -> None:
    """Train a network with Adam under a one-cycle learning rate; the order follows from the seed.

    Args:
        network: The network, which is changed.
        samples: What it is trained on.
        loss: `(outputs, wanted) -> loss`.
        participants: Those who take part in the training.
        size: Epochs, samples in a step, and the highest learning rate.
        seed: Of the order.
        half_way: Is called with the optimizer after half of the steps.
    """
    per_epoch = max(1, len(samples.inputs) // size.batch_size)
    steps = size.epochs * per_epoch
    optimizer = torch.optim.Adam(network.parameters(), size.lr)
    generator = torch.Generator().manual_seed(seed)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        orders = (torch.randperm(len(samples.inputs), generator=generator) for _ in range(size.epochs))
        rows = (batch for order in orders for batch in torch.split(order, size.batch_size)[:per_epoch])
        for step, batch in enumerate(rows):
            if half_way is not None and step == steps // 2:
                half_way(optimizer)
            yield samples.inputs[batch], samples.outputs[batch]

    take_steps(network, optimizer, batches(), loss, participants, lr=size.lr, steps=steps)
