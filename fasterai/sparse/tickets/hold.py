"""Keeping a ticket's masks in a training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from fasterai.core.loop import Fit, Participant
from fasterai.core.saved import check_parts, text
from fasterai.display import counted
from fasterai.model.cuts import Cut, check_trains, follow, note_optimizer, sliced
from fasterai.model.masks import apply_masks_, like
from fasterai.model.names import unwrap, walk_parameters
from fasterai.sparse.doubts import tell_of_averages

__all__ = ["TicketHold"]


class TicketHold(Participant):
    """A participant that keeps a ticket's masks in a model, after every step.

    Args:
        model: The model, wrapped or not.
        masks: The masks of its parameters by name, bool, True = keep.
        sparsity: The share of the ticket's units that they prune, for the loop's figures.
        stamp: The ticket's stamp, by which a saved state is told from one of another ticket.
    """

    def __init__(self, model: nn.Module, masks: Mapping[str, Tensor], sparsity: float, stamp: str) -> None:
        self.model = model
        self.sparsity = sparsity
        self._stamp = stamp
        self._masks = {name: like(p, masks[name].to(p.device)) for name, p in self._masked(masks)}

    def __repr__(self) -> str:
        return f"<TicketHold: {self.sparsity:.1%} pruned in {counted(len(self._masks), 'parameter')}>"

    def _masked(self, masks: Mapping[str, Tensor]) -> Iterator[tuple[str, nn.Parameter]]:
        for name, _, _, parameter in walk_parameters(unwrap(self.model)):
            if name in masks:
                yield name, parameter

    @property
    def masks(self) -> dict[str, Tensor]:
        """Copies of the masks, by parameter."""
        return {name: mask.clone() for name, mask in self._masks.items()}

    def apply_masks(self) -> None:
        """Set all masked weights to zero."""
        apply_masks_([(p.detach(), self._on_device(name, p)) for name, p in self._masked(self._masks)])

    def _on_device(self, name: str, parameter: Tensor) -> Tensor:
        if self._masks[name].device != parameter.device:
            self._masks[name] = self._masks[name].to(parameter.device)
        return self._masks[name]

    def on_fit_start(self, fit: Fit) -> None:
        """Take up a run.

        Raises:
            ValueError: The run trains another model.
        """
        parameters = [p for _, p in self._masked(self._masks)]
        check_trains(fit.optimizer, parameters, "the ticket's model", "its masked parameters")
        note_optimizer(self.model, fit.optimizer)
        tell_of_averages(fit)
        self.apply_masks()

    def after_step(self, position: float) -> None:
        """Apply the masks."""
        self.apply_masks()

    def on_fit_end(self, completed: bool) -> None:
        """Apply the masks once more, in case a step was interrupted."""
        self.apply_masks()

    def after_cut(self, cut: Cut) -> None:
        """Follow the model's parameters, which have got smaller."""
        self._masks = {name: sliced(mask, cut, name) for name, mask in self._masks.items()}

    def metrics(self) -> dict[str, float]:
        """Return the share of the ticket's units that is pruned, in [0, 1]."""
        return {"sparsity": self.sparsity}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy or pickle, which then follows the cuts of its own model."""
        self.__dict__.update(state)
        follow(self.model, self)

    def state_dict(self) -> dict[str, Any]:
        """Return the ticket's stamp; the masks are the ticket's, and the weights those of the model's checkpoint."""
        return {"ticket": self._stamp}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Check that a saved state is of the same ticket.

        Raises:
            ValueError: It is of another one.
        """
        check_parts(state, "TicketHold", {"ticket": text})
        if state["ticket"] != self._stamp:
            raise ValueError(
                "state's ticket must be the one that is held, got another one; load the ticket that the run began with, and "
                "apply it to the model before the checkpoint's weights"
            )
