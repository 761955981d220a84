"""Result of a search from scratch: the small network, its widths and the gates behind them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from fasterai.analyze.cost import Cost
from fasterai.core.checks import check_count
from fasterai.display import Shown, Table, counted, of_batch, short
from fasterai.prune.choice.budget import Budget
from fasterai.prune.scratch.learning import Learned
from fasterai.prune.scratch.picture import draw_widths
from fasterai.prune.scratch.renewal import Reset, renewed
from fasterai.prune.scratch.structure import share_of
from fasterai.prune.surgery.plan import Plan

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["FromScratch", "Width"]

WORDS = {"macs": "MACs", "params": "parameters"}


@dataclass(frozen=True, repr=False)
class Width(Shown):
    """Channels of a group: in the dense network, in the searched one, and in the small one."""

    dense: int
    searched: int
    small: int

    def _line(self) -> str:
        expanded = f", {self.searched} searched" if self.searched != self.dense else ""
        return f"<Width: {self.small} of {counted(self.dense, 'channel')}{expanded}>"

    def _parts(self) -> Iterator[Table | str]:
        yield Table(("dense", "searched", "small"), [tuple(map(str, (self.dense, self.searched, self.small)))])


@dataclass(frozen=True, repr=False)
class FromScratch(Shown):
    """Small network found on random weights; `print` shows its widths, `plot` draws them with the gates.

    Attributes:
        model: The small network with new random weights, in training mode: train it as usual.
        widths: Group's name -> its numbers of channels.
        gates: Group's name -> the gates of the searched network's channels at the end, in [0, 1].
        budget: The budget that was asked for.
        dense: Cost of the dense network, which the budget is of.
        small: Cost of the small network.
        learned: The learning of the gates: losses, means, steps.
        plan: What was taken out of the searched network; `apply_plan_` does it to another one.
        refused: Group's name -> why its channels stay, where the network fails without them.
        seed: The seed that the weights follow from.
    """

    model: nn.Module
    widths: Mapping[str, Width]
    gates: Mapping[str, Tensor]
    budget: Budget
    dense: Cost
    small: Cost
    learned: Learned
    plan: Plan
    refused: Mapping[str, str]
    seed: int
    reset: Reset | None = None

    @property
    def share(self) -> float:
        """The share of the dense network's MACs or parameters that is left."""
        return share_of(self.budget, self.small, self.dense)

    def train_epochs(self, epochs: int) -> int:
        """Return the extended budget of training: so many epochs that they cost as many MACs as `epochs` of the dense network.

        It is `int(epochs / (share of the MACs that is left))`, as published; at least `epochs`.

        >>> # a network with half of the MACs: result.train_epochs(160) == 320
        """
        left = self.small.macs / self.dense.macs if self.dense.macs else 1.0
        return max(check_count("epochs", epochs), int(epochs / max(left, 1e-9) + 1e-9))

    def fresh(self, seed: int) -> nn.Module:
        """Return a copy of the small network with other new weights, in training mode.

        Args:
            seed: The seed that they follow from; no generator is changed.
        """
        return renewed(copy.deepcopy(self.model).train(), self.reset, check_count("seed", seed, 0))

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, ready for JSON; the model is left out."""
        return {
            "budget": {self.budget.kind: self.budget.share},
            "share": self.share,
            "seed": self.seed,
            "widths": {name: [w.dense, w.searched, w.small] for name, w in self.widths.items()},
            "gates": {name: gates.tolist() for name, gates in self.gates.items()},
            "macs": [self.dense.macs, self.small.macs],
            "parameters": [self.dense.parameters, self.small.parameters],
            "losses": list(self.learned.losses),
            "means": list(self.learned.means),
            "steps": self.learned.steps,
            "refused": dict(self.refused),
            "plan": self.plan.to_dict(),
        }

    def _line(self) -> str:
        before, after = (sum(part) for part in zip(*((w.dense, w.small) for w in self.widths.values()), strict=True))
        macs = f"MACs {short(self.dense.macs)} -> {short(self.small.macs)}"
        return f"<FromScratch: {after:,} of {counted(before, 'channel')}, {macs}, {self.share:.1%} of {self.budget.kind}>"

    def _parts(self) -> Iterator[Table | str]:
        expanded = any(w.searched != w.dense for w in self.widths.values())
        head = ["group", "dense", *(["searched"] if expanded else []), "small", "left", "mean gate", "gates at 0"]
        body = []
        for name, w in self.widths.items():
            own = self.gates[name]
            searched = [str(w.searched)] if expanded else []
            figures = [f"{w.small / w.dense:.1%}", f"{float(own.mean()):.3f}", f"{float((own == 0).double().mean()):.0%}"]
            body.append([name, str(w.dense), *searched, str(w.small), *figures])
        yield Table(head, body)
        pairs = [("parameters", self.dense.parameters, self.small.parameters)]
        pairs.append(("MACs" + of_batch(self.small.batch_size), self.dense.macs, self.small.macs))
        yield ""
        yield Table(
            ["", "dense", "small"], [[n, short(a), f"{short(b)} ({b / a:.1%})" if a else short(b)] for n, a, b in pairs]
        )
        yield from (f"{name}: {why}" for name, why in self.refused.items())
        steps, last = counted(self.learned.steps, "step"), self.learned.losses[-1]
        yield f"{steps} on the gates; loss of the last epoch {last:.3f}, mean gate {self.learned.means[-1]:.3f}"

    def plot(self) -> Figure:
        """Draw the widths of all groups, dense and small, and beside them their gates."""
        title = f"{self.share:.1%} of the {WORDS[self.budget.kind]}"
        return draw_widths({n: (w.dense, w.searched, w.small) for n, w in self.widths.items()}, self.gates, title)
