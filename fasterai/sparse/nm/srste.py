"""`SRSTE` and `STE`: networks N:M sparse from the first step, by straight-through gradients, with a decay or without."""

from __future__ import annotations

from typing import Any

from torch import nn

from fasterai.model.targets import LayerTypes, TargetsLike
from fasterai.sparse.nm.layers import Skip
from fasterai.sparse.nm.training import NMTraining, ScheduleLike, read_settings

__all__ = ["SRSTE", "STE"]


class SRSTE(NMTraining):
    """N:M training with sparse-refined straight-through gradients: `W <- W - lr (g(E * W) + decay (1 - E) * W)`.

    E is the mask of the N largest magnitudes of every M neighbouring inputs, for each output and kernel position, chosen anew
    after every step. The model shows E * W; the optimizer steps with all of W. Its gradient is that of the shown weights, and
    the decay of the others is part of it, so that both go through clipping and momentum. Zhou et al. 2021 (arXiv 2102.04010),
    whose decay is 2e-4; there a weight decay of the optimizer comes in addition, for all weights.

    Args:
        model: The model, wrapped or not. From the run's start its weights are N:M sparse between all steps.
        n: The number of weights that are kept in a group, from 1 to m.
        m: The number of neighbouring inputs in a group.
        decay: The decay of the weights that are not shown, at least 0.
        targets: Names of parameters, modules or containers, globs, or a predicate (name, parameter), as attention and recurrent
            weights need; by default the weights of Linear layers and convolutions that have m inputs at least.
        skip: True to leave layers dense whose inputs are not a multiple of m, or names and globs of layers to leave dense.
        layer_type: Module classes whose weights are the targets, instead of the default ones.
        schedule: The share of the way from m kept weights to n at each position, so that their number falls over the run; by
            default it is n from the beginning.
        looks: How often in a run flips of the masks are counted, for `sad`; 0 for not at all, which saves a byte a weight.

    Raises:
        ValueError: An argument is out of range, a layer's inputs are not a multiple of m, or no target is found.
        TypeError: An argument is of the wrong type.
    """

    def __init__(
        self,
        model: nn.Module,
        n: int = 2,
        m: int = 4,
        decay: float = 2e-4,
        *,
        targets: TargetsLike | None = None,
        skip: Skip = False,
        layer_type: LayerTypes | None = None,
        schedule: ScheduleLike = None,
        looks: int = 50,
    ) -> None:
        super().__init__(model, n, m, decay, targets=targets, skip=skip, layer_type=layer_type, schedule=schedule, looks=looks)

    @staticmethod
    def check_settings(n: int, m: int, decay: float, schedule: ScheduleLike, looks: int, **_: Any) -> None:
        """Refuse settings that no model makes right.

        Raises:
            ValueError: One is out of range or unknown.
            TypeError: One is of the wrong type.
        """
        read_settings(n, m, decay, schedule, looks)


class STE(NMTraining):
    """N:M training with plain straight-through gradients, `W <- W - lr g(E * W)`: `SRSTE` without decay.

    Args:
        model: As for `SRSTE`, and so are all others.
        n: The number of weights that are kept in a group.
        m: The number of neighbouring inputs in a group.
        targets: What is grouped.
        skip: What is left dense.
        layer_type: Module classes whose weights are the targets.
        schedule: The way from m kept weights to n.
        looks: How often in a run flips of the masks are counted.

    Raises:
        ValueError: An argument is out of range, a layer's inputs are not a multiple of m, or no target is found.
        TypeError: An argument is of the wrong type.
    """

    def __init__(
        self,
        model: nn.Module,
        n: int = 2,
        m: int = 4,
        *,
        targets: TargetsLike | None = None,
        skip: Skip = False,
        layer_type: LayerTypes | None = None,
        schedule: ScheduleLike = None,
        looks: int = 50,
    ) -> None:
        super().__init__(model, n, m, 0.0, targets=targets, skip=skip, layer_type=layer_type, schedule=schedule, looks=looks)

    @staticmethod
    def check_settings(n: int, m: int, schedule: ScheduleLike, looks: int, **_: Any) -> None:
        """Refuse settings that no model makes right.

        Raises:
            ValueError: One is out of range or unknown.
            TypeError: One is of the wrong type.
        """
        read_settings(n, m, 0.0, schedule, looks)
