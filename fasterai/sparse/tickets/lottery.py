"""Lottery tickets: the weights go back to early values each time the masks change."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fasterai.core.checks import check_count, warn
from fasterai.core.loop import Fit, Participant
from fasterai.core.saved import check_parts, finite_tensors, mapping_of, tensor
from fasterai.core.types import Move
from fasterai.display import Shown, Table, brief, settings
from fasterai.model.cuts import Cut, follow, sliced
from fasterai.model.names import plain_name, unwrap
from fasterai.model.snapshots import clear_states_, find_differences, put_back_, take_snapshot
from fasterai.sparse.sparsifier import Sparsifier

__all__ = ["LotteryTicket"]


class LotteryTicket(Shown, Participant):
    """Rewinding of kept weights whenever a sparsifier's masks change (Frankle & Carbin 2019; rewinding: Frankle et al. 2020).

    All parameters and buffers, those of batch norms included, get the values back that they had at `rewind_epoch`. Then the
    masks are applied, and the optimizers' states are cleared. A copy of the model's state is held for it. Use it with schedules
    that change the masks few times (`iterative`, `one_shot`), and put it after the sparsifier in a loop, without which it is
    refused: `attach(optimizer, sparsifier, LotteryTicket(sparsifier), ...)`.

    Args:
        sparsifier: The sparsifier whose masks are followed.
        rewind: Go back at every move. If not, only `reset_end` does.
        rewind_epoch: The epoch whose beginning is gone back to; 0 is the start of the training.
        reset_end: Go back once more when the run has been completed, which leaves the mask on early weights (a supermask).
        save_tickets: A folder to save each ticket in, as `winning_ticket_<sparsity>.pt` with the reached sparsity in [0, 1];
            a plain state dict for `torch.load(path, weights_only=True)`.

    Raises:
        ValueError: `rewind_epoch` is negative.
        TypeError: `sparsifier` is no `Sparsifier`, or `save_tickets` no folder.
    """

    def __init__(
        self,
        sparsifier: Sparsifier,
        *,
        rewind: bool = True,
        rewind_epoch: int = 0,
        reset_end: bool = False,
        save_tickets: str | Path | None = None,
    ) -> None:
        if not isinstance(sparsifier, Sparsifier):
            raise TypeError(f"sparsifier must be a Sparsifier, got {brief(sparsifier)} ({type(sparsifier).__name__})")
        if not isinstance(save_tickets, str | Path | None):
            raise TypeError(
                f"save_tickets must be a folder, got {save_tickets!r}; pass save_tickets='tickets', say, or leave it out"
            )
        self.sparsifier = sparsifier
        self.rewind = rewind
        self.rewind_epoch = check_count("rewind_epoch", rewind_epoch, 0)
        self.reset_end = reset_end
        self.save_tickets = None if save_tickets is None else Path(save_tickets)
        self._saved: dict[str, Tensor] = {}
        self._fit: Fit | None = None
        self._moved = False
        self._moved_at = -2

    def _line(self) -> str:
        when = "at every move of the masks" if self.rewind else "at the end" if self.reset_end else "never"
        return f"<LotteryTicket: rewinds to epoch {self.rewind_epoch} {when}, {self.sparsifier.sparsity.overall:.1%} pruned>"

    def _parts(self) -> Iterator[Table | str]:
        names = ("rewind", "rewind_epoch", "reset_end", "save_tickets")
        yield settings({name: getattr(self, name) for name in names} | {"sparsifier": repr(self.sparsifier)})

    def relies_on(self) -> Iterable[Participant]:
        """Return the sparsifier, whose moves are followed; a return at the end alone needs no more than its masks."""
        only_end = self.reset_end and self.sparsifier.sparsity.overall > 0
        return () if only_end else (self.sparsifier,)

    def on_fit_start(self, fit: Fit) -> None:
        """Note the weights, if `rewind_epoch` is 0; later epochs are noted when they begin.

        Raises:
            ValueError: `rewind_epoch` is not within the run.
        """
        epochs = fit.total_steps / fit.steps_per_epoch if fit.steps_per_epoch else 1
        if self.rewind_epoch and not self.rewind_epoch < epochs:
            raise ValueError(f"rewind_epoch must be below the {epochs:g} epochs of the run, got {self.rewind_epoch}")
        self._fit, self._moved, self._moved_at = fit, False, -2
        self._saved = {}
        follow(self.sparsifier.model, self)
        if self.rewind_epoch == 0:
            self._note()

    def after_move(self, move: Move) -> None:
        """Note that the masks have moved; the weights go back after the step, when the masks have been applied."""
        self._moved = self._moved or self.sparsifier.made(move)

    def after_step(self, position: float) -> None:
        """Rewind if the masks have moved."""
        assert self._fit is not None
        step = round(position * self._fit.total_steps)
        if not self._saved and step >= self.rewind_epoch * (self._fit.steps_per_epoch or 1):
            self._note()
        if not (self._moved and self.rewind):
            return
        self._moved = False
        if step == self._moved_at + 1:
            warn(
                "lth rewinds the weights at every move of the masks, and they moved in two steps in a row, so that nothing "
                "is trained in between: use a schedule with few moves, iterative or one_shot",
            )
        self._moved_at = step
        if self._saved:
            self._rewind()
            if self.save_tickets is not None:
                self.save_tickets.mkdir(parents=True, exist_ok=True)
                self.sparsifier.save_model(self.save_tickets / f"winning_ticket_{self.sparsifier.sparsity.overall:.4f}.pt")

    def on_fit_end(self, completed: bool) -> None:
        """Rewind once more, if `reset_end` asks for it."""
        if completed and self.reset_end and self._saved:
            self._rewind()
        self._fit = None
        if completed:  # an unfinished run's checkpoint may be saved after this
            self._saved = {}

    def after_cut(self, cut: Cut) -> None:
        """Follow the model's parameters, which have got smaller."""
        self._saved = {n: sliced(x, cut, n) for n, x in self._saved.items()}

    def _note(self) -> None:
        self._saved = take_snapshot(self.sparsifier.model)

    def _rewind(self) -> None:
        put_back_(self.sparsifier.model, self._saved)
        self.sparsifier.apply_masks()
        clear_states_(self._fit.optimizers if self._fit else ())

    def state_dict(self) -> dict[str, Any]:
        """Return copies of the noted weights."""
        return {"saved": {n: x.clone() for n, x in self._saved.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load noted weights; the caller's dict is not changed.

        Raises:
            ValueError: They are of another model, or something is missing. Nothing is changed then.
            TypeError: A part of the state is of the wrong type.
        """
        check_parts(state, "LotteryTicket", {"saved": self._check_finite})
        saved = {plain_name(n): x for n, x in state["saved"].items()}  # those of earlier versions have the compiler's names
        if saved and (found := find_differences(self.sparsifier.model, saved)):
            raise ValueError(f"state's saved weights must be of this model, got one where {'; '.join(found[:5])}")
        device = next(iter(self.sparsifier.model.parameters())).device
        self._saved = {n: x.to(device, copy=True) for n, x in saved.items()}

    def _check_finite(self, what: str, value: Any) -> None:
        """Refuse NaN and infinity, but for buffers that no state dict has, such as a mask of attention."""
        persistent = {plain_name(name) for name in unwrap(self.sparsifier.model).state_dict()}
        mapping_of(tensor)(what, value)
        finite_tensors(what, {name: x for name, x in value.items() if plain_name(name) in persistent})
