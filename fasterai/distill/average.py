"""The student's own moving average as its teacher."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fasterai.core.batch import Batch
from fasterai.core.checks import check_fraction
from fasterai.core.saved import check_parts, finite_tensors
from fasterai.distill.capture import copied
from fasterai.distill.teachers import Answers, NetworkTeacher, Teacher
from fasterai.model.cuts import Cut, follow, sliced
from fasterai.model.names import plain_name, unwrap

__all__ = ["EMATeacher"]


class EMATeacher(Teacher):
    """The exponential moving average of the student: after each step `average = decay * average + (1 - decay) * student`.

    It begins as a copy of the student, with the first run. Buffers are averaged as well, whole numbers taken over. Where the
    student loses channels, the average loses the same ones. Source: Tarvainen and Valpola 2017 ("Mean teachers are better role
    models"); answering in eval mode is ours.

    Args:
        decay: The share of the average that stays at each step, in [0, 1].
    """

    def __init__(self, decay: float = 0.999) -> None:
        self.decay = check_fraction("decay", decay)
        self._student: nn.Module | None = None
        self._network: NetworkTeacher | None = None
        self._layers: list[str] = []
        self._values: dict[str, Tensor] = {}  # of the last run, or of a state that was loaded, until they are needed
        self._cuts: tuple[Cut, ...] = ()

    def __repr__(self) -> str:
        return f"<EMATeacher: decay {self.decay:g}>"

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_student": None, "_network": None, "_cuts": (), "_values": self.state_dict()["average"]}

    @property
    def model(self) -> nn.Module | None:
        """The averaged network; None outside of a run."""
        self._settle()
        return None if self._network is None else self._network.model

    def begin(self, student: nn.Module, layers: Sequence[str | nn.Module]) -> None:
        """Make the average of a student, or go on with that of the last run.

        Raises:
            ValueError: A layer is unknown, or the average is one of another student.
        """
        inner = unwrap(student)
        names = {id(module): plain_name(name) for name, module in inner.named_modules()}
        wanted = [names.get(id(one), "") if isinstance(one, nn.Module) else one for one in layers]
        network = self._copy(inner, _cut(self._values, self._cuts))
        network.begin(student, wanted)
        self.end()
        follow(inner, self)
        self._student, self._layers, self._network = inner, wanted, network
        self._values, self._cuts = {}, ()

    def _copy(self, student: nn.Module, values: Mapping[str, Tensor]) -> NetworkTeacher:
        copy = copied(student).requires_grad_(False)
        own = tensors_of(copy)
        if values:
            _check_fit(own, values)
            with torch.no_grad():
                for name, tensor in own.items():
                    tensor.copy_(values[name])
        return NetworkTeacher(copy)

    def answer(self, batch: Batch) -> Answers:
        """Let the average answer."""
        self._settle()
        assert self._network is not None
        return self._network.answer(batch)

    def after_step(self) -> None:
        """Move the average towards the student."""
        self._settle()
        assert self._network is not None
        assert self._student is not None
        own, other = tensors_of(self._network.model), tensors_of(self._student)
        moving = [name for name, x in own.items() if x.is_floating_point()]
        with torch.no_grad():
            torch._foreach_lerp_([own[n] for n in moving], [other[n].detach() for n in moving], 1 - self.decay)
            for name in own.keys() - set(moving):
                own[name].copy_(other[name])

    def after_cut(self, cut: Cut) -> None:
        """Note that the student's parameters have got smaller; the average follows when it is next asked."""
        if self._network is not None and self._values:
            return  # a pruner cuts a dense student to what it was when the state was saved
        self._cuts = (*self._cuts, cut)  # replaced: a removal that is undone puts the old value back

    def _settle(self) -> None:
        """Copy the student, which may be smaller now, with the average's slices or the values that were loaded."""
        if self._network is None or self._student is None or not (self._cuts or self._values):
            return
        values = self._values or _cut(tensors_of(self._network.model), self._cuts)
        other = self._copy(self._student, values)
        other.begin(self._student, self._layers)
        self._network.end()
        self._network, self._values, self._cuts = other, {}, ()

    def end(self) -> None:
        """Keep the average for a further run."""
        network = self._network
        if network is not None:
            if not self._values:  # no tensor is worked with here, where the run may end inside of a trace of torch's
                self._values = {plain_name(name): x for name, x in _named(network.model)}
            network.end()
        self._network = self._student = None

    def state_dict(self) -> dict[str, Any]:
        """Return copies of the average's parameters and buffers by name."""
        if not self._values:
            self._settle()
        between = self._values or self._network is None
        values = _cut(self._values, self._cuts) if between or self._network is None else tensors_of(self._network.model)
        return {"average": {name: x.detach().clone() for name, x in values.items()}}

    def check_state(self, state: Any) -> None:
        """Refuse what is no average."""
        check_parts(state, "EMATeacher", {"average": finite_tensors})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with a saved average; it is taken over when it is needed, since a pruner may cut the student until then."""
        self._values, self._cuts = {name: x.detach().clone() for name, x in state["average"].items()}, ()


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers of a model, each once, by plain names."""
    return {plain_name(name): x.detach() for name, x in _named(model)}


def _named(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _cut(values: Mapping[str, Tensor], cuts: Sequence[Cut]) -> dict[str, Tensor]:
    result = dict(values)
    for cut in cuts:
        result = {name: sliced(x, cut, name) for name, x in result.items()}
    return result


def _check_fit(own: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Refuse an average of another student.

    Raises:
        ValueError: A name or a shape differs.
    """
    for name in sorted(own.keys() | values.keys()):
        mine, theirs = (tuple(x[name].shape) if name in x else None for x in (own, values))
        if mine != theirs:
            raise ValueError(
                f"student must be the one that the average was made of, got {name} of shape {mine} where the average has "
                f"{theirs}; take a new EMATeacher for another student"
            )
