"""SAD: the number of mask places that flip between two moments, noted over a training without waiting for a device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fasterai.core.saved import Check, counts, mapping_of, tensor, whole

__all__ = ["PARTS", "FlipNotes"]

#: The parts of a saved state.
PARTS: Mapping[str, Check] = {"steps": counts, "flips": mapping_of(tensor), "before": mapping_of(tensor), "looks_done": whole}


class FlipNotes:
    """Notes of how many places of each mask have flipped between looks at them.

    A look compares masks with those of the last look; its counts stay on the masks' device until they are read.

    Attributes:
        looks: The number of looks in a run, evenly spread; 0 for none.
        steps: The steps done at each look, over all runs.
    """

    def __init__(self, looks: int) -> None:
        self.looks = looks
        self.steps: list[int] = []
        self._flips: dict[str, list[Tensor]] = {}
        self._before: dict[str, Tensor] = {}
        self._done = 0

    def begin(self, masks: Mapping[str, Tensor]) -> None:
        """Begin a run; masks of other shapes than before are looked at anew."""
        self._done = 0
        if {n: k.shape for n, k in masks.items()} != {n: k.shape for n, k in self._before.items()}:
            self._before = _copies(masks) if self.looks else {}

    def see(self, position: float, step: int, masks: Mapping[str, Tensor]) -> None:
        """Look at the masks if it is time."""
        due = int(position * self.looks + 1e-9)
        if due <= self._done:
            return
        self._done = due
        for name, mask in masks.items():
            flips = _differing(self._before.get(name), mask)
            self._flips.setdefault(name, []).append(flips)
        self.steps.append(step)
        self._before = _copies(masks)

    def forget_masks(self) -> None:
        """Begin anew with the next look, since the masks are of other shapes."""
        self._before = {}

    def read(self) -> dict[str, list[int]]:
        """Return the flips of each target at each look."""
        return {name: _together(found).tolist() for name, found in self._flips.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return what was noted, as copies."""
        flips = {name: _together(found) for name, found in self._flips.items()}
        return {"steps": list(self.steps), "flips": flips, "before": _copies(self._before), "looks_done": self._done}

    def load_state_dict(self, state: Mapping[str, Any], like: Mapping[str, Tensor]) -> None:
        """Go on from a saved state; masks go to the devices of the present ones."""
        self.steps, self._done = list(state["steps"]), state["looks_done"]
        self._flips = {name: list(found.clone().unbind()) for name, found in state["flips"].items()}
        self._before = {n: k.to(like[n].device if n in like else k.device, copy=True) for n, k in state["before"].items()}


def _differing(before: Tensor | None, mask: Tensor) -> Tensor:
    if before is None or before.shape != mask.shape:
        return torch.zeros((), dtype=torch.int64, device=mask.device)
    return torch.count_nonzero(torch.ne(before.to(mask.device), mask))


def _together(found: list[Tensor]) -> Tensor:
    return torch.stack([x.cpu() for x in found])


def _copies(masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: mask.clone() for name, mask in masks.items()}
