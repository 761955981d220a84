"""Training with random masks from the first step on: fixed, or with weights that are dropped and grown.

To add a way to grow: a subclass of `FromRandom` with a rule.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fasterai.core.checks import check_choice, check_count, check_fraction, warn
from fasterai.core.criteria import Criterion, Random
from fasterai.core.loop import Fit
from fasterai.core.schedules import OneShot
from fasterai.model.targets import LayerTypes, TargetsLike
from fasterai.sparse.dynamic.restart import Restarting
from fasterai.sparse.goal import Sparsity
from fasterai.sparse.moves import move_masks
from fasterai.units.choice import limits_of
from fasterai.units.evidence import Source
from fasterai.units.rules import DropAndGrow, Falling, Rule, large_gradient, nested
from fasterai.units.scoring import Scorer

__all__ = ["DISTRIBUTIONS", "SET", "FromRandom", "Regrowing", "RigL", "StaticSparse"]

#: Distribution of the weights over the layers -> the context that makes it.
DISTRIBUTIONS = {"erk": "erk", "uniform": "local"}
Share = float | Callable[[float], float]


class FromRandom(Restarting):
    """A sparsifier that begins with random masks; the base of those that train sparse from the first step on.

    A run that finds masks, or weights that are zero, takes these for its first masks, and changes at random as few of them as
    the counts ask for: so a saved network goes on with its own.

    Args:
        model: The model, best with fresh weights: of trained ones a random part is set to zero.
        sparsity: The share of the weights that is pruned from the first step on, in [0, 1]; for `uniform` also a dict of
            names or globs to shares.
        rule: The way in which the masks move.
        distribution: How the weights are divided among the layers: `erk` or `uniform`.
        seed: Of the random masks, at least 0; the global generator is not used.
        targets: Names of parameters, modules or containers, globs, or a predicate; instead of the default.
        layer_type: Module classes whose weights are the targets, instead of the default ones.

    Raises:
        ValueError: An argument is out of range or unknown, or no target is found.
        TypeError: An argument is of the wrong type.
    """

    def __init__(
        self,
        model: nn.Module,
        sparsity: Sparsity,
        *,
        rule: Rule = nested,
        distribution: str = "erk",
        seed: int = 0,
        targets: TargetsLike | None = None,
        layer_type: LayerTypes | None = None,
    ) -> None:
        self.check_settings(sparsity, distribution=distribution, seed=seed)
        self.distribution, self.seed = distribution, seed
        self._dense: dict[str, Tensor] | None = None  # the weights before the first masks, until there is a step
        super().__init__(
            model,
            "weight",
            DISTRIBUTIONS[distribution],
            sparsity=sparsity,
            schedule=OneShot(0.0),
            rule=rule,
            targets=targets,
            layer_type=layer_type,
        )

    @staticmethod
    def check_settings(sparsity: Sparsity, *, distribution: str = "erk", seed: int = 0, **others: Any) -> None:
        """Refuse settings that are wrong for every model.

        Raises:
            ValueError: One is out of range or unknown.
            TypeError: One is of the wrong type.
        """
        check_choice("distribution", distribution, DISTRIBUTIONS)
        check_count("seed", seed, 0)
        if isinstance(sparsity, Mapping) and distribution != "uniform":
            raise ValueError("sparsity must be one number for distribution 'erk', got a dict; pass distribution='uniform'")
        for share in sparsity.values() if isinstance(sparsity, Mapping) else [sparsity]:
            check_fraction("sparsity", share)

    def on_fit_start(self, fit: Fit) -> None:
        """Begin a run with masks: those that there are, or random ones."""
        super().on_fit_start(fit)
        pools = self._record.active
        if self._goal is None or not pools:
            return
        before, weights = self._record.keep, {t.name: t.parameter.detach().clone() for t in self.targets}
        if not before:
            self._record.take_zeros()
        scorer = Scorer(Random(self.seed), self.granularity, Source(), self.targets)
        move_masks(self._record, scorer, self._goal, pools, limits_of(pools), nested)
        self._record.apply_()
        self._dense = None if before else weights

    def before_step(self, position: float) -> None:
        """Note that the optimizer is about to write into the weights."""
        super().before_step(position)
        self._dense = None

    def on_fit_end(self, completed: bool) -> None:
        """End a run; one that did not come to a step, as where another participant refuses it, leaves the weights dense."""
        if self._dense is not None and not completed:
            self._put_back()
        self._dense = None
        super().on_fit_end(completed)

    @torch.no_grad()
    def _put_back(self) -> None:
        """Put back the weights under the first masks, where nobody has written into the weights since."""
        masks = self.masks
        for target in self.targets:
            dense, weight = (self._dense or {})[target.name], target.parameter.detach()
            if torch.equal(weight, dense * masks[target.name]):
                weight.copy_(dense)
        self.reset()

    def _how(self) -> str:
        return f"{self.distribution}, fixed"


class StaticSparse(FromRandom):
    """Training with random masks that stay: what moving masks are held against.

    Args:
        model: The model, best with fresh weights: of trained ones a random part is set to zero.
        sparsity: The share of the weights that is pruned from the first step on, in [0, 1]; for `uniform` also a dict of
            names or globs to shares.
        distribution: How the weights are divided among the layers: `erk` or `uniform`.
        seed: Of the random masks, at least 0; the global generator is not used.
        targets: Names of parameters, modules or containers, globs, or a predicate; instead of the default.
        layer_type: Module classes whose weights are the targets, instead of the default ones.

    Raises:
        ValueError: An argument is out of range or unknown, or no target is found.
        TypeError: An argument is of the wrong type.
    """

    def __init__(
        self,
        model: nn.Module,
        sparsity: Sparsity,
        *,
        distribution: str = "erk",
        seed: int = 0,
        targets: TargetsLike | None = None,
        layer_type: LayerTypes | None = None,
    ) -> None:
        super().__init__(model, sparsity, distribution=distribution, seed=seed, targets=targets, layer_type=layer_type)


class Regrowing(FromRandom):
    """Training in which the smallest kept weights are dropped and others grown; what grows is the subclass's.

    Args:
        model: The model, best with fresh weights: of trained ones a random part is set to zero.
        sparsity: The share of the weights that is pruned at every step, in [0, 1]; for `uniform` also a dict of names or
            globs to shares.
        distribution: How the weights are divided among the layers: `erk` or `uniform`.
        alpha: The share of each layer's kept weights that is exchanged at first, in [0, 1]; it falls to 0 along half a cosine,
            `alpha / 2 * (1 + cos(pi * position / until))`. A function from the position to the share is taken as it is.
        dt: The number of optimizer steps from one move to the next.
        until: The position of the training, in [0, 1], after which the masks stay.
        seed: Of the random masks, at least 0; the global generator is not used.
        targets: Names of parameters, modules or containers, globs, or a predicate; instead of the default.
        layer_type: Module classes whose weights are the targets, instead of the default ones.

    Raises:
        ValueError: An argument is out of range or unknown, or no target is found.
        TypeError: An argument is of the wrong type.
    """

    def __init__(
        self,
        model: nn.Module,
        sparsity: Sparsity,
        *,
        distribution: str = "erk",
        alpha: Share = 0.3,
        dt: int = 100,
        until: float = 0.75,
        seed: int = 0,
        targets: TargetsLike | None = None,
        layer_type: LayerTypes | None = None,
    ) -> None:
        self.check_settings(sparsity, distribution=distribution, seed=seed, alpha=alpha, dt=dt, until=until)
        self.alpha, self.dt, self.until = alpha, dt, until
        rule = DropAndGrow(dt, until, alpha if callable(alpha) else Falling(alpha, until), self._growth(seed))
        super().__init__(
            model, sparsity, rule=rule, distribution=distribution, seed=seed, targets=targets, layer_type=layer_type
        )

    @staticmethod
    def check_settings(
        sparsity: Sparsity,
        *,
        distribution: str = "erk",
        seed: int = 0,
        alpha: Share = 0.3,
        dt: int = 100,
        until: float = 0.75,
        **others: Any,
    ) -> None:
        """Refuse settings that are wrong for every model.

        Raises:
            ValueError: One is out of range or unknown.
            TypeError: One is of the wrong type.
        """
        FromRandom.check_settings(sparsity, distribution=distribution, seed=seed)
        check_count("dt", dt)
        check_fraction("until", until)
        if not callable(alpha):
            check_fraction("alpha", alpha)

    def on_fit_start(self, fit: Fit) -> None:
        """Begin a run; a warning says so if it is too short for a move."""
        super().on_fit_start(fit)
        if self._is_short(fit.total_steps):
            warn(
                f"no weight of {self.name} moves in this run: dt is {self.dt} steps, and masks move up to step "
                f"{int(self.until * fit.total_steps)} of {fit.total_steps}; pass a smaller dt"
            )

    def _is_short(self, total_steps: int) -> bool:
        """Tell if no move falls into a run."""
        return int(self.until * total_steps) < self.dt

    def _warn_of_idleness(self) -> None:
        if not (self._record.active and self._is_short(self._pace.total_steps)):  # of a short run it was said at its start
            super()._warn_of_idleness()

    @abstractmethod
    def _growth(self, seed: int) -> Criterion:
        """Return the criterion that ranks the weights that may grow."""

    def _how(self) -> str:
        return f"{self.distribution}, every {self.dt} steps up to {self.until:.0%}"


class RigL(Regrowing):
    """Rigged lottery: the smallest kept weights are dropped, and those of the largest gradients grown.

    Evci et al. 2020 (arXiv 1911.11134). The gradient is that of the step at which the masks move, in `parameter.grad`: dense,
    since masks are multiplied into weights, and accumulated over all batches of the step. Between moves nothing is computed.
    Grown weights start at zero, and what the optimizer keeps for them too. The arguments are those of `Regrowing`.
    """

    def _growth(self, seed: int) -> Criterion:
        return large_gradient


class SET(Regrowing):
    """Sparse evolutionary training: the smallest kept weights are dropped, and random ones grown.

    Mocanu et al. 2018 (arXiv 1707.04780). What grows is drawn anew at each move from the seed, the step and the target's name:
    the same in all processes, and after a run was resumed. The arguments are those of `Regrowing`.
    """

    def _growth(self, seed: int) -> Criterion:
        return Random(seed)
