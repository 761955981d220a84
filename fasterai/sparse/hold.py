"""L3. Keeping masks in later training."""

from __future__ import annotations

from collections.abc import Callable

from fasterai.core.loop import Participant

__all__ = ["Hold"]


class Hold(Participant):
    """A participant that applies masks after every step and does nothing else."""

    def __init__(self, apply_masks: Callable[[], None]) -> None:
        self.apply_masks = apply_masks

    def after_step(self, position: float) -> None:
        """Apply the masks."""
        self.apply_masks()

    def on_fit_end(self, completed: bool) -> None:
        """Apply the masks once more, in case a step was interrupted."""
        self.apply_masks()
