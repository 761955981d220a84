"""A training loop's events, and what takes part in them.

Callbacks translate the events of their framework into calls of a `Loop`; the loop passes them on to its participants.
Callbacks know no method and methods know no framework, so the two add up instead of multiplying.

    on_setup -> on_fit_start
        -> ( after_forward [-> on_first_batch] -> after_loss -> after_backward -> before_step -> after_step | after_skip )*
    -> on_fit_end

`after_move` and `after_cut` come in between, whenever masks move or parameters get smaller; `metrics` whenever the loop shows
figures. To add a kind of method: a `Participant`. To add a framework: a file in `fasterai/callbacks/`.

Over 300 lines, since the order of the events, at the beginning, in the steps and at the end, is to be read in one place.
"""

from __future__ import annotations

import atexit
from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any
from weakref import WeakSet

from torch import Tensor, nn

from fasterai.core.batch import Batch, Fit, note_task, task_loss
from fasterai.core.checks import check_count, warn
from fasterai.core.joined import Joined
from fasterai.core.participant import EVENTS, Participant, own_parameters, tell
from fasterai.core.saved import check_loop_state, warn_of_length
from fasterai.model.cuts import follow

__all__ = ["EVENTS", "STOPPED", "Batch", "Fit", "Loop", "Participant", "numbered"]

#: The likely reason for which a framework's run ends short, and the repair.
STOPPED = (
    "it was stopped early, or has failed; a further fit with the same callback goes on from there, and "
    "sparsifier.sparsify_model() goes to the end of masks at once"
)
#: The same for a program that ends while a run is under way.
UNENDED = "the program ends before the run did, and what it trained last is not what was asked for"

_open: WeakSet[Loop] = WeakSet()  # the runs under way


class Loop:
    """Counts the steps of a run and passes its events on.

    Attributes:
        participants: The participants, in the order in which they hear of every event, its end included.
        step: Steps done. A callback whose framework counts for itself sets it before each step.
        total_steps: Steps of the run under way, 0 if there is none.
        planned_steps: Steps of the run under way, or else of the last one; 0 before the first.
        counts: The arguments that the steps are worked out from, in words; empty if they were given themselves.
    """

    planned_steps = 0  # copies of earlier versions have none
    counts = ""
    _awaits_step = False  # whether a step has been announced, and not been taken yet
    _awaits_batch = False  # whether a first batch is still to come, with which further parameters may join
    _joined_later: Mapping[str, Any] | None = None  # a state that is loaded when all parameters are there

    def __init__(self, participants: Sequence[Participant]) -> None:
        self.participants = list(participants)
        self.step = 0
        self.total_steps = 0
        self._steps_per_epoch: int | None = None
        self._joined: Joined | None = None
        self._optimizer: Any = None
        self._is_told = False

    @property
    def running(self) -> bool:
        """True if a run is under way."""
        return self.total_steps > 0

    def wants(self, *events: str) -> bool:
        """Tell if a participant hears one of these events."""
        return any(p.hears(event) for p in self.participants for event in events)

    def _hearing(self, event: str) -> list[Participant]:
        """List the participants that hear of an event."""
        return [p for p in self.participants if p.hears(event)]

    def setup(self, model: nn.Module, optimizer: Any) -> None:
        """Let participants' parameters join the optimizer, until the run ends.

        Raises:
            TypeError: The optimizer takes no further parameters, or a participant returns something else.
            ValueError: A parameter is there twice.
        """
        self._optimizer, self._awaits_batch = optimizer, self.wants("on_first_batch")
        self._join("on_setup", model)

    def _join(self, event: str, shown: nn.Module | Batch) -> None:
        """Let the parameters that participants return at an event join the optimizer."""
        found = [(p, name) for name, one in self._named().items() for p in own_parameters(one, event, shown)]
        parameters, owners = [p for p, _ in found], [name for _, name in found]
        if found and self._joined is None:
            self._joined = Joined(self._optimizer, parameters, owners)
        elif found and self._joined is not None:
            self._joined = self._joined.extended(parameters, owners)

    def move(self, optimizer: Any) -> None:
        """Let participants' parameters go over to an optimizer that has taken the other's place in the middle of a run."""
        self._optimizer = optimizer
        if self._joined is not None:
            self._joined = self._joined.moved(optimizer)

    def start(self, fit: Fit) -> None:
        """Begin a run; participants that have begun it end it again if another one refuses.

        Raises:
            ValueError: `fit.total_steps` is not at least 1, or a participant relies on one that is in no run.
        """
        total_steps = check_count("total_steps", fit.total_steps)
        with ExitStack() as begun:
            begun.callback(self._leave)
            self._check_company()
            for participant in self.participants:
                tell(participant, "on_fit_start", fit)
                begun.callback(participant.on_fit_end, False)
            begun.pop_all()
        for participant in self.participants if fit.model is not None else ():
            if fit.model is not None and (participant.hears("after_move") or participant.hears("after_cut")):
                follow(fit.model, participant)
        self.step, self.total_steps, self.planned_steps = 0, total_steps, total_steps
        self._steps_per_epoch = fit.steps_per_epoch
        self._is_told = self._awaits_step = False
        _open.add(self)

    def _check_company(self) -> None:
        """Refuse a participant that relies on one that takes part in no run, or cannot stand beside one that does."""
        all_here = [p for loop in {self, *_open} if loop is self or loop.running for p in loop.participants]
        present = {id(p) for p in all_here}
        for participant in self.participants:
            for other in all_here:
                if other is not participant:
                    participant.check_beside(other)
            for other in participant.relies_on():
                if id(other) not in present:
                    pair = f"{(kind := type(other).__name__).lower()}, {participant.name}({kind.lower()})"
                    raise ValueError(
                        f"participants must hold the {kind} that {participant.name} follows, before it, got none or another "
                        f"one; pass both: attach(optimizer, {pair}, ...), or ParticipantCallback({pair})"
                    )

    def after_forward(self, batch: Batch) -> None:
        """Show a batch with its outputs; with the first one of a run further parameters join the optimizer.

        Raises:
            ValueError: A parameter is there twice, or the saved state is of other ones.
            TypeError: A participant returns something else than parameters; the next batch counts as the first one then.
        """
        for participant in self._hearing("after_forward"):
            tell(participant, "after_forward", batch)
        if self._awaits_batch:
            self._join("on_first_batch", batch)
            self._awaits_batch = False
        if self._joined_later is not None:
            if self._joined is not None:
                self._joined.load_state_dict(self._joined_later)
            self._joined_later = None

    def after_loss(self, loss: Tensor, batch: Batch) -> Tensor:
        """Return the loss after every participant has had it.

        Raises:
            TypeError: A participant returns no loss.
        """
        task = task_loss(loss)
        batch = replace(batch, loss=task)
        for participant in self._hearing("after_loss"):
            loss = tell(participant, "after_loss", loss, batch)
            if not isinstance(loss, Tensor):
                raise TypeError(f"{participant.name}.after_loss must return the loss to go on with, got {loss!r}")
        if self._joined is not None and loss.requires_grad:
            loss.register_hook(self._joined.clear_left_over)  # type: ignore[no-untyped-call]
        return note_task(loss, task)

    def after_backward(self) -> None:
        """Pass on that the gradients of a step are complete."""
        for participant in self._hearing("after_backward"):
            tell(participant, "after_backward")

    def before_step(self) -> None:
        """Pass on that the optimizer is about to step.

        Raises:
            ValueError: The run has had its `total_steps` already.
        """
        self.check_step()
        self._awaits_step = True
        for participant in self._hearing("before_step"):
            tell(participant, "before_step", (self.step + 1) / self.total_steps)

    def check_step(self) -> None:
        """Refuse a step beyond the run's end.

        Raises:
            ValueError: The run has had its `total_steps` already.
        """
        if self.step >= self.total_steps:
            given = f"{self.counts} must make" if self.counts else "total_steps must be"
            of = "; accumulate is the number of batches of a step, steps_per_epoch that of an epoch" if self.counts else ""
            raise ValueError(
                f"{given} at least the number of steps taken, got {self.total_steps} and a further step{of}; end the run first "
                "(handle.remove()), then train on, with the masks held if they should stay"
            )

    def after_step(self) -> None:
        """Count a step of the optimizer, and pass it on."""
        self.step += 1
        self._awaits_step = False
        for loop in {self, *_open}:  # participants of other loops may stand in the same model
            for participant in loop.participants:
                tell(participant, "close_step")
        for participant in self._hearing("after_step"):
            tell(participant, "after_step", self.step / self.total_steps)
        self.clear_gradients()

    def skip_step(self) -> None:
        """Pass on that a step that was announced is not taken, if one was; forget the gradients of participants' parameters."""
        if self.running and self._awaits_step:
            self._awaits_step = False
            for participant in self._hearing("after_skip"):
                tell(participant, "after_skip")
        self.clear_gradients()

    def settle(self) -> None:
        """Pass on that the announced step did not come, if one was announced: the framework is beyond it."""
        if self._awaits_step:
            self.skip_step()

    def clear_gradients(self) -> None:
        """Forget the gradients of participants' parameters, after a step or one that was skipped."""
        if self._joined is not None:
            self._joined.clear_gradients()

    def metrics(self) -> dict[str, float]:
        """Return the figures of all participants; equal names are numbered: `sparsity`, `sparsity_2`."""
        found: dict[str, float] = {}
        for participant in self.participants:
            for name, value in tell(participant, "metrics").items():
                found[numbered(name, "_", found)] = value
        return found

    def end(self, completed: bool, why: str = "") -> None:
        """End the run for every participant, also if one of them fails; further calls do nothing.

        Args:
            completed: Whether the training went to its end, so that the schedule's end is to be reached.
            why: The likely reason for which it ends short, and the repair, for the warning that says what was reached of what
                was asked for; without it there is none.
        """
        step, total_steps, is_short = self.step, self.total_steps, self.running and not completed
        _open.discard(self)
        with ExitStack() as ends:
            ends.callback(self._leave)
            if self.running:
                self.total_steps = 0
                for participant in reversed(self.participants):  # a stack ends the last first
                    ends.callback(tell, participant, "on_fit_end", completed)
        if is_short and why and step:  # a run that fails before its first step has said all
            _warn_of(step, total_steps, self.shortfall(), why)

    def look_back(self) -> None:
        """Let the participants look at the model once more, when the framework has done all that it does after a run."""
        for participant in self.participants:
            participant.look_back()

    def shortfall(self) -> str:
        """Return in words what the participants have reached of what was asked for; empty if nothing lacks."""
        return ", ".join(words for participant in self.participants if (words := participant.shortfall()))

    def tell_if_open(self, why: str, lacking: Callable[[], str] | None = None) -> None:
        """Warn of a run that nobody has ended, if it lacks something; once.

        Args:
            why: The likely reason, and the repair.
            lacking: Finds the shortfall, if that is not to happen here.
        """
        if self.running and not self._is_told:
            self._is_told = True
            _warn_of(self.step, self.total_steps, (lacking or self.shortfall)(), why)

    def _leave(self) -> None:
        joined, self._joined, self._joined_later, self._optimizer = self._joined, None, None, None
        self._awaits_batch = False
        if joined is not None:
            joined.leave()

    # --- saving and going on -----------------------------------------------------------------------------------------

    def _named(self) -> dict[str, Participant]:
        named: dict[str, Participant] = {}
        for participant in self.participants:
            named[numbered(participant.name, ":", named)] = participant
        return named

    def state_dict(self) -> dict[str, Any]:
        """Return the step and the run's length, the participants' states by names, and the optimizer's of their parameters."""
        states = {name: participant.state_dict() for name, participant in self._named().items()}
        later = self._joined.state_dict() if self._joined is not None else None
        own = self._joined_later if self._joined_later is not None else later
        joined = {} if own is None else {"joined": own}
        per_epoch = {} if self._steps_per_epoch is None else {"steps_per_epoch": self._steps_per_epoch}
        length = {"total_steps": self.planned_steps, **per_epoch}
        return {"step": self.step, **length, "participants": states, **joined}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state; if one participant refuses it, all stay as they were.

        Participants that the state does not know begin afresh, with a warning. States of earlier versions are lists in the
        order of the participants.

        Raises:
            ValueError: It is no loop's state, of other participants, or of a longer run. Nothing is changed then.
            TypeError: A part of it is of the wrong type.
        """
        check_loop_state(state)
        if self.running and state["step"] > self.total_steps:
            given = f"{self.counts} must make" if self.counts else "total_steps must be"
            raise ValueError(f"{given} at least the {state['step']} steps of the state, got {self.total_steps}")
        if self.running:
            warn_of_length(state, self.total_steps)
        loads = self._matched(state["participants"])
        before = [(participant, participant.state_dict()) for participant, _ in loads]
        try:
            for participant, own in loads:
                participant.load_state_dict(own)
            if self._awaits_batch:
                self._joined_later = state.get("joined")
            elif self._joined is not None and "joined" in state:
                self._joined.load_state_dict(state["joined"])
        except Exception:
            for participant, own in before:
                participant.load_state_dict(own)
            raise
        self.step = state["step"]

    def _matched(self, states: Any) -> list[tuple[Participant, Mapping[str, Any]]]:
        named = self._named()
        if not isinstance(states, Mapping):
            if len(states) != len(named):
                raise ValueError(f"state must hold {len(named)} participants, got {len(states)}")
            return list(zip(self.participants, states, strict=True))
        if states and not named.keys() & states.keys():
            raise ValueError(f"state must hold {', '.join(named) or 'no participant'}, got {', '.join(states)}")
        for name in states.keys() ^ named.keys():
            fate = "it is left out" if name in states else "it begins afresh"
            warn(f"state and loop differ in the participant {name}: {fate}")
        return [(named[name], own) for name, own in states.items() if name in named]


def _warn_of(step: int, total_steps: int, lacking: str, why: str) -> None:
    if lacking:
        warn(f"the run ends at step {step} of {total_steps}, with {lacking}: {why}")


@atexit.register
def tell_of_open_runs() -> None:
    for loop in list(_open):
        loop.tell_if_open(UNENDED)


def numbered(name: str, sign: str, taken: Container[str]) -> str:
    """Return a name, with the next free number if it is taken."""
    count, free = 1, name
    while free in taken:
        count += 1
        free = f"{name}{sign}{count}"
    return free
