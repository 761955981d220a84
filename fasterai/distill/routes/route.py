"""Route of a teacher: a student learns from the checkpoints of its training, one after another (RCO)."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from fasterai.core.batch import Batch
from fasterai.core.checks import check_count, check_fraction, not_one_of
from fasterai.core.saved import check_parts, settings_in_words, whole
from fasterai.display import Shown, Table, counted, one_line
from fasterai.distill.distiller import Distiller
from fasterai.distill.losses.logits import SoftTarget
from fasterai.distill.losses.loss import Loss
from fasterai.distill.routes.anchors import Anchor, as_anchor, check_anchors, find_files, load_anchor_
from fasterai.distill.routes.hardness import Greedy, check_data, held_out_batches, outputs_of, relative_entropy
from fasterai.distill.routes.result import RouteResult
from fasterai.distill.routes.stages import Journey, Train
from fasterai.distill.teachers import Answers, NetworkTeacher, Teacher
from fasterai.model.supported import network_in

__all__ = ["Route", "RouteTeacher"]

Checkpoint = str | os.PathLike[str] | Mapping[str, Any] | nn.Module | Anchor
#: Arguments of the `Distiller` that may be passed on to each stage.
OPTIONS = ("activations_student", "activations_teacher", "schedule")


class Route(Shown):
    """Way of a teacher through its training: its anchors, in order, of which one network holds one at a time.

    Jin et al., Knowledge Distillation via Route Constrained Optimization, ICCV 2019.

    Args:
        anchors: The anchors, the first one of the training first, the converged teacher last.
        model: The teacher's network, whose tensors anchors are written into; None if the anchors are networks themselves.

    Raises:
        ValueError: There are no anchors, or one is of another network.
        TypeError: An argument is of the wrong type.
    """

    def __init__(self, anchors: Sequence[Anchor], model: nn.Module | None = None) -> None:
        if not anchors:
            raise ValueError("checkpoints must hold an anchor at least, got none")
        if model is None and not all(isinstance(one.source, nn.Module) for one in anchors):
            raise TypeError("model must be the teacher's network, for checkpoints that are no networks themselves, got None")
        if model is not None and not isinstance(model, nn.Module):
            raise not_one_of("model", "the teacher's network", model, network_in(model))
        if model is not None:
            check_anchors(anchors, model)
        self.anchors, self.model = tuple(anchors), model

    @classmethod
    def from_checkpoints(cls, checkpoints: Iterable[Checkpoint], model: nn.Module | None = None) -> Route:
        """Return the route of checkpoints in the order of the training.

        Args:
            checkpoints: Files of torch or safetensors, folders of Hugging Face, state dicts, or networks. Weights may lie under
                `state_dict` or `model`, as in files of Lightning and fastai, and wrappers may stand before their names.
            model: The teacher's network, which anchors are loaded into; not needed for networks.
        """
        if isinstance(checkpoints, str | os.PathLike | Mapping | nn.Module):
            raise TypeError(f"checkpoints must be a list, got a {type(checkpoints).__name__}; pass [it], or Route.from_folder")
        return cls([as_anchor(one, i) for i, one in enumerate(checkpoints, 1)], model)

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str], model: nn.Module) -> Route:
        """Return the route of the checkpoints in a folder, in the order of the numbers in their names.

        Raises:
            ValueError: It is no folder, or holds none.
        """
        place = Path(folder)
        if not place.is_dir():
            raise ValueError(f"folder must be one of checkpoints, got {place}, which is none")
        files = list(find_files(place))
        if not files:
            raise ValueError(f"folder must hold checkpoints (.pt, .pth, .ckpt, .safetensors), got {place}, which holds none")
        return cls.from_checkpoints(files, model)

    def __len__(self) -> int:
        return len(self.anchors)

    def _line(self) -> str:
        return f"<Route: {counted(len(self), 'anchor')}, {self.anchors[0].name} to {self.anchors[-1].name}>"

    def _parts(self) -> Iterator[Table | str]:
        yield f"Route of {counted(len(self), 'anchor')}"
        yield Table(("anchor", "checkpoint"), [(str(i), one_line(one.name)) for i, one in enumerate(self.anchors, 1)], left=2)

    def every(self, k: int) -> Route:
        """Return the route of every k-th anchor, counted from 1, and the last: k, 2k and so on."""
        step = check_count("k", k)
        chosen = [*range(step - 1, len(self), step)]
        chosen += [] if chosen and chosen[-1] == len(self) - 1 else [len(self) - 1]
        route = object.__new__(type(self))
        route.anchors, route.model = tuple(self.anchors[i] for i in chosen), self.model
        return route

    def load(self, i: int) -> nn.Module:
        """Write an anchor into the teacher's network, and return that; an anchor that is a network is returned itself."""
        source = self.anchors[i].source
        if isinstance(source, nn.Module) and (self.model is None or source is self.model):
            return source
        assert self.model is not None
        load_anchor_(self.model, self.anchors[i])
        return self.model

    def check_student(self, student: nn.Module) -> None:
        """Refuse a student that shares a parameter with the teacher's network, which is written into.

        Raises:
            ValueError: It does.
        """
        networks = [self.model] if self.model is not None else [one.source for one in self.anchors]
        own = {id(p) for p in student.parameters()}
        if any(id(p) in own for one in networks if isinstance(one, nn.Module) for p in one.parameters()):
            raise ValueError(
                "model must share no parameter with the student, since anchors are written into it, got one that does; pass "
                "copy.deepcopy(model)"
            )

    def one_stage(self) -> RouteTeacher:
        """Return a teacher that goes the route during one training of the student, for a `Distiller` or its callbacks."""
        return RouteTeacher(self)

    def hardness(self, student: nn.Module, data: Iterable[Any], start: int = 0) -> list[float]:
        """Return the hardness of each anchor for a student: the mean of `KL(anchor || student)` over samples, in nats.

        Args:
            student: The student, as it is.
            data: Batches of held-out samples.
            start: The first anchor.
        """
        self.check_student(student)
        check_data(data)
        batches = held_out_batches(data)
        own = outputs_of(student, batches)
        return [relative_entropy(outputs_of(self.load(j), batches), own) for j in range(start, len(self))]

    def distil(
        self,
        train: Train,
        student: nn.Module,
        loss: Loss | Sequence[Loss] = SoftTarget(T=4.0),  # noqa: B008 - frozen
        weight: float = 0.9,
        *,
        choose: Greedy | None = None,
        folder: str | os.PathLike[str] | None = None,
        **options: Any,
    ) -> RouteResult:
        """Train a student stage by stage: each stage has an anchor as its teacher, and goes on from the weights of the last.

        Each stage calls `train(student, participants)`, which trains once, from its first step to its last, with the
        participants in the loop: `attach(optimizer, *participants, ..., model=student)`, or a `ParticipantCallback` of them.
        The teacher's network holds the last anchor at the end. If anything fails, the student is as it was.

        Args:
            train: The training of a stage. What it returns is noted if it is a number, such as an accuracy.
            student: The student with its first weights, wrapped or not.
            loss: The distillation loss, or several.
            weight: The share of the distillation in the loss, in [0, 1].
            choose: `Greedy(delta, data)` leaves out anchors by their hardness; None for every one of them.
            folder: A folder for the state after each stage. The same call goes on after the last whole stage, with the random
                numbers of torch, numpy and Python that it would have drawn.
            **options: Of the `Distiller`: `activations_student`, `activations_teacher`, `schedule`.

        Returns:
            The stages.

        Raises:
            ValueError: An argument is out of range, `train` does not let the participants take part, or the folder is of
                another call.
            TypeError: An argument is of the wrong type.
        """
        if not callable(train):
            raise TypeError(f"train must be a function (student, participants), got {train!r} ({type(train).__name__})")
        if not isinstance(student, nn.Module):
            raise not_one_of("student", "a torch.nn.Module", student, network_in(student))
        if choose is not None and not isinstance(choose, Greedy):
            raise TypeError(f"choose must be Greedy(delta, data) or None, got {choose!r} ({type(choose).__name__})")
        for name in options:
            if name not in OPTIONS:
                raise TypeError(f"options must be of {', '.join(OPTIONS)}, got {name}")
        check_fraction("weight", weight)
        self.check_student(student)
        names = tuple(one.name for one in self.anchors)
        delta = None if choose is None else choose.delta
        words = settings_in_words(anchors=names, loss=loss, weight=weight, delta=delta, **options)

        def distiller(teacher: nn.Module) -> Distiller:
            return Distiller(teacher, loss, weight=weight, **options)

        place = None if folder is None else Path(folder)
        return Journey(train, student, names, self.load, distiller, self.hardness, choose, words, place).run()


class RouteTeacher(Teacher):
    """Teacher that goes its route while a student trains once: at position p of the run, anchor `floor(p * n)` of n.

    Each anchor teaches for the same part of the run, however long that is; the last one to its end.

    Args:
        route: The route.
    """

    def __init__(self, route: Route) -> None:
        self.route = route
        self._place = 0
        self._teacher: NetworkTeacher | None = None
        self._begun: tuple[nn.Module, Sequence[str | nn.Module]] | None = None

    def __repr__(self) -> str:
        return f"<RouteTeacher: anchor {self._place + 1} of {len(self.route)}>"

    def begin(self, student: nn.Module, layers: Sequence[str | nn.Module]) -> None:
        """Begin with the first anchor.

        Raises:
            ValueError: It shares parameters with the student, or a layer is unknown.
        """
        self.route.check_student(student)
        self._begun = student, layers
        self._go(0)

    def _go(self, place: int) -> None:
        assert self._begun is not None
        network = self.route.load(place)
        if self._teacher is None or self._teacher.model is not network:
            if self._teacher is not None:
                self._teacher.end()
            self._teacher = NetworkTeacher(network)
            self._teacher.begin(*self._begun)
        self._place = place

    def answer(self, batch: Batch) -> Answers:
        """Let the present anchor answer."""
        assert self._teacher is not None
        return self._teacher.answer(batch)

    def at_position(self, position: float) -> None:
        """Go on to the anchor of a position."""
        place = min(int(position * len(self.route) + 1e-9), len(self.route) - 1)
        if place != self._place:
            self._go(place)

    def end(self) -> None:
        """Give the network its modes back; it holds the last anchor that has taught."""
        if self._teacher is not None:
            self._teacher.end()
        self._teacher = self._begun = None

    def state_dict(self) -> dict[str, Any]:
        """Return the place of the present anchor."""
        return {"anchor": self._place}

    def check_state(self, state: Any) -> None:
        """Refuse a saved state that does not fit.

        Raises:
            ValueError: The route has no such anchor.
            TypeError: It is no number.
        """
        check_parts(state, "RouteTeacher", {"anchor": whole})
        if state["anchor"] >= len(self.route):
            raise ValueError(f"state's anchor must be one of the route's {len(self.route)}, got {state['anchor'] + 1}")

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the anchor of a saved state."""
        self.check_state(state)
        if self._begun is None:
            self._place = state["anchor"]
        else:
            self._go(state["anchor"])
