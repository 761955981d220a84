"""One term of a regulariser: a penalty on the units of one granularity, by one criterion."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fasterai.core import criteria as criterion_catalogue
from fasterai.core.checks import entry_or_repr
from fasterai.core.contexts import local
from fasterai.core.criteria import Criterion, large_final
from fasterai.core.granularities import Coupled, Granularity
from fasterai.core.loop import Fit
from fasterai.core.types import Evidence, Target
from fasterai.display import units_word
from fasterai.model.cuts import Cut, follow, sliced
from fasterai.model.targets import LayerTypes, TargetsLike, find_targets
from fasterai.regularize.penalties import Penalty, Sizes
from fasterai.regularize.sizes import Units, scale_units, weight_units
from fasterai.sparse.goal import find_misfit
from fasterai.sparse.record import MaskRecord
from fasterai.units.pool import Pool, WeightScores

__all__ = ["Term", "added"]

Rates = Callable[[nn.Parameter], "float | Tensor | None"]


class Term:
    """A penalty on the units of a model's targets.

    Args:
        model: The model, wrapped or not.
        criterion: The criterion that says how large a weight is.
        granularity: What a unit is.
        penalty: The price of units.
        targets: As for the `Sparsifier`.
        layer_type: As for the `Sparsifier`.

    Attributes:
        record: The targets and their pools, which follow cuts; it makes no masks.

    Raises:
        ValueError: No target is found, or one has no such units.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Criterion,
        granularity: Granularity,
        penalty: Penalty,
        targets: TargetsLike | None,
        layer_type: LayerTypes | None,
    ) -> None:
        self.criterion, self.granularity, self.penalty = criterion, granularity, penalty
        misfit = partial(find_misfit, granularity=granularity, context=local)
        chosen = find_targets(model, fits=misfit, coarse=granularity.is_coarse, targets=targets, layer_type=layer_type)
        self.record = MaskRecord(model, granularity, chosen)
        self.record.check_plain()
        self.initial = self._copies() if "initial" in criterion.needs else {}
        self._units: tuple[Sequence[Pool], list[Units]] | None = None
        follow(model, self)

    def __repr__(self) -> str:
        return f"{self.words} of {units_word(repr(self.granularity))}"

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy or a file has; the units are made anew of its own pools."""
        return {**vars(self), "_units": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy or pickle, which then follows the cuts of its own model."""
        vars(self).update(state)
        follow(self.record.model, self)

    @property
    def words(self) -> str:
        """The criterion and the penalty, in a few words."""
        return f"{type(self.penalty).__name__}({entry_or_repr(self.criterion, criterion_catalogue)})"

    @property
    def title(self) -> str:
        """The title of its picture."""
        return units_word(repr(self.granularity)).capitalize()

    def _copies(self) -> dict[str, Tensor]:
        return {t.name: t.parameter.detach().clone() for t in self.record.targets}

    # --- the units -----------------------------------------------------------------------------------------------------

    @property
    def needs_flow(self) -> bool:
        """True if the model has to be followed with example inputs, which have not been seen."""
        coupled, on_scales = isinstance(self.granularity, Coupled), self.penalty.on_scales
        drops = any(self.granularity.drops_outputs(t.layout) for t in self.record.targets)
        return not self.record.maker.is_seen and (coupled or on_scales or drops)

    def look(self, inputs: tuple[Any, ...]) -> None:
        """Follow the model with example inputs.

        Raises:
            ValueError: The model does not run on them, or there is no unit that may go.
        """
        self.record.look(inputs)
        self._retarget()

    def look_at_batch(self, fit: Fit) -> None:
        """Follow the model with the first batch of a run."""
        self.record.look_at_batch(fit)
        self._retarget()

    def _retarget(self) -> None:
        if "initial" in self.criterion.needs:
            self.initial = {
                **self._copies(),
                **{t.name: self.initial[t.name] for t in self.record.targets if t.name in self.initial},
            }

    def check_seen(self) -> None:
        """Refuse to go on while the units are not known.

        Raises:
            ValueError: Example inputs are needed, or there are no norms behind the units.
        """
        self.record.maker.check_seen()
        if self.penalty.on_scales and not self.units:
            repair = "" if self.record.maker.is_seen else "; pass example_inputs=, which show them"
            raise ValueError(
                f"penalty must find norms with a scale behind the {units_word(repr(self.granularity))}, got none for 'slimming'"
                f"{repair}"
            )

    @property
    def units(self) -> list[Units]:
        """The units of all pools; made once for the pools as they are."""
        if self._units is None or self._units[0] is not self.record.pools:
            made = scale_units if self.penalty.on_scales else weight_units
            self._units = self.record.pools, made(self.record.pools)
        return self._units[1]

    @property
    def training(self) -> list[Units]:
        """The units that train now."""
        return [units for units in self.units if all(parameter.requires_grad for parameter, _, _ in units.places())]

    def after_cut(self, cut: Cut) -> None:
        """Follow the model's parameters, which have got smaller."""
        self.initial = {name: sliced(weight, cut, name) for name, weight in self.initial.items()}
        self._units = None

    # --- what they cost ------------------------------------------------------------------------------------------------

    def _sizes(self, all_units: Sequence[Units]) -> list[Sizes]:
        """Return the sizes of units; what several pools read is worked out once."""
        values, squares = WeightScores(self._size, "sum"), WeightScores(self._square, "sum")
        is_mean = self.criterion.reducer == "mean"
        return [units.sizes(values, squares, is_mean) for units in all_units]

    def _size(self, target: Target) -> Tensor:
        weight = target.parameter
        return self.criterion(Evidence(target.name, weight, initial=self.initial.get(target.name)))

    def _square(self, target: Target) -> Tensor:
        if self.criterion == large_final:
            weight = target.parameter
            return (weight.float() if weight.dtype in (torch.float16, torch.bfloat16) else weight).square()
        return self._size(target).square()

    def value(self) -> Tensor | None:
        """Return the penalty of all units that train, a scalar with its gradient; None if none does."""
        return added([self.penalty(sizes) for sizes in self._sizes(self.training)])

    @torch.no_grad()
    def step_(self, rates: Rates) -> Tensor | None:
        """Take the proximal step of all units at once, from their sizes before it; return the penalty before it.

        With a unit that becomes zero go its bias, and the scale and shift of the norm behind it.

        Args:
            rates: Parameter -> its learning rate times the weight of the penalty; None if the optimizer does not have it.
        """
        found, alive = [], []
        training = self.training
        all_sizes = self._sizes(training)
        for units, sizes in zip(training, all_sizes, strict=True):
            for parameter, view, spread in units.places():
                rate = rates(parameter)
                if rate is not None:
                    step = self.penalty.step(sizes, rate)
                    found.append((view, spread(step, self.penalty.idle).to(view.dtype)))
                    alive.append((units.pool, step))
        value = added([self.penalty(sizes) for sizes in all_sizes])
        for view, step in found:
            self.penalty.apply_(view, step)
        if self.penalty.silences:
            self._silence_(alive)
        return value

    def _silence_(self, steps: Sequence[tuple[Pool, Tensor]]) -> None:
        """Set the bias, and the scale and shift of the norm, of units that a step has made zero to zero, as masks do.

        A norm would put its shift out for a channel of zeros, and what reads it would learn again.
        """
        alive: dict[str, tuple[Pool, Tensor]] = {}
        for pool, step in steps:
            lives = step != 0
            alive[pool.name] = pool, alive[pool.name][1] | lives if pool.name in alive else lives
        for pool, keep in alive.values():
            for name, kept in pool.vectors(keep):
                pool.tensor(name).mul_(kept)

    @torch.no_grad()
    def norms(self) -> list[Tensor]:
        """Return for each pool the root mean square of the sizes of each unit's weights, as a row."""
        return [(sizes.squares() / sizes.count).sqrt().reshape(-1) for sizes in self._sizes(self.units)]

    # --- saving and going on -------------------------------------------------------------------------------------------

    def check_initial(self, initial: Mapping[str, Tensor]) -> None:
        """Refuse remembered weights of another model.

        Raises:
            ValueError: One is missing, or of another shape.
        """
        for name, weight in self.initial.items():
            there = tuple(initial[name].shape) if name in initial else "none"
            if there != tuple(weight.shape):
                raise ValueError(f"state must have the initial weight of {name}, {tuple(weight.shape)}, got {there}")

    def load_initial(self, initial: Mapping[str, Tensor]) -> None:
        """Take remembered weights over, as copies on the parameters' devices."""
        self.initial = {name: initial[name].to(weight.device, copy=True) for name, weight in self.initial.items()}


def added(parts: Sequence[Tensor]) -> Tensor | None:
    """Return the sum of scalars, on the device of the first; None if there are none."""
    return torch.stack([part.to(parts[0].device) for part in parts]).sum() if parts else None
