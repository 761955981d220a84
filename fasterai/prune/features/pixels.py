"""Mask over the pixels of images, learned in front of a network: which pixels a convolutional network can do without.

A convolution has the same weights at all places, so that no pixel has weights of its own that could go: a mask makes the
network no smaller. It says which pixels matter, and images may be stored without the others. Ours; the abstract of the paper on
induced features (Hubens et al. 2023, arXiv 2303.10999), which is all that we have read of it, does not treat pixels there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from fasterai.core.checks import check_count
from fasterai.core.criteria import Criterion
from fasterai.core.loop import Participant
from fasterai.core.schedules import Schedule
from fasterai.display import one_line
from fasterai.prune.features.picture import draw_pixels
from fasterai.prune.features.selector import InputSelector
from fasterai.sparse.sparsifier import Sparsifier

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["GatePenalty", "PixelMask"]


class PixelMask(nn.Module):
    """Factor for each pixel of an image, trained with the network, and zero for the pixels that are given up.

    The factors are all 1 at first. `participants` prunes them while a loop trains: an L1 penalty draws them to zero, against
    which the loss holds those that it needs; the lowest are set to zero by a schedule, an exact share of them at the end.

    Args:
        height: The height of the images.
        width: Their width.

    Attributes:
        gates: The factors, `(H, W)`.

    Raises:
        TypeError: A side is no whole number.
        ValueError: A side is below 1.
    """

    def __init__(self, height: int, width: int) -> None:
        super().__init__()
        self.gates = nn.Parameter(torch.ones(check_count("height", height), check_count("width", width)))

    def forward(self, x: Tensor) -> Tensor:
        """Multiply images `(B, C, H, W)` by the factors.

        Raises:
            ValueError: They are of another size.
        """
        if x.shape[-2:] != self.gates.shape:
            wanted = "x".join(map(str, self.gates.shape))
            raise ValueError(f"x must be images of {wanted} pixels, got the shape {tuple(x.shape)}")
        return x * self.gates

    def extra_repr(self) -> str:
        kept, sides = int(self.keep.sum()), "x".join(map(str, self.gates.shape))
        return one_line(f"{sides}, {kept:,} of {self.gates.numel():,} pixels kept")

    def in_front(self, model: nn.Module) -> nn.Sequential:
        """Return a network that masks images and gives them to a model; both are shared, and trained together."""
        return nn.Sequential(self, model)

    def participants(
        self,
        sparsity: float,
        schedule: Schedule | Callable[[float], float] | str = "one_cycle",
        criteria: Criterion | Callable[[Tensor], Tensor] | str = "large_final",
        *,
        penalty: float = 1e-3,
    ) -> tuple[Participant, ...]:
        """Return what prunes the pixels while a loop trains: `attach(optimizer, *mask.participants(0.75), total_steps=...)`.

        Args:
            sparsity: The share of the pixels to give up, in [0, 1]; reached exactly.
            schedule: The share of that at each position of the training.
            criteria: How much a factor matters.
            penalty: The weight of the sum of the factors' sizes in the loss; 0 for none.

        Raises:
            TypeError: An argument is of the wrong type.
            ValueError: An argument is out of range or unknown.
        """
        options: dict[str, Any] = {"sparsity": sparsity, "schedule": schedule, "targets": "gates"}
        return (Sparsifier(self, "weight", "local", criteria, **options), GatePenalty(self, penalty))

    @property
    def keep(self) -> Tensor:
        """Flags of the pixels that are kept, `(H, W)`."""
        return self.gates.detach() != 0

    @property
    def selector(self) -> InputSelector:
        """The choice of pixels, of images that are flattened to `(B, C, H * W)`.

        Raises:
            ValueError: No pixel is kept.
        """
        return InputSelector(self.keep.flatten().cpu().numpy(), self.gates.numel(), dim=2)  # type: ignore[arg-type]

    def pack(self, images: Tensor) -> Tensor:
        """Return the kept pixels alone, `(B, C, K)`, as images may be stored.

        Raises:
            ValueError: The images are of another size.
        """
        packed: Tensor = self.selector.transform(images.flatten(2))
        return packed

    def unpack(self, packed: Tensor) -> Tensor:
        """Put stored pixels back to their places, `(B, C, H, W)`, with zeros at the others; the masked network sees the same.

        Raises:
            ValueError: There are more or fewer pixels than are kept.
        """
        whole: Tensor = self.selector.inverse_transform(packed)
        return whole.reshape(*whole.shape[:2], *self.gates.shape)

    def plot(self, images: Tensor) -> Figure:
        """Draw the kept pixels as a heat map over the mean of images `(B, C, H, W)`."""
        mean = images.detach().float().mean((0, 1)).cpu().numpy()
        keep = self.keep.cpu().numpy()
        title = f"{keep.mean():.0%} of the pixels kept, by a mask in front"
        return draw_pixels(self.gates.detach().abs().cpu().numpy(), keep.astype(np.float64), mean, title)


class GatePenalty(Participant):
    """Penalty on the sizes of a mask's factors (L1), added to their gradients.

    Args:
        mask: The mask.
        penalty: Its weight in the loss, at least 0.

    Raises:
        TypeError: `penalty` is no number.
        ValueError: It is negative, or not finite.
    """

    def __init__(self, mask: PixelMask, penalty: float = 1e-3) -> None:
        if isinstance(penalty, bool) or not isinstance(penalty, int | float):
            raise TypeError(f"penalty must be a number of at least 0, got {penalty!r} ({type(penalty).__name__})")
        if not 0 <= penalty < float("inf"):
            raise ValueError(f"penalty must be a number of at least 0, got {penalty!r}")
        self.mask, self.penalty = mask, float(penalty)

    def after_backward(self) -> None:
        """Add the penalty's gradient: its weight times the sign of each factor."""
        gates = self.mask.gates
        if gates.grad is not None:
            gates.grad.add_(gates.detach().sign(), alpha=self.penalty)
