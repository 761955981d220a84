"""Masks that a model keeps: applied now and in later training, counted, reported and saved with the weights."""

from __future__ import annotations

import os
from abc import ABC
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from fasterai.core.files import write_saved
from fasterai.core.loop import Participant
from fasterai.core.types import Move, Target
from fasterai.display import Shown, Table
from fasterai.model.cuts import note_optimizer
from fasterai.model.masks import apply_masks_
from fasterai.model.names import unwrap, walk_tensors
from fasterai.sparse.counting import count_reached, write_report
from fasterai.sparse.doubts import AFTERWARDS, warn_of_filled, warn_without_masks
from fasterai.sparse.hold import Hold
from fasterai.sparse.record import MaskRecord
from fasterai.sparse.report import Reached, SparsityReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Masked"]


class Masked(Shown, Participant, ABC):
    """The masks of a model, with all that can be done with them; subclasses choose the masks."""

    _record: MaskRecord
    _holds: list[Any]

    @property
    def model(self) -> nn.Module:
        """The model, wrapped or not."""
        return self._record.model

    @model.setter
    def model(self, model: nn.Module) -> None:
        self._record.model = model

    @property
    def targets(self) -> tuple[Target, ...]:
        """The targets, frozen ones included."""
        return self._record.targets

    def check_seen(self) -> None:
        """Refuse to go on while the units are not known, as coupled channels are not before example inputs are given.

        Raises:
            ValueError: They are not; the message names the repair.
        """
        self._record.maker.check_seen()

    @property
    def moves(self) -> int:
        """The number of times that the masks have changed so far."""
        return self._record.moves

    def made(self, move: Move) -> bool:
        """Tell if an announced change of masks is one of these masks."""
        return all(self._record.keep.get(name) is keep for name, keep in move.after.items())

    def apply_masks(self, model: nn.Module | None = None) -> None:
        """Set all masked weights to zero, and with removed outputs their biases and their norms' scales and shifts.

        Args:
            model: A copy of the model to do it in instead, such as a moving average of its weights (`AveragedModel`).

        Raises:
            ValueError: The copy lacks a masked parameter, or has it in another shape. Nothing is changed then.
        """
        if model is not None:
            apply_to_copy_(self._record, model)
            return
        self._record.apply_()
        self._record.look_on()

    def mask_zeros(self) -> None:
        """Take the units that are all zero for pruned: the masks of a sparse model whose weights alone were saved.

        Weights that are zero for another reason are masked too, such as those of a layer that begins with zeros. No weight
        is changed now; where the masks are held, the bias, scale and shift of a zero filter become zero with it.

        Raises:
            ValueError: A weight has been sharded, or is no plain tensor, or the units are not known without example inputs.
        """
        self._record.check_plain()
        self._record.maker.check_seen()
        self._record.forget_stale()
        self._record.take_zeros()
        self._record.look_on()

    def look_back(self) -> None:
        """Warn if masked weights are not zero any more."""
        warn_of_filled(self._record, AFTERWARDS)

    def hold(self, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """Keep the masks in later training; where there are none a warning says so.

        Args:
            optimizer: A torch optimizer; after each of its steps the masks are applied.

        Returns:
            A handle whose `remove()` ends it; without an optimizer, a participant for the callback of any training loop.

        Raises:
            TypeError: `optimizer` is none of torch's.
            ValueError: A weight has been sharded, or is no plain tensor.
        """
        self._record.check_plain()
        if optimizer is None:
            return Hold(self._record)
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(
                f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}; in fastai and Lightning pass "
                "HoldCallback(sparsifier) as a callback"
            )
        warn_without_masks(self._record)
        note_optimizer(self.model, optimizer)
        self._record.watch.end()
        handle = optimizer.register_step_post_hook(torch.compiler.disable(self._hold_after_step))  # type: ignore[no-untyped-call]
        self._holds.append(handle)
        return handle

    def _hold_after_step(self, *_: Any) -> None:
        self._record.apply_()

    def _end_holds(self) -> None:
        """End all holds; zeros stay in the weights, and values noted for outputs that might return are dropped."""
        self.apply_masks()
        for handle in self._holds:
            handle.remove()
        self._holds, self._record.noted = [], {}
        self._record.watch.end(of=self._record.keep)

    @property
    def masks(self) -> dict[str, Tensor]:
        """The masks: target name -> bool tensor of the parameter's shape, True = keep; all True before the first choice."""
        return self._record.masks()

    @property
    def sparsity(self) -> Reached:
        """The sparsity that is reached, per target and overall, counted from the masks."""
        return count_reached(self._record)

    def _parts(self) -> Iterable[Table | str]:
        return self.report()._parts()

    def report(self) -> SparsityReport:
        """Return a report of the sparsity of each target, and of the targets left out with the reasons."""
        return write_report(self._record)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the sparsity of each target."""
        return self.report().plot(ax)

    def print_sparsity(self) -> None:
        """Print the report."""
        print(self.report())  # noqa: T201 - what it is for

    def save_model(self, path: str | os.PathLike[str], model: nn.Module | None = None) -> None:
        """Save the weights, masked, as a plain state dict for `torch.load(path, weights_only=True)`; whole or not at all.

        Args:
            path: The file.
            model: A copy of the model to mask and save instead, as for `apply_masks`.

        Raises:
            ValueError: The copy lacks a masked parameter, or has it in another shape. Nothing is changed or written then.
            OSError: The file cannot be written.
        """
        saved = unwrap(self.model if model is None else model)
        self.apply_masks(None if saved is unwrap(self.model) else saved)
        write_saved(path, saved.state_dict())

    def metrics(self) -> dict[str, float]:
        """Return the share of units that are pruned now, in [0, 1]."""
        return {"sparsity": self.sparsity.overall}


def apply_to_copy_(record: MaskRecord, copy: nn.Module) -> None:
    """Set the masked weights of a copy of the model to zero, found there by their names.

    Raises:
        ValueError: One is missing there, or of another shape. Nothing is changed then.
    """
    inner = copy.module if isinstance(copy, AveragedModel) else copy
    theirs = {name: tensor for name, _, _, tensor in walk_tensors(unwrap(inner))}
    pairs = []
    for name, parameter, mask in record.masked():
        there = tuple(theirs[name].shape) if name in theirs else "missing"
        if there != (here := tuple(parameter.shape)):
            raise ValueError(f"model must be a copy of the sparsifier's, got one where {name} is {there}, here {here}")
        pairs.append((theirs[name].detach().view(mask.shape), mask.to(theirs[name].device)))
    apply_masks_(pairs)
