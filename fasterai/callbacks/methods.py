"""Ready-made methods for the callbacks of every framework: a signature on a generic callback each, written once.

A framework's file has a `ParticipantCallback`, and `class SparsifyCallback(SparsifyMethod, ParticipantCallback)` and so on.
To add a method: a class here, and its line in each framework's file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import update_wrapper
from pathlib import Path
from types import FunctionType
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from fasterai.callbacks.settings import PruneSettings, SparsifySettings
from fasterai.core.checks import check_arguments
from fasterai.core.contexts import Context
from fasterai.core.criteria import Criterion
from fasterai.core.granularities import Granularity
from fasterai.core.loop import Participant
from fasterai.core.schedules import Schedule
from fasterai.display import brief, one_line
from fasterai.model.targets import LayerTypes
from fasterai.sparse.masked import Masked
from fasterai.sparse.sparsifier import Sparsifier, Sparsity

if TYPE_CHECKING:
    from fasterai.prune.gradual import GradualPruner
    from fasterai.prune.surgery.model_copies import Copies

__all__ = ["HoldMethod", "Makes", "Method", "PruneMethod", "SparsifyMethod", "key_of", "made"]

#: A participant, or a function that makes some for a model.
Makes = Participant | Callable[[nn.Module], Participant | Iterable[Participant]]


def made(given: Sequence[Makes], model: nn.Module) -> list[Participant]:
    """Return the participants of a run: those given, and what functions make for the model.

    Raises:
        TypeError: Something given is neither, or a function makes something else.
    """
    found: list[Any] = []
    for one in given:
        result = one(model) if callable(one) and not isinstance(one, Participant) else one
        found += list(result) if isinstance(result, Iterable) else [result]
    for one in found:
        if not isinstance(one, Participant):
            raise TypeError(f"participants must be participants, or functions of the model that make some, got {brief(one)}")
    return found


def key_of(callback: object, given: Sequence[Makes]) -> str:
    """Return the name under which a callback's state is saved; callbacks of other participants have another one."""
    kind = type(callback).__name__
    if isinstance(callback, Method):
        return kind
    names = [one.name if isinstance(one, Participant) else getattr(one, "__name__", type(one).__name__) for one in given]
    return f"{kind}({', '.join(names)})"


def _word(setting: Any) -> str:
    return setting.title if isinstance(setting, Criterion) else setting if isinstance(setting, str) else brief(setting)


class Method:
    """Callback of one method; the framework's `ParticipantCallback` comes behind it, with what is declared here.

    Attributes:
        is_late: Whether its participants are made with the first batch: it can name its figures without them.
    """

    is_late = True

    def __repr__(self) -> str:
        return one_line(f"<{type(self).__name__}: {self._settings()}>")

    def _settings(self) -> str:
        """Return the settings in a few words."""
        raise NotImplementedError

    def __init_subclass__(cls, **options: Any) -> None:
        """Let errors of arguments name the class that was called, not the one that states them."""
        super().__init_subclass__(**options)
        stated = cls.__init__
        if "__init__" not in vars(cls) and isinstance(stated, FunctionType):
            own = FunctionType(stated.__code__, stated.__globals__, stated.__name__, stated.__defaults__, stated.__closure__)
            cls.__init__ = update_wrapper(own, stated)  # type: ignore[method-assign]
            own.__kwdefaults__, own.__qualname__ = stated.__kwdefaults__, f"{cls.__name__}.__init__"
            del own.__wrapped__  # type: ignore[attr-defined]

    if TYPE_CHECKING:

        def __init__(self, *participants: Makes) -> None: ...

        def folder(self) -> Path: ...

        def neighbours(self) -> Sequence[object]: ...

        def copies(self) -> list[Any]: ...


class SparsifyMethod(Method):
    """Sparsifies the model while it trains.

    Args:
        sparsity: The share of units to prune by the end, in [0, 1], or a dict of names or globs to shares.
        granularity: Which weights share one decision, or its name.
        context: Which units compete, or its name.
        criteria: How much a weight matters: a criterion, its name, or a function of the weight.
        schedule: How much is pruned at which position: a schedule, its name, or a function of the position.
        lth: Go back to early weights whenever the masks move (lottery tickets).
        rewind_epoch: The epoch whose beginning is gone back to.
        reset_end: Go back at the end of the run, with `lth` or without.
        save_tickets: With `lth`, save each ticket: True for the framework's own folder, or a folder.
        model: The part of the model to sparsify; all of it if left out.
        round_to: Kept units of each target are rounded up to a multiple of it.
        nm: Prune two of every four neighbouring inputs.
        layer_type: Module classes whose weights are the targets, instead of the default ones.
        **options: Of the `Sparsifier`: `targets`, `data`, `loss`, `example_inputs`, `min_keep`, `max_updates`, `rule`,
            `features`.

    Raises:
        ValueError: An argument is out of range or unknown.
        TypeError: An argument is of the wrong type, or there is no such option.
    """

    def __init__(
        self,
        sparsity: Sparsity | None,
        granularity: Granularity | str,
        context: Context | Mapping[str, float] | str,
        criteria: Criterion | Callable[[Tensor], Tensor] | str,
        schedule: Schedule | Callable[[float], float] | str,
        lth: bool = False,
        rewind_epoch: int = 0,
        reset_end: bool = False,
        save_tickets: bool | str | Path | None = False,
        model: nn.Module | None = None,
        round_to: int | None = None,
        nm: bool = False,
        layer_type: LayerTypes | None = None,
        **options: Any,
    ) -> None:
        check_arguments("SparsifyMethod", options)
        super().__init__(self._make)
        self.sparsity, self.part, self.save_tickets = sparsity, model, save_tickets
        self.settings = SparsifySettings(
            sparsity,
            granularity,
            context,
            criteria,
            schedule,
            lth=lth,
            rewind_epoch=rewind_epoch,
            reset_end=reset_end,
            save_tickets=bool(save_tickets),
            options={"round_to": round_to, "nm": nm, "layer_type": layer_type, **options},
        )

    def _make(self, model: nn.Module) -> list[Participant]:
        folder = self.folder() if self.save_tickets is True else self.save_tickets or None
        return self.settings.participants(model if self.part is None else self.part, folder)

    def _settings(self) -> str:
        sparsity = "the context's" if self.sparsity is None else brief(self.sparsity)
        return f"{sparsity} pruned; {', '.join(map(_word, self.settings.axes))}"

    @property
    def sparsifier(self) -> Sparsifier | None:
        """The sparsifier of the last run, None before the first."""
        return self.settings.sparsifier

    @property
    def current_sparsity(self) -> float:
        """The share of units that the masks prune now, in [0, 1]."""
        return self.sparsifier.sparsity.overall if self.sparsifier else 0.0

    def metrics(self) -> dict[str, float]:
        """Return the sparsity, counted from the masks."""
        return {"sparsity": self.current_sparsity}


class HoldMethod(Method):
    """Keeps the masks of a sparsifier, or of an `SRSTE` or `STE`, while the model trains on."""

    def __init__(self, sparsifier: Masked) -> None:
        if not isinstance(sparsifier, Masked):
            repair = "after a fit pass its callback's `.sparsifier`"
            if sparsifier is None:
                repair = (
                    "a callback has none before its first batch, nor after resuming a run that was at its end: make one, "
                    "Sparsifier(model, granularity), and take the zeros for its masks, sparsifier.mask_zeros()"
                )
            raise TypeError(f"sparsifier must be a Sparsifier, got {type(sparsifier).__name__}; {repair}")
        super().__init__(sparsifier.hold())
        self.sparsifier = sparsifier

    def _settings(self) -> str:
        return f"{self.sparsifier.sparsity.overall:.1%} pruned"

    def metrics(self) -> dict[str, float]:
        """Return the sparsity, counted from the masks."""
        return self.sparsifier.metrics()


class PruneMethod(Method):
    """Takes channels out of the model while it trains; the optimizer goes on.

    Note the order of the arguments, in which the schedule is the second. A checkpoint of a run is resumed with a model built
    as at first: what was taken out is taken out of it before the weights are loaded.

    Args:
        pruning_ratio: The share of the channels that go, in [0, 1), or a dict of names of layers to shares (context `local`).
        schedule: Which share of the ratio is gone at which position: a schedule that never falls, its name, or a function of
            the position.
        context: `local` ranks inside each group of coupled channels, `global` all together; or its name.
        criteria: How much a weight matters: a criterion, its name, or a function of the weight.
        ignored_layers: Modules, or their names, whose outputs stay, besides all that has to stay anyway.
        example_inputs: A tensor or tuple that the model runs on; a few samples of the first batch if left out.
        model: The part of the model that channels go from; all of it if left out.
        max_updates: How often channels go in a run, at most.
        copies: Modules of the same structure, such as moving averages of the weights, or a function that gives them; those
            of Lightning's `WeightAveraging` are found.
        **options: Of the `Pruner`: `round_to`, `over_places` and others.

    Raises:
        ValueError: An argument is out of range or unknown, or the schedule falls.
        TypeError: An argument is of the wrong type, or there is no such option.
    """

    def __init__(
        self,
        pruning_ratio: Any,
        schedule: Schedule | Callable[[float], float] | str,
        context: Context | str,
        criteria: Criterion | Callable[[Tensor], Tensor] | str,
        ignored_layers: Iterable[nn.Module | str] | None = None,
        example_inputs: Any = None,
        *,
        model: nn.Module | None = None,
        max_updates: int = 10,
        copies: Copies = None,
        **options: Any,
    ) -> None:
        super().__init__(self._make)
        self.pruning_ratio, self.part = pruning_ratio, model
        self.settings = PruneSettings(
            pruning_ratio,
            schedule,
            context,
            criteria,
            ignored_layers=ignored_layers,
            example_inputs=example_inputs,
            max_updates=max_updates,
            copies=copies,
            options=options,
        )

    def _make(self, model: nn.Module) -> list[Participant]:
        part = model if self.part is None else self.part
        return [self.settings.participant(part, self._copies)]

    def _copies(self) -> list[Any]:
        return [self.settings.copies, *self.copies()]

    def _settings(self) -> str:
        return f"{brief(self.pruning_ratio)} removed; {', '.join(map(_word, self.settings.axes[1:]))}"

    @property
    def pruner(self) -> GradualPruner | None:
        """The `GradualPruner` of the last run, None before the first."""
        return self.settings.pruner

    @property
    def current_sparsity(self) -> float:
        """The share of the channels that are gone, in [0, 1]."""
        return self.pruner.sparsity if self.pruner else 0.0

    def metrics(self) -> dict[str, float]:
        """Return the share of the channels that are gone: `sparsity`, or `removed` where masks show one of that name."""
        masked = any(isinstance(one, SparsifyMethod | HoldMethod) for one in self.neighbours())
        return {"removed" if masked else "sparsity": self.current_sparsity}
