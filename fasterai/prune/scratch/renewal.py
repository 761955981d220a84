"""New random weights for a whole network, each layer's by its own rule."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn

from fasterai.model.running import undisturbed

__all__ = ["Reset", "check_renews", "renewed"]

#: A function that sets the weights of a network.
Reset = Callable[[nn.Module], object]
#: What modules of torch call the method that sets their own.
METHODS = ("reset_parameters", "_reset_parameters")


def renewed(model: nn.Module, reset: Reset | None, seed: int) -> nn.Module:
    """Draw all weights of a network anew, and return it; norms forget their statistics.

    Each module's own `reset_parameters` is called, those inside first, and then `reset`. The weights are NaN before, so that
    one which neither has set is found. Buffers that no module sets anew are unchanged.

    Args:
        model: The network; changed in place.
        reset: A function of the network that sets weights as its maker does.
        seed: The seed of the weights; the generators of torch are put back.

    Raises:
        ValueError: A parameter was not set anew.
    """
    with torch.no_grad(), undisturbed(model):
        torch.manual_seed(seed)
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
        for module in reversed(list(model.modules())):
            own = next((method for name in METHODS if callable(method := getattr(module, name, None))), None)
            if own is not None:
                own()
        if reset is not None:
            reset(model)
    left = [name for name, parameter in model.named_parameters() if bool(parameter.isnan().any())]
    if left:
        more = f" and {len(left) - 3} more" if len(left) > 3 else ""
        raise ValueError(
            f"reset must set every weight that no module's reset_parameters sets, got {', '.join(left[:3])}{more} left; pass "
            "reset=, a function of the network"
        )
    return model


def check_renews(model: nn.Module) -> nn.Module:
    """Return the model if all of its weights train, so that new ones can be trained.

    Raises:
        ValueError: A parameter is frozen.
    """
    frozen = next(_frozen(model), None)
    if frozen is not None:
        raise ValueError(
            f"model must train as a whole, got {frozen}, which is frozen and would stay at random values; "
            "call requires_grad_(True)"
        )
    return model


def _frozen(model: nn.Module) -> Iterator[str]:
    return (name for name, parameter in model.named_parameters() if not parameter.requires_grad)
