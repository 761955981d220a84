"""All losses by name, and what a loss may be given as: a value, a class, a `partial`, a name, a function.

>>> from fasterai.distill.losses.logits import SoftTarget
>>> as_loss("SoftTarget"), as_loss(partial(SoftTarget, T=30)) == SoftTarget(T=30)
(SoftTarget(scale=1.0, T=5.0), True)
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from fasterai.core.checks import not_one_of, unknown
from fasterai.display import Brief
from fasterai.distill.losses.logits import DecoupledKD
from fasterai.distill.losses.loss import Adapter, FeatureLoss, LogitLoss, Loss

__all__ = ["as_loss", "known_losses"]

CATALOGUES = tuple(f"fasterai.distill.losses.{name}" for name in ("logits", "tokens", "features", "embeddings"))
#: Further names of a loss, in small letters and without `_`.
NAMES = {"at": "Attention", "decoupledkd": "DKD", "hinton": "SoftTarget", "kd": "SoftTarget", "sp": "Similarity"}
ALLOWED = "a distillation loss, its name, its class or a function of the student's and the teacher's logits"


def known_losses() -> dict[str, type[Loss]]:
    """Return the losses of all catalogues by name."""
    homes = [importlib.import_module(name) for name in CATALOGUES if importlib.util.find_spec(name)]
    entries = {name: getattr(home, name) for home in homes for name in home.__all__}
    return {name: x for name, x in sorted(entries.items()) if isinstance(x, type) and issubclass(x, Loss)}


def as_loss(value: Any) -> Loss:
    """Return the loss that is meant.

    Args:
        value: A loss; its class or a `partial` of it, which stand for its defaults and the settings given; its name; or a
            function, called with `pred`, `teacher_pred`, `target` or `fm_s`, `fm_t`, `target` by name if it has the first
            two of them, else with the logits of the student and of the teacher, and with the labels if it needs three
            arguments.

    Raises:
        ValueError: The name is unknown; the known ones are listed.
        TypeError: It is none of these, or a function that needs something else.
    """
    if isinstance(value, Loss):
        return value
    if isinstance(value, str):
        return _named(value)()
    kind = value.func if isinstance(value, partial) else value
    if isinstance(kind, type):
        if not issubclass(kind, Loss | DecoupledKD):
            raise not_one_of("loss", ALLOWED, value)
        return cast(Loss, value())
    if not callable(value):
        raise not_one_of("loss", ALLOWED, value)
    return _of_function(value)


def _named(name: str) -> type[Loss]:
    known = known_losses()
    plain = {entry.lower(): entry for entry in known} | NAMES
    entry = plain.get(name.replace("_", "").replace("-", "").lower())
    if entry not in known:
        raise unknown("loss", name, known)
    return known[entry]


# --- functions ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class LogitFunction(Brief, LogitLoss):
    """A function of logits as a loss, called with them in their own shape, in float32.

    Args:
        function: The function, with a scalar as its result.
    """

    is_distance: ClassVar[bool] = False

    function: Callable[..., Tensor]

    @property
    def needs_labels(self) -> bool:  # type: ignore[override]
        """Tell whether the function has an argument for labels without a default."""
        return _needs_labels(self.function)

    def __call__(self, student: Tensor, teacher: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return what the function gives."""
        self._check_labels(labels)
        with torch.autocast(student.device.type, enabled=False):
            return self.scale * self.of_rows(student.float(), teacher.detach().float(), labels)

    def of_rows(self, student: Tensor, teacher: Tensor, labels: Tensor | None) -> Tensor:
        """Call the function."""
        names = _parameters(self.function)
        if {"pred", "teacher_pred"} <= names.keys() or not _required(names):
            given = {"pred": student, "teacher_pred": teacher, "target": labels}
            return _scalar(self.function, self.function(**_wanted(given, names)))
        more = (labels,) if len(_required(names)) > 2 else ()
        return _scalar(self.function, self.function(student, teacher, *more))


@dataclass(frozen=True, repr=False)
class FeatureFunction(Brief, FeatureLoss):
    """A function of features as a loss, called with dicts by place: "0" for the first pair.

    Args:
        function: The function, with a scalar as its result.
    """

    is_distance: ClassVar[bool] = False

    function: Callable[..., Tensor]

    @property
    def needs_labels(self) -> bool:  # type: ignore[override]
        """Tell whether the function has an argument for labels without a default."""
        return _needs_labels(self.function)

    def of_pairs(self, student: list[Tensor], teacher: list[Tensor], labels: Tensor | None, adapter: Adapter | None) -> Tensor:
        """Call the function."""
        own, other = ({str(i): x for i, x in enumerate(features)} for features in (student, teacher))
        given = {"fm_s": own, "fm_t": other, "target": labels}
        return _scalar(self.function, self.function(**_wanted(given, _parameters(self.function))))


Parameters = Mapping[str, inspect.Parameter]


def _of_function(function: Callable[..., Tensor]) -> Loss:
    names = _parameters(function)
    required = _required(names)
    if {"fm_s", "fm_t"} <= names.keys():
        _check_required(function, required, {"fm_s", "fm_t", "target"})
        return FeatureFunction(function)
    if {"pred", "teacher_pred"} <= names.keys():
        _check_required(function, required, {"pred", "teacher_pred", "target"})
    elif names and len(required) not in (0, 2, 3):
        raise not_one_of("loss", ALLOWED, function, f"; its arguments are {', '.join(required)}")
    return LogitFunction(function)


def _check_required(function: Callable[..., Tensor], required: list[str], known: set[str]) -> None:
    if more := [name for name in required if name not in known]:
        repair = f"; it needs {', '.join(more)}, but gets {', '.join(sorted(known))}: bind the others by functools.partial"
        raise not_one_of("loss", ALLOWED, function, repair)


def _parameters(function: Callable[..., Any]) -> Parameters:
    try:
        return inspect.signature(function.forward if isinstance(function, nn.Module) else function).parameters
    except (TypeError, ValueError):  # of a builtin
        return {}


def _required(names: Parameters) -> list[str]:
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [name for name, x in names.items() if x.default is x.empty and x.kind not in several]


def _needs_labels(function: Callable[..., Any]) -> bool:
    names = _parameters(function)
    if "teacher_pred" in names or "fm_t" in names:
        return "target" in _required(names)
    return len(_required(names)) == 3


def _wanted(given: dict[str, Any], names: Parameters) -> dict[str, Any]:
    """Return the arguments that a function has, all where it takes any."""
    any_name = any(x.kind is inspect.Parameter.VAR_KEYWORD for x in names.values())
    return {name: value for name, value in given.items() if any_name or name in names}


def _scalar(function: Callable[..., Any], value: Any) -> Tensor:
    if not isinstance(value, Tensor) or value.numel() != 1:
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"loss must return a scalar, got {shape} from {function!r}; return its mean")
    return value.reshape(())
