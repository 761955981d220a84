"""Latent weights: the optimizer trains them, and the model shows others that follow from them.

A forward pass, a validation, a checkpoint and a look at the model meet the shown weights alone. From the moment before the
optimizer's step until the one after it the same parameters hold the latent weights, so that momentum, decay and clipping
are the optimizer's own. What others write into the model between two steps (masks, clipped or loaded weights) is the new latent
weight at the places that it changes. To add a method: a subclass with `show_`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fasterai.core.checks import warn
from fasterai.core.loop import Fit, Participant
from fasterai.core.saved import check_parts, mapping_of, tensor
from fasterai.core.types import Target
from fasterai.model.cuts import Cut, check_trains, note_optimizer, sliced
from fasterai.model.names import unwrap
from fasterai.model.sharded import check_plain

__all__ = ["LatentWeights"]


def _one() -> None:
    """Tell nothing: there is one optimizer."""


class LatentWeights(Participant, ABC):
    """A participant whose targets have latent weights behind those that the model shows.

    A subclass has the attributes `model` and `targets`, calls `super().__init__()`, and says by `show_` how shown weights
    follow from latent ones. The gradient of a shown weight is taken for that of the latent one (straight through), unless
    `pull_` changes it.
    """

    model: nn.Module
    targets: tuple[Target, ...]

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}
        self._opened: dict[str, Target] = {}  # whose parameters hold latent weights at the moment
        self._versions: dict[str, int] = {}  # of the parameters, as they were shown last: another one was written into
        self._begun: list[Target] | None = None  # shown first by this run, as long as it has taken no step
        self._stepping: Callable[[], Any] = _one

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy or pickle has; it is in no run."""
        return {**vars(self), "_stepping": _one}

    # --- what a method says ------------------------------------------------------------------------------------------

    @abstractmethod
    def show_(self, target: Target, weight: Tensor, kept: Tensor | None) -> Tensor:
        """Put the shown weights in the place of the latent ones; called for copies of the weights too.

        Args:
            target: The target.
            weight: Its latent weights; changed in place.
            kept: What was kept after the last step, of the weight's shape, to be written over; None the first time.

        Returns:
            What `restore_` needs to bring the latent weights back, of the weight's shape.
        """

    def restore_(self, target: Target, weight: Tensor, kept: Tensor) -> None:
        """Put the latent weights in the place of the shown ones; by default they are what was kept."""
        weight.copy_(kept)

    def pull_(self, target: Target, gradient: Tensor, kept: Tensor) -> None:
        """Adjust the gradient of a step in place; all accumulated, unscaled, not clipped yet."""

    # --- a run -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def on_fit_start(self, fit: Fit) -> None:
        """Begin a run: the model shows from now on what follows from its weights, or from the latent ones of the last run.

        Raises:
            ValueError: A weight is no plain tensor, another one than the participant was made for, or none is trained.
        """
        check_plain(self.targets)
        self._check_held()
        check_trains(fit.optimizer, (t.parameter for t in self.targets), "the targets of the model", self.targets[0].name)
        note_optimizer(self.model, fit.optimizer)
        self._opened, self._stepping = {}, fit.stepping
        self._kept = {t.name: self._kept[t.name].to(t.parameter) for t in self.targets if t.name in self._kept}
        if self._kept and not self._is_shown():
            warn(f"the model of {self.name} holds other weights than it showed last: its latent weights are forgotten")
            self._kept = {}
        self._begun = []
        try:
            for target in self.targets:
                kept = self._kept.get(target.name)
                if kept is not None:
                    self.restore_(target, target.parameter.detach(), kept)  # what was frozen in the last run may train now
                self._show(target, kept)
                if kept is None:
                    self._begun.append(target)
        except BaseException:
            self._undo()
            raise

    def check_beside(self, other: Participant) -> None:
        """Refuse another method with latent weights of the same parameters.

        Raises:
            ValueError: It has some.
        """
        own = {id(t.parameter) for t in self.targets}
        both = (
            next((t.name for t in other.targets if id(t.parameter) in own), None) if isinstance(other, LatentWeights) else None
        )
        if both is not None:
            raise ValueError(
                f"targets must be others than those of {other.name}, which takes part as well, got {both} in {self.name} too; "
                "name them with targets=, or end the other run"
            )

    def _check_held(self) -> None:
        """Refuse a model some of whose weights are other objects than those that the participant was made for."""
        held = {id(p) for p in unwrap(self.model).parameters()}
        for target in self.targets:
            if id(target.parameter) not in held:
                raise ValueError(
                    f"model must hold the weights that {self.name} was made for, got another {target.name}, or none; make "
                    f"{self.name} anew for the model as it is"
                )

    def _is_shown(self) -> bool:
        """Tell if the model shows what follows from the latent weights."""
        for target in self.targets:
            kept = self._kept.get(target.name)
            if kept is None or kept.shape != target.parameter.shape:
                return False
            latent = target.parameter.detach().clone()
            self.restore_(target, latent, kept)
            if torch.equal(latent, target.parameter):
                continue  # nothing is behind it that could be of other weights
            self.show_(target, latent, None)
            if not torch.equal(latent, target.parameter):
                return False
        return True

    def _show(self, target: Target, kept: Tensor | None) -> None:
        self._kept[target.name] = self.show_(target, target.parameter.detach(), kept)
        self._versions[target.name] = target.parameter._version

    def _take_changes(self) -> None:
        """Let what others have written into shown weights be latent weights, and show what follows from them."""
        for target in self.targets:
            kept, version = self._kept.get(target.name), target.parameter._version
            if kept is not None and target.name not in self._opened and version != self._versions.get(target.name):
                self._take_change(target, kept)

    def _take_change(self, target: Target, kept: Tensor) -> None:
        now = target.parameter.detach()
        latent = now.clone()
        self.restore_(target, latent, kept)
        shown = latent.clone()
        self.show_(target, shown, None)
        if not torch.equal(shown, now):
            now.copy_(torch.where(shown == now, latent, now))
            self._show(target, kept)
        self._versions[target.name] = now._version

    def _here(self) -> list[Target]:
        """List the targets that the optimizer under way trains."""
        optimizer = self._stepping()
        if optimizer is None:
            return list(self.targets)
        trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
        return [t for t in self.targets if id(t.parameter) in trained]

    @torch.no_grad()
    def after_backward(self) -> None:
        """Adjust the gradients as the method says."""
        for target in self._here():
            if target.parameter.grad is not None and target.name in self._kept:
                self.pull_(target, target.parameter.grad, self._kept[target.name])

    @torch.no_grad()
    def before_step(self, position: float) -> None:
        """Hand the latent weights to the optimizer.

        Raises:
            ValueError: It has them already: a closure has computed with them.
        """
        if self._opened:
            self._show_again()
            raise ValueError(
                f"optimizer must call its closure once in a step of {self.name}, whose latent weights no forward pass may see, "
                "got a second call; take one such as SGD or AdamW, or attach(...) in a loop of your own"
            )
        self._begun = None
        self._take_changes()
        for target in self._here():
            if target.parameter.grad is not None:
                self._opened[target.name] = target
                self.restore_(target, target.parameter.detach(), self._kept[target.name])

    def close_step(self) -> None:
        """Show what follows from the latent weights, before another participant looks at the model."""
        self._show_again()

    def after_step(self, position: float) -> None:
        """Show what follows from the latent weights."""
        self._show_again()

    def after_skip(self) -> None:
        """Show the weights of a step that was not taken."""
        self._show_again()

    @torch.no_grad()
    def _show_again(self) -> None:
        while self._opened:
            name, target = self._opened.popitem()
            self._show(target, self._kept[name])

    @torch.no_grad()
    def on_fit_end(self, completed: bool) -> None:
        """End the run; a step that was interrupted is shown as far as it came, and one that never came leaves no trace."""
        self._show_again()
        self._take_changes()
        if not completed:
            self._undo()
        self._begun, self._stepping = None, _one

    def _undo(self) -> None:
        """Put back the weights of before a run that has taken no step."""
        for target in self._begun or ():
            self.restore_(target, target.parameter.detach(), self._kept.pop(target.name))
        self._begun = None

    def after_cut(self, cut: Cut) -> None:
        """Follow the model's parameters, which have got smaller."""
        self._kept = {name: sliced(kept, cut, name) for name, kept in self._kept.items()}

    # --- the latent weights ------------------------------------------------------------------------------------------

    @property
    def latent(self) -> dict[str, Tensor]:
        """Copies of the latent weights: target's name -> tensor of the parameter's shape; empty before the first run."""
        with torch.no_grad():
            self._take_changes()
            return {t.name: self._latent_of(t) for t in self.targets if t.name in self._kept}

    def _latent_of(self, target: Target) -> Tensor:
        weight = target.parameter.detach().clone()
        if target.name not in self._opened:
            self.restore_(target, weight, self._kept[target.name])
        return weight

    def forget_latent(self) -> None:
        """Drop the latent weights; the model keeps those that it shows."""
        self._show_again()
        self._kept, self._begun = {}, None

    def state_dict(self) -> dict[str, Any]:
        """Return the latent weights, as copies by parameter name."""
        return {"latent": self.latent}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over saved latent weights; the model shows from now on what follows from them.

        Raises:
            ValueError: A name is missing, or a shape differs. Nothing is changed then.
        """
        check_parts(state, type(self).__name__, {"latent": mapping_of(tensor)})
        saved = state["latent"]
        here = {t.name: tuple(t.parameter.shape) for t in self.targets}
        there = {name: tuple(x.shape) for name, x in saved.items()}
        if saved and here != there:
            name = next(n for n in {**here, **there} if here.get(n) != there.get(n))
            raise ValueError(
                f"state must hold the weights of the targets, got {name} of shape {there.get(name, 'missing')}, here "
                f"{here.get(name, 'missing')}; make {self.name} for the same model with the same arguments"
            )
        self._opened = {}
        for target in self.targets if saved else ():
            target.parameter.detach().copy_(saved[target.name])
            self._show(target, None)
        self._begun = [] if saved else self._begun
