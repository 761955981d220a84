"""The regulariser: a penalty on units while a model trains, in the loss, the gradient, or a step after the optimizer's.

Over 300 lines, since one class answers to the events of a run in three ways, shows its effect, and is resumed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fasterai.core.batch import Batch, Fit
from fasterai.core.checks import check_fraction, warn
from fasterai.core.criteria import Criterion
from fasterai.core.granularities import Granularity
from fasterai.core.participant import Participant
from fasterai.core.saved import (
    check_parts,
    finite_tensors,
    list_of,
    settings_in_words,
    tensor,
    warn_of_settings,
    whole,
)
from fasterai.core.schedules import Schedule
from fasterai.display import Shown, Table, counted, new_axes, settings
from fasterai.model.cuts import check_trains, note_optimizer
from fasterai.model.inputs import positional
from fasterai.model.targets import LayerTypes, TargetsLike
from fasterai.regularize.effect import COLUMNS, NOTES, draw, note
from fasterai.regularize.penalties import Penalty
from fasterai.regularize.settings import read_settings
from fasterai.regularize.term import Term, added
from fasterai.sparse.goal import check_sources

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Regularizer"]

FORMAT = 1
CriteriaLike = Criterion | Callable[[Tensor], Tensor] | str


class Regularizer(Shown, Participant):
    """A penalty on the units of a model while it trains, which drives units as a whole to zero.

    Nothing is added to the model, and the loss of validation is the task's alone. `remove(model, inputs)` then removes the
    channels that have gone silent, without any further choice.

    Args:
        model: The model, wrapped or not; changed only by the training, and by the step of `how="proximal"`.
        criteria: How large a weight is: a criterion, its name, or a function of the weight; or a list of some. It needs a
            gradient, and no score below 0.
        granularity: What a unit is, or its name; or a list of some. The penalties of all pairs are added up.
        weight: The strength of the penalty where the schedule is 1, at least 0.
        schedule: The share of `weight` at each position of the run, its name, or a function; None for all of it throughout.
        penalty: What a unit costs: `l1`, `group_lasso`, `growing`, `slimming`, or a `Penalty`.
        how: `loss` adds the penalty to the loss, `gradient` its gradient to that of the step, before any clipping; `proximal`
            takes its proximal step after the optimizer's, at the learning rate of each parameter, so that zeros are exact.
        targets: Names of parameters, modules or containers, globs, or a predicate (name, parameter); instead of the default.
        layer_type: Module classes whose weights are the targets, instead of the default ones.
        example_inputs: A tensor or tuple that the model runs on. It shows coupled channels, the norms behind units, and the
            target that makes the output, which is left out where units are outputs. Callbacks pass a batch instead.

    Attributes:
        terms: A term for each pair of a criterion and a granularity.

    Raises:
        ValueError: An argument is out of range or unknown, or two do not go together; no target is found, or one does not have
            such units.
        TypeError: An argument is of the wrong type.
    """

    def __init__(
        self,
        model: nn.Module,
        criteria: CriteriaLike | Sequence[CriteriaLike] = "large_final",
        granularity: Granularity | str | Sequence[Granularity | str] = "weight",
        weight: float = 0.01,
        schedule: Schedule | Callable[[float], float] | str | None = None,
        *,
        penalty: Penalty | str = "l1",
        how: str = "loss",
        targets: TargetsLike | None = None,
        layer_type: LayerTypes | None = None,
        example_inputs: Any = None,
    ) -> None:
        check_sources(model, None, None)
        self._settings = read_settings(criteria, granularity, weight, schedule, penalty, how)
        made = partial(Term, penalty=self._settings.penalty, targets=targets, layer_type=layer_type)
        self.terms = [made(model, c, g) for c in self._settings.criteria for g in self._settings.granularities]
        for term in self.terms if example_inputs is not None else ():
            term.look(positional(example_inputs))
            term.check_seen()
        self._step, self._total_steps = 0, 1
        self._rates: dict[int, float | Tensor] = {}
        self._optimizers: list[Any] = []
        self._stepping: Callable[[], Any] = _one
        self._sum: Tensor | None = None  # of the penalties since the last figure, on the device
        self._count = 0
        self._figure = float("nan")
        self._notes: list[list[list[float]]] = [[] for _ in self.terms]
        self._has_acted = False

    @staticmethod
    def check_settings(criteria: Any, granularity: Any, weight: Any, schedule: Any, penalty: Any, how: Any, **_: Any) -> None:
        """Refuse arguments that no model makes right.

        Raises:
            ValueError: One is out of range or unknown, or two do not go together.
            TypeError: One is of the wrong type.
        """
        read_settings(criteria, granularity, weight, schedule, penalty, how)

    def _line(self) -> str:
        terms = " + ".join(map(repr, self.terms))
        return f"<Regularizer: {terms}, weight {self.weight:g}, in the {self.how}>".replace("in the proximal", "proximal")

    def _parts(self) -> Iterator[Table | str]:
        yield settings({"weight": self.weight, "schedule": self.schedule or "constant", "how": self.how})
        yield ""
        body = []
        for term, rows in zip(self.terms, self._notes, strict=True):
            last = rows[-1] if rows else [float("nan")] * len(COLUMNS)
            targets = counted(len(term.record.targets), "target")
            body.append((repr(term), targets, *(f"{x:.4g}" for x in (last[2], last[5]))))
        yield Table(("term", "of", "zero", "median norm"), body, left=2)

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy or a file has: all but the run."""
        return {**vars(self), "_rates": {}, "_optimizers": [], "_stepping": _one}

    # --- what it is ------------------------------------------------------------------------------------------------------

    @property
    def model(self) -> nn.Module:
        """The model, wrapped or not."""
        return self.terms[0].record.model

    @model.setter
    def model(self, model: nn.Module) -> None:
        for term in self.terms:
            term.record.model = model

    @property
    def weight(self) -> float:
        """The strength of the penalty where the schedule is 1."""
        return self._settings.weight

    @property
    def schedule(self) -> Schedule | None:
        """The share of the weight at each position; None for all of it throughout."""
        return self._settings.schedule

    @property
    def how(self) -> str:
        """The place of the penalty: `loss`, `gradient` or `proximal`."""
        return self._settings.how

    @property
    def strength(self) -> float:
        """The weight times the schedule, at the step under way; after a run at its end."""
        if self.schedule is None:
            return self.weight
        position = min(1.0, (self._step + 1) / self._total_steps)
        return self.weight * check_fraction("schedule", float(self.schedule(position)))

    def get_norm(self) -> Tensor:
        """Return the penalty now, without its weight: a scalar with its gradient; 0 if nothing of it trains.

        Raises:
            ValueError: The units are not known without example inputs.
        """
        for term in self.terms:
            term.check_seen()
        return _added([term.value() for term in self.terms])

    # --- a run -----------------------------------------------------------------------------------------------------------

    def hears(self, event: str) -> bool:
        """Tell if it takes part in an event; which of them depends on the place of the penalty."""
        heard = {"after_loss": "loss", "after_backward": "gradient", "before_step": "proximal"}
        return super().hears(event) and heard.get(event, self.how) == self.how

    def on_fit_start(self, fit: Fit) -> None:
        """Begin a run; the first batch shows the data flow, where example inputs have not.

        Raises:
            ValueError: The units are not known, or the optimizer trains another model.
        """
        for term in self.terms:
            if term.needs_flow and fit.batch is not None:
                term.look_at_batch(fit)
            term.check_seen()
            term.record.check_plain()
        parameters = [t.parameter for term in self.terms for t in term.record.targets]
        check_trains(fit.optimizer, parameters, "the regularizer's model", "its targets")
        note_optimizer(self.model, fit.optimizer)
        self._optimizers, self._stepping = fit.optimizers, fit.stepping
        self._step, self._total_steps = 0, fit.total_steps
        self._sum, self._count, self._figure, self._has_acted = None, 0, float("nan"), False
        self._notes = [[] for _ in self.terms]
        self._note(0.0)

    def after_loss(self, loss: Tensor, batch: Batch) -> Tensor:
        """Return the loss plus the penalty; `loss` itself is left as it is."""
        with torch.autocast(loss.device.type, enabled=False):
            value = self.get_norm()
        self._count_in(value)
        return loss + (value * self.strength).to(loss.device, loss.dtype) if value.requires_grad else loss

    @torch.enable_grad()
    def after_backward(self) -> None:
        """Add the gradient of the penalty to that of the step."""
        value = self.get_norm()
        self._count_in(value)
        if not value.requires_grad:
            return
        parameters = {id(p): p for term in self.terms for units in term.training for p, _, _ in units.places()}
        if self._stepping() is not None:  # the others have their own steps
            parameters = {id(p): p for p, _ in self._stepped() if id(p) in parameters}
        if not parameters:
            return
        found = torch.autograd.grad(value * self.strength, list(parameters.values()), allow_unused=True)
        for parameter, gradient in zip(parameters.values(), found, strict=True):
            if gradient is not None and parameter.grad is not None:
                parameter.grad.add_(gradient)
            elif gradient is not None:
                parameter.grad = gradient

    def before_step(self, position: float) -> None:
        """Note the learning rates of the step: a scheduler may have changed them when it is over."""
        self._rates = {id(parameter): rate for parameter, rate in self._stepped()}

    def _stepped(self) -> Iterator[tuple[nn.Parameter, float | Tensor]]:
        """Yield (parameter, learning rate) for all that the step under way is of."""
        one = self._stepping()
        for optimizer in self._optimizers if one is None else [one]:
            for group in optimizer.param_groups:
                rate = group["lr"]
                rate = rate.detach().clone() if isinstance(rate, Tensor) else float(rate)
                yield from ((parameter, rate) for parameter in group["params"])

    def after_step(self, position: float) -> None:
        """Take the proximal step, if that is the place of the penalty, and note the norms at few steps."""
        if self.how == "proximal":
            strength = self.strength
            rates = {key: rate * strength for key, rate in self._rates.items()}
            self._count_in(_added([term.step_(lambda p: rates.get(id(p))) for term in self.terms]))
        self._step = round(position * self._total_steps)
        if int(position * NOTES) > int(self._notes[0][-1][0] * NOTES):
            self._note(position)

    def _count_in(self, value: Tensor) -> None:
        """Add to the figure; nothing here waits for a device."""
        value = value.detach()
        self._sum = value if self._sum is None else self._sum + value
        self._count += 1
        self._has_acted = self._has_acted or any(term.training for term in self.terms)

    def _note(self, position: float) -> None:
        for term, rows in zip(self.terms, self._notes, strict=True):
            rows.append(note(position, self.strength, term.norms()))

    def metrics(self) -> dict[str, float]:
        """Return the mean of the penalty since it was last asked for, without its weight, and its strength now."""
        if self._sum is not None:
            self._figure = float(self._sum) / self._count
            self._sum, self._count = None, 0
        return {"regularization": self._figure, "strength": self.strength}

    def on_fit_end(self, completed: bool) -> None:
        """End a run, with a warning if nothing of its targets has trained."""
        self._rates, self._optimizers, self._stepping = {}, [], _one
        if completed and not self._has_acted:
            name = self.terms[0].record.targets[0].name
            warn(f"nothing was regularised in this run: every target was frozen ({name}, ...); let them train")

    # --- what it has done ------------------------------------------------------------------------------------------------

    @property
    def effect(self) -> list[dict[str, list[float]]]:
        """Notes of the last run, for each term: `position`, `strength`, `zero` and quantiles of the norms."""
        return [dict(zip(COLUMNS, map(list, zip(*rows, strict=True)), strict=True)) for rows in self._notes if rows]

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the norms of the units over the last run, and the share of them that is zero.

        Args:
            ax: The axes to draw the first term in; a new figure of all terms if left out.

        Raises:
            ValueError: There was no run yet.
        """
        if not self._notes[0]:
            raise ValueError("plot must come after a run of training, got a Regularizer that was in none")
        shown = self.terms if ax is None else self.terms[:1]
        several: Any = [ax] if ax is not None else new_axes(6.4 * len(shown), 3.6, len(shown))
        drawn = [several] if ax is None and len(shown) == 1 else list(several)
        for axes, term, rows in zip(drawn, shown, self._notes, strict=False):
            draw(rows, axes, term.title)
        first: Axes = drawn[0]
        return first

    # --- saving and going on ---------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the step, the notes, and initial weights where a criterion reads them, as copies."""
        return {
            "format": FORMAT,
            "settings": self._in_words(),
            "step": self._step,
            "total_steps": self._total_steps,
            "sum": torch.zeros(()) if self._sum is None else self._sum.clone(),
            "count": self._count,
            "notes": [torch.tensor(rows, dtype=torch.float64).reshape(-1, len(COLUMNS)) for rows in self._notes],
            "initial": [{name: weight.clone() for name, weight in term.initial.items()} for term in self.terms],
        }

    def _in_words(self) -> dict[str, str]:
        return settings_in_words(
            terms=self.terms, weight=self.weight, schedule=self.schedule, penalty=self._settings.penalty, how=self.how
        )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state; the caller's dict is not changed. Other arguments than those of then are warned of.

        Raises:
            ValueError: It is no state of a `Regularizer`, or of another one. Nothing is changed then.
            TypeError: A part of it is of the wrong type.
        """
        parts = {"step": whole, "total_steps": whole, "sum": tensor, "count": whole}
        check_parts(state, "Regularizer", {**parts, "notes": list_of(tensor), "initial": list_of(finite_tensors)})
        for key in ("notes", "initial"):
            if len(state[key]) != len(self.terms):
                raise ValueError(f"state must be of {counted(len(self.terms), 'term')}, got {len(state[key])} in its {key}")
        if any(notes.dim() != 2 or notes.shape[1] != len(COLUMNS) for notes in state["notes"]):
            raise ValueError(
                f"state's notes must be rows of {len(COLUMNS)} numbers, got {[tuple(n.shape) for n in state['notes']]}"
            )
        for term, initial in zip(self.terms, state["initial"], strict=True):
            term.check_initial(initial)
        warn_of_settings("Regularizer", state.get("settings", {}), self._in_words())
        self._step = state["step"]
        if not self._optimizers:
            self._total_steps = max(1, state["total_steps"])
        self._sum, self._count = state["sum"].clone() if state["count"] else None, state["count"]
        self._notes = [notes.tolist() for notes in state["notes"]]
        for term, initial in zip(self.terms, state["initial"], strict=True):
            term.load_initial(initial)


def _one() -> None:
    """Tell nothing: there is one optimizer."""


def _added(values: Sequence[Tensor | None]) -> Tensor:
    """Add up the penalties of terms; 0 if none of them trains."""
    found = added([value for value in values if value is not None])
    return torch.zeros(()) if found is None else found
