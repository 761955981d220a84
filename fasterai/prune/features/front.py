"""Modules that select inputs, in front of a small network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fasterai.prune.features.selecting import check_width

if TYPE_CHECKING:
    from fasterai.prune.features.selector import InputSelector

__all__ = ["SelectInputs", "SelectedModel"]

MOST_INPUTS = 4


class SelectInputs(nn.Module):
    """Module that selects features of its input; put it in front of a small network.

    Args:
        selector: The choice of features.
    """

    keep: Tensor

    def __init__(self, selector: InputSelector) -> None:
        super().__init__()
        self.selector = selector
        self.register_buffer("keep", torch.as_tensor(selector.keep))

    def forward(self, x: Tensor) -> Tensor:
        """Select the kept features.

        Raises:
            ValueError: There are more or fewer features than the selector knows.
        """
        check_width(x, self.selector.size, self.selector.dim, len(self.selector.keep))
        return x.index_select(self.selector.dim, self.keep)

    def extra_repr(self) -> str:
        return f"{len(self.selector.keep)} of {self.selector.size}, dim={self.selector.dim}"


class SelectedModel(nn.Module):
    """Network of up to four inputs, of some of which it gets the kept features alone.

    The inputs are named one by one, since an export cannot tell the shapes of a list of any length.

    Args:
        selectors: Position of an input -> its selector.
        model: The small network; shared, not copied.

    Raises:
        ValueError: A position is above 3.
    """

    def __init__(self, selectors: Mapping[int, InputSelector], model: nn.Module) -> None:
        super().__init__()
        if not all(0 <= place < MOST_INPUTS for place in selectors):
            raise ValueError(f"selectors must be of the first {MOST_INPUTS} inputs, got {sorted(selectors)}")
        self.selectors = nn.ModuleDict({str(place): selector.module() for place, selector in selectors.items()})
        self.model = model

    def forward(self, first: Any, second: Any = None, third: Any = None, fourth: Any = None) -> Any:
        """Run the network on the kept features; inputs that are left out are not passed on."""
        given = [first, second, third, fourth]
        while given[-1] is None and len(given) > 1:
            given.pop()
        places = map(str, range(len(given)))
        return self.model(*(self.selectors[i](x) if i in self.selectors else x for i, x in zip(places, given, strict=True)))
