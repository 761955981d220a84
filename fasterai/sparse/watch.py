"""A look at a few masked weights while a model trains on after a run, so that zeros are not filled without a word.

The look hangs on the parameters' gradients: it costs nothing but in a backward pass, knows no framework and no optimizer, and
is neither copied nor pickled with the model, nor seen by exports.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from fasterai.core.checks import warn
from fasterai.core.loop import Fit

__all__ = ["Watch"]

SAMPLES = 1024  # places of a tensor that are looked for masks
LOOKS = (1, *(1 + 2**n for n in range(9)))  # the backward passes that are looked at: 1, 2, 3, 5, 9 ... 257
GOLDEN = 0.6180339887498949


class Watch:
    """The looks at one record's masks: none while a run holds them.

    Copies and pickles of it are new: what they belong to is another model.
    """

    def __init__(self) -> None:
        self._look: Look | None = None
        self._of: object = None  # the decisions that are, or were, looked at
        self._is_held = False
        self._is_search: Callable[[], bool] = _never

    def __reduce__(self) -> tuple[type[Watch], tuple[()]]:
        return Watch, ()

    def take_up(self, fit: Fit) -> None:
        """Note that a run holds the masks from now on."""
        self.end()
        self._is_held, self._is_search = True, fit.is_search

    @property
    def is_held(self) -> bool:
        """True while a run holds the masks."""
        return self._is_held

    def let_go(self) -> None:
        """Note that nothing holds the masks any more."""
        self._is_held = False

    def begin(self, decisions: object, masked: Callable[[], Iterable[tuple[str, Tensor, Tensor]]]) -> None:
        """Look at the next backward passes, unless a run holds the masks or the same decisions were looked at.

        Args:
            decisions: The object that is another one when masks have moved.
            masked: Yields (name, parameter, mask) of what is zero now.
        """
        if not self._is_held and self._of is not decisions:
            self.end()
            self._look, self._of = Look(masked(), self._is_search), decisions

    def end(self, of: object = None) -> None:
        """Stop looking; for good, while the decisions are those that are given."""
        if self._look is not None:
            self._look.end()
        self._look, self._of = None, of


class Look:
    """A look at masked weights after some of the next backward passes, which ends by itself.

    A weight that is not zero at the first of them was loaded since, and is none that was trained: then nothing is said.

    Args:
        masked: (name, parameter, mask) of what is zero now; the mask is bool, True = keep, one for each weight in their order.
        is_search: A function that tells if what trains now is put back afterwards, as in a search for a learning rate.
    """

    def __init__(self, masked: Iterable[tuple[str, Tensor, Tensor]], is_search: Callable[[], bool]) -> None:
        self._is_search = is_search
        self._spots: list[_Spot] = []
        for name, parameter, mask in masked:
            at = _places(parameter, mask) if parameter.requires_grad and parameter.is_leaf else ()
            if at:
                self._spots.append(_Spot(self, name, parameter, at))

    def tell(self, name: str, filled: int, places: int) -> bool:
        """Warn that masked weights of a parameter train, and end; or return False, since it is in a search."""
        if self._is_search():
            return False
        self.end()
        warn(
            f"the model trains on, and its pruned weights come back: {filled} of {places} masked weights of {name} that were "
            "looked at are not zero any more, since nothing holds the masks. To keep them, call sparsifier.apply_masks() and "
            "pass HoldCallback(sparsifier) to the fit, or in a loop of your own call sparsifier.hold(optimizer); "
            "sparsifier.finalize() before the training says that they may come back"
        )
        return True

    def end(self) -> None:
        """Stop looking."""
        for spot in self._spots:
            spot.remove()
        self._spots = []


class _Spot:
    """A few masked places of one parameter."""

    def __init__(self, look: Look, name: str, parameter: Tensor, at: tuple[Tensor, ...]) -> None:
        self._look, self._name, self._at = look, name, at
        self._shape = parameter.shape
        self._passes = 0
        self._handle: Any = parameter.register_post_accumulate_grad_hook(self)  # type: ignore[no-untyped-call]

    def remove(self) -> None:
        self._handle.remove()

    def __call__(self, parameter: Tensor) -> None:
        self._passes += 1
        if self._passes not in LOOKS:
            return
        was_cut = parameter.shape != self._shape
        filled = 0 if was_cut else int(torch.count_nonzero(parameter.detach()[self._at]))
        if was_cut or self._passes == LOOKS[-1] or (filled and self._passes == 1):
            self.remove()
        elif filled and not self._look.tell(self._name, filled, len(self._at[0])):
            self._passes = 1  # the search puts the weights back, and then it begins anew


def _never() -> bool:
    return False


def _places(parameter: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    """Find masked places of a tensor among many that lie evenly, one index for each dimension; empty if there are none."""
    count = parameter.numel()
    flat = torch.arange(count) if count <= SAMPLES else (torch.arange(SAMPLES, dtype=torch.float64) * GOLDEN % 1 * count).long()
    masked = flat[~mask[torch.unravel_index(flat, mask.shape)].cpu()]
    return torch.unravel_index(masked, parameter.shape) if len(masked) else ()
