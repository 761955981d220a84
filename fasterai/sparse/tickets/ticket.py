"""A lottery ticket: early weights and the masks that were found for them, with what it is held against."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fasterai.core.checks import check_count
from fasterai.display import SERIES, Shown, Table, as_percent, counted, dress, new_axes, styled
from fasterai.model.cuts import follow
from fasterai.model.snapshots import find_differences, put_back_, take_snapshot
from fasterai.sparse.sparsifier import Sparsifier
from fasterai.sparse.tickets.files import read_ticket, stamp_of, write_ticket
from fasterai.sparse.tickets.hold import TicketHold
from fasterai.sparse.tickets.units import Units, masks_of, read_units

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Ticket"]


class Ticket(Shown):
    """A lottery ticket: the weights of an early moment of a training, and the masks to train them with.

    It knows no model: it fits every one with tensors of these names and shapes. Nothing of it changes.

    Args:
        weights: The tensors of the moment that was gone back to, by name, none of them masked.
        units: The units with their decisions.
        settings: The settings that it was found with, in words.
        results: What `train` returned in each round, where that was a number.

    Attributes:
        weights: As given; parameters, and buffers such as a norm's running statistics.
        units: As given.
        settings: As given.
        results: As given.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        units: Sequence[Units],
        settings: Mapping[str, str] | None = None,
        results: Sequence[float | None] = (),
    ) -> None:
        self.weights = dict(weights)
        self.units = tuple(units)
        self.settings = dict(settings or {})
        self.results = tuple(results)

    @classmethod
    def of(cls, sparsifier: Sparsifier, weights: Mapping[str, Tensor], **settings: str) -> Ticket:
        """Make a ticket of a sparsifier's masks, as they are after a training, and of early weights.

        Args:
            sparsifier: The sparsifier that has chosen the masks.
            weights: All tensors of its model at an early moment, such as a copy of its `state_dict()`.
            **settings: Further settings to note, in words.

        Raises:
            ValueError: The weights are of another model.
        """
        if found := find_differences(sparsifier.model, weights):
            raise ValueError(f"weights must be those of the sparsifier's model, got some where {'; '.join(found[:5])}")
        noted = {"granularity": repr(sparsifier.granularity), "context": repr(sparsifier.context)}
        noted["criteria"] = sparsifier.criteria.title
        copies = {name: x.detach().to("cpu", copy=True) for name, x in weights.items()}
        return cls(copies, read_units(sparsifier._record), noted | settings)

    # --- training it --------------------------------------------------------------------------------------------------

    def apply(self, model: nn.Module) -> TicketHold:
        """Write the ticket's weights into a model, masked, and return what keeps the masks in a training.

        Args:
            model: A model with tensors of the same names and shapes, wrapped or not; make its optimizer anew, or clear its
                state.

        Returns:
            A participant for `attach(optimizer, ...)` or the `ParticipantCallback(...)` of any framework.

        Raises:
            ValueError: The ticket is of another model. Nothing is changed then.
            TypeError: `model` is no module.
        """
        self._check_fits(model)
        put_back_(model, self.weights)
        hold = TicketHold(model, self.masks, self.sparsity, self.stamp)
        hold.apply_masks()
        follow(model, hold)
        return hold

    def _check_fits(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if found := find_differences(model, self.weights):
            raise ValueError(f"model must be one that the ticket was found for, got one where {'; '.join(found[:5])}")

    # --- what it is held against --------------------------------------------------------------------------------------

    def random(self, seed: int) -> Ticket:
        """Return a ticket of the same weights with random masks: as many units of each target pruned, others.

        Filters stay filters, and coupled channels stay coupled.

        Args:
            seed: The seed of the draw, a whole number of at least 0.
        """
        generator = torch.Generator().manual_seed(check_count("seed", seed, 0))
        units = [one.shuffled(generator) for one in self.units]
        return Ticket(self.weights, units, self.settings | {"masks": f"random, seed {seed}"})

    def reinitialised(self, model: nn.Module) -> Ticket:
        """Return a ticket of the same masks on the weights that a model has now, such as one made with another seed.

        Raises:
            ValueError: The ticket is of another model.
        """
        self._check_fits(model)
        weights = {name: x.cpu() for name, x in take_snapshot(model).items()}
        return Ticket(weights, self.units, self.settings | {"weights": "another model's"})

    def dense(self) -> Ticket:
        """Return a ticket of the same weights that prunes nothing."""
        units = [Units(one.name, torch.ones_like(one.keep), one.places) for one in self.units]
        return Ticket(self.weights, units, self.settings | {"masks": "none"})

    # --- what it has --------------------------------------------------------------------------------------------------

    @property
    def masks(self) -> dict[str, Tensor]:
        """The masks, bool, True = keep, by parameter; biases and norms that fall silent with an output are among them."""
        return masks_of(self.units, {name: tuple(x.shape) for name, x in self.weights.items()})

    @property
    def sparsity(self) -> float:
        """The share of the units that is pruned, in [0, 1]."""
        return sum(one.pruned for one in self.units) / max(1, sum(len(one.keep) for one in self.units))

    @property
    def stamp(self) -> str:
        """A sum of all that it holds; equal for equal tickets."""
        return stamp_of(self._content)

    def _line(self) -> str:
        count, total = sum(one.pruned for one in self.units), sum(len(one.keep) for one in self.units)
        return f"<Ticket: {self.sparsity:.1%} pruned, {count:,} of {total:,} units of {counted(len(self.units), 'target')}>"

    def _parts(self) -> Iterable[Table | str]:
        rows = [(u.name, f"{len(u.keep):,}", f"{u.pruned:,}", f"{u.pruned / len(u.keep):.2%}") for u in self.units]
        total = (sum(len(u.keep) for u in self.units), sum(u.pruned for u in self.units))
        foot = ("all targets", *(f"{n:,}" for n in total), f"{self.sparsity:.2%}")
        yield Table(("target", "units", "pruned", "sparsity"), [*rows, foot], foot=1)
        yield from self._told()

    def _told(self) -> Iterator[str]:
        yield from (f"{name}: {value}" for name, value in self.settings.items())
        if any(result is not None for result in self.results):
            yield "results of the rounds: " + ", ".join("-" if r is None else f"{r:.4g}" for r in self.results)

    @styled()
    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the sparsity of each target."""
        axes = new_axes(6.0, 1.2 + 0.28 * len(self.units)) if ax is None else ax
        axes.barh([one.name for one in self.units], [one.pruned / len(one.keep) for one in self.units], color=SERIES[2])
        axes.invert_yaxis()
        axes.set_xlim(0, 1)
        axes.xaxis.set_major_formatter(as_percent)
        dress(axes, f"Ticket, {self.sparsity:.0%} of the units pruned", grid="x")
        return axes

    # --- its file -----------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Save as one file of safetensors, whole or not at all; a decision takes a bit, and equal tickets are equal bytes.

        Raises:
            OSError: The file cannot be written.
        """
        write_ticket(path, self._content)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Ticket:
        """Load what `save` wrote.

        Raises:
            ValueError: The file is truncated, changed or foreign.
            OSError: It cannot be read.
        """
        return cls(**read_ticket(path))

    @property
    def _content(self) -> dict[str, Any]:
        return {"weights": self.weights, "units": self.units, "settings": self.settings, "results": self.results}
