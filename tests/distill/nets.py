"""Small networks, losses and a loop for the tests of distillation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasterai.callbacks.plain import Handle, attach
from fasterai.distill.distiller import Distiller
from fasterai.distill.losses.features import FitNet
from fasterai.distill.losses.loss import LogitLoss

CLASSES = 4
G = torch.Generator().manual_seed(0)
X = torch.randn(12, 6, 3, 6, 6, generator=G)
Y = torch.randint(CLASSES, (12, 6), generator=G)
FIT = {"activations_student": ["1"], "activations_teacher": ["1"]}


@dataclass(frozen=True)
class Distance(LogitLoss):
    """The squared distance of logits, which can be worked out by hand."""

    def of_rows(self, student: Tensor, teacher: Tensor, labels: Tensor | None) -> Tensor:
        return (student - teacher).square().sum(1)


@dataclass(frozen=True)
class Labelled(Distance):
    """The same, where labels have to be there."""

    needs_labels = True


def net(width: int = 4, classes: int = CLASSES, seed: int = 0) -> nn.Sequential:
    """A network whose layer 1 has `width` channels."""
    torch.manual_seed(seed)
    body = nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.AdaptiveAvgPool2d(2)
    return nn.Sequential(*body, nn.Flatten(), nn.Linear(4 * width, classes))


class Named(nn.Module):
    """A student with an attribute called `model`, two inputs and an output of one's choice."""

    def __init__(self, output: Callable[[Tensor], Any] = lambda x: x, width: int = 4) -> None:
        super().__init__()
        self.model, self.output = net(width), output

    def forward(self, x: Tensor, scale: Any = 1.0, labels: Any = None) -> Any:
        return self.output(self.model(x) * scale)


class Run:
    """A plain loop with a distiller.

    Attributes:
        losses: What was trained on in each step.
    """

    def __init__(self, distiller: Distiller, student: nn.Module | None = None, *others: Any, total: int = 4, **options: Any):
        self.student = net() if student is None else student
        self.distiller = distiller
        self.optimizer = torch.optim.Adam(self.student.parameters(), 1e-2)
        self.handle: Handle = attach(self.optimizer, *others, distiller, total_steps=total, model=self.student, **options)
        self.losses: list[float] = []

    def loss(self, i: int) -> Tensor:
        outputs = self.student(X[i])
        return self.handle.loss(F.cross_entropy(outputs, Y[i]), X[i], Y[i], outputs)

    def step(self, i: int) -> None:
        loss = self.loss(i)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.losses.append(float(loss.detach()))

    def steps(self, *indices: int) -> Run:
        for i in indices:
            self.step(i)
        return self

    def saved(self) -> dict[str, Any]:
        """Return the three states, through a file as it were."""
        states = {"m": self.student.state_dict(), "o": self.optimizer.state_dict(), "h": self.handle.state_dict()}
        return _copied(states)

    def load(self, state: Mapping[str, Any]) -> Run:
        self.handle.load_state_dict(state["h"])
        self.student.load_state_dict(state["m"])
        self.optimizer.load_state_dict(_copied(state["o"]))
        return self

    @property
    def adapters(self) -> list[Tensor]:
        """The parameters in the optimizer that are none of the student's."""
        own = {id(p) for p in self.student.parameters()}
        return [p for group in self.optimizer.param_groups for p in group["params"] if id(p) not in own]

    def values(self) -> list[Tensor]:
        return [x.detach().clone() for x in (*self.student.state_dict().values(), *self.adapters)]


def _copied(states: Any) -> Any:
    import io

    file = io.BytesIO()
    torch.save(states, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def fitnet(teacher: Any = None, *losses: Any, **options: Any) -> Distiller:
    return Distiller(net(6, seed=1) if teacher is None else teacher, [FitNet(), *losses], **FIT, **options)


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def equal(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
