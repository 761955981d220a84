from __future__ import annotations

from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasterai.callbacks.plain import attach
from fasterai.distill.distiller import Distiller
from fasterai.distill.losses.adapters import Projections, pointwise
from fasterai.distill.losses.features import MGD, ActivationBoundaries, Attention, Contrastive, FitNet, ReviewKD, Similarity
from fasterai.distill.losses.loss import Adapter, FeatureLoss
from fasterai.prune.gradual import GradualPruner

READING = {
    "ActivationBoundaries": ActivationBoundaries(),
    "Contrastive": Contrastive(dim=8),
    "FitNet": FitNet(),
    "MGD": MGD(ratio=0),
    "ReviewKD": ReviewKD(middle=4),
}
KEPT = np.array([0, 2, 5])
X, Y = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0, 1, 2])


def random(*shapes: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def made(loss: FeatureLoss, student: list[Tensor], teacher: list[Tensor]) -> Any:
    torch.manual_seed(0)
    return loss.adapter(student, teacher)


@pytest.mark.parametrize(
    ("own", "other", "layer"),
    [
        ((4, 3), (4, 5), nn.Linear),
        ((4, 7, 3), (4, 7, 5), nn.Conv1d),
        ((4, 3, 4, 4), (4, 5, 4, 4), nn.Conv2d),
        ((4, 1, 4, 4), (4, 5, 2, 8), nn.Conv2d),
        ((4, 9, 3), (4, 5, 3, 3), nn.Conv2d),
        ((4, 3, 2, 2, 2), (4, 5, 4, 2, 2), nn.Conv3d),
    ],
)
def test_channels_that_differ_are_projected(own, other, layer):
    adapter = made(FitNet(), *([x] for x in random(own, other)))
    assert [type(one) for one in adapter.layers.values()] == [layer]
    assert tuple(adapter.layers["0"].weight.shape[:2]) == (5, 1 if own[1] == 1 else 3)
    assert adapter.layers["0"].weight[0, 0].numel() == 1


@pytest.mark.parametrize("loss", [FitNet(), ActivationBoundaries()])
@pytest.mark.parametrize("shape", [(4, 3), (4, 7, 3), (4, 3, 4, 4)])
def test_where_channels_fit_nothing_trains(loss, shape):
    adapter = made(loss, *([x] for x in random(shape, shape)))
    assert list(adapter.parameters()) == []
    assert adapter.state_dict() == {}


@pytest.mark.parametrize("loss", [Attention(), Similarity()])
def test_losses_without_channels_need_no_adapter(loss):
    assert loss.adapter(*([x] for x in random((4, 3, 4, 4), (4, 5, 2, 2)))) is None


def test_three_dimensions_may_be_maps():
    loss = FitNet(channels_first=True)
    student, teacher = random((4, 3, 8), (4, 5, 4))
    adapter = made(loss, [student], [teacher])
    assert tuple(adapter.layers["0"].weight.shape) == (5, 3, 1)
    expected = F.mse_loss(adapter.layers["0"](F.avg_pool1d(student, 2)), teacher)
    torch.testing.assert_close(loss(student, teacher, None, adapter), expected)


def test_a_linear_layer_of_tokens_is_that_of_torch():
    student, teacher = random((4, 7, 3), (4, 7, 5))
    adapter = made(FitNet(), [student], [teacher])
    layer = adapter.layers["0"]
    expected = F.mse_loss(F.linear(student, layer.weight[..., 0], layer.bias), teacher)
    torch.testing.assert_close(FitNet()(student, teacher, None, adapter), expected)


@pytest.mark.parametrize("name", READING)
def test_seeds_reproduce_the_first_values(name):
    pair = [[x] for x in random((4, 6, 4, 4), (4, 5, 4, 4))]
    one, other = (made(READING[name], *pair).state_dict() for _ in range(2))
    third = READING[name].adapter(*pair).state_dict()
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert not all(torch.equal(one[key], third[key]) for key in one)


# --- channels that go --------------------------------------------------------------------------------------------------


def loss_of(name: str, adapter: Adapter, student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    return READING[name](student, teacher, None, adapter)


@pytest.mark.parametrize("name", READING)
def test_an_adapter_follows_channels_that_were_silent(name):
    """The student's channels 1, 3 and 4 are zero: without them nothing changes. The second pair stays as it is."""
    student, teacher = random((4, 6, 4, 4), (4, 3, 4, 4)), random((4, 5, 4, 4), (4, 5, 4, 4), seed=1)
    student[0][:, [1, 3, 4]] = 0
    adapter = made(READING[name], student, teacher)
    before = loss_of(name, adapter, student, teacher)
    before.backward()
    shapes = {n: tuple(p.shape) for n, p in adapter.named_parameters()}
    own, gradients = list(adapter.parameters()), [p.grad for p in adapter.parameters()]
    cut = adapter.keep_(0, KEPT)
    small = [student[0][:, KEPT], student[1]]
    torch.testing.assert_close(loss_of(name, adapter, small, teacher), before)
    assert all(p is q for p, q in zip(own, adapter.parameters(), strict=True))
    smaller = {n for n, p in adapter.named_parameters() if tuple(p.shape) != shapes[n]}
    assert {n for n, p in adapter.named_parameters() if any(p is q for q in cut)} == smaller
    assert len(smaller) == 1
    for p, gradient in zip(own, gradients, strict=True):
        kept = gradient if p not in cut else gradient[:, KEPT]
        assert p.grad is not None
        assert torch.equal(p.grad, kept)
    loss_of(name, adapter, small, teacher).backward()


@pytest.mark.parametrize("name", READING)
def test_an_adapter_follows_where_shapes_were_alike(name):
    """As of a student that begins as a copy of its teacher; two cuts, the second one counted from what the first has left."""
    teacher, one, other = random((4, 6, 4, 4), (4, 3, 4, 4), (4, 5, 4, 4), seed=1)
    student, teachers = [teacher.clone(), one], [teacher, other]
    adapter = made(READING[name], student, teachers)
    adapter.keep_(0, torch.tensor([0, 1, 2, 5]))
    adapter.keep_(0, torch.tensor([0, 2, 3]))
    small = [student[0][:, KEPT], one]
    found = loss_of(name, adapter, small, teachers)
    if name in ("FitNet", "ActivationBoundaries"):
        loss = READING[name]
        second = F.conv2d(one, adapter.layers["1"].weight, adapter.layers["1"].bias)
        torch.testing.assert_close(found, loss(small[0], teacher[:, KEPT]) + loss(second, other))
    resumed = made(READING[name], small, teachers)
    resumed.load_state_dict(adapter.state_dict())
    assert torch.equal(loss_of(name, resumed, small, teachers), found)
    assert [tuple(p.shape) for p in resumed.parameters()] == [tuple(p.shape) for p in adapter.parameters()]


@pytest.mark.parametrize("name", READING)
def test_a_state_of_other_layers_is_refused(name):
    one = made(READING[name], *([x] for x in random((4, 6, 4, 4), (4, 5, 4, 4))))
    other = made(READING[name], *([x] for x in random((4, 6, 4, 4), (4, 7, 4, 4))))
    with pytest.raises(RuntimeError, match="size mismatch"):
        one.load_state_dict(other.state_dict())


def test_a_layer_that_a_state_does_not_have_is_missed():
    one = made(FitNet(), *([x] for x in random((4, 6, 4, 4), (4, 5, 4, 4))))
    with pytest.raises(RuntimeError, match="Missing key"):
        one.load_state_dict({})


def test_a_graph_of_before_a_cut_does_not_spoil_later_gradients():
    """A loss that is still held keeps the node that gathers gradients, of the shape that was."""
    student, teacher = random((4, 6, 4, 4), (4, 5, 4, 4))
    adapter = made(FitNet(), [student], [teacher])
    held = FitNet()(student, teacher, None, adapter)
    adapter.keep_(0, KEPT)
    FitNet()(student[:, KEPT], teacher, None, adapter).backward()
    assert adapter.layers["0"].weight.grad.shape == (5, 3, 1, 1)
    assert held.requires_grad


def test_projections_without_pairs_pass_maps_on():
    student, teacher = random((4, 3), (4, 5))
    found = Projections()(0, student, teacher)
    assert found[0] is student
    assert found[1] is teacher
    assert isinstance(pointwise(0, 2, 3), nn.Linear)


# --- in a loop ---------------------------------------------------------------------------------------------------------


def network(channels: int, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    first = [nn.Conv2d(3, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU()]
    second = [nn.Conv2d(channels, 2 * channels, 3, 2, padding=1), nn.ReLU()]
    return nn.Sequential(*first, *second, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * channels, 3))


def train(loss: FeatureLoss, steps: int, state: dict[str, Any] | None = None) -> Any:
    """Train a student of its own for some of six steps, and return its state and the losses."""
    teacher, student = network(4, 0), network(3, 1)
    optimizer = torch.optim.Adam(student.parameters(), 0.01)
    distiller = Distiller(teacher, loss, ["2", "4"], ["2", "4"], weight=0.8)
    losses, first = [], 0
    with attach(optimizer, distiller, total_steps=6, model=student) as handle:
        if state is not None:
            student.load_state_dict(state["student"])
            optimizer.load_state_dict(state["optimizer"])
            handle.load_state_dict(state["handle"])
            first = state["step"]
        torch.set_rng_state(torch.Generator().manual_seed(9).get_state() if state is None else state["random"])
        for _ in range(first, steps):
            x = X + torch.randn_like(X)
            outputs = student(x)
            loss_value = handle.loss(F.cross_entropy(outputs, Y), x, Y, outputs)
            optimizer.zero_grad()
            loss_value.backward()
            optimizer.step()
            losses.append(float(loss_value.detach()))
        parts = {"student": student.state_dict(), "optimizer": optimizer.state_dict(), "handle": handle.state_dict()}
    return {**parts, "step": steps, "random": torch.get_rng_state()}, losses


@pytest.mark.parametrize("name", ["Attention", "ActivationBoundaries", "Contrastive", "FitNet", "MGD", "ReviewKD"])
def test_stopped_and_resumed_is_one_run(name):
    loss = {"Attention": Attention(), "MGD": MGD(ratio=0.5)}.get(name) or READING[name]
    whole, losses = train(loss, 6)
    half, before = train(loss, 3)
    resumed, after = train(loss, 6, state=half)
    assert before + after == losses
    for key, saved in whole["student"].items():
        assert torch.equal(resumed["student"][key], saved), key
    flat = [torch.utils._pytree.tree_leaves(one["handle"]) for one in (whole, resumed)]
    assert all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(*flat, strict=True))


@pytest.mark.filterwarnings("ignore:the run ends without a step")
def test_shapes_that_cannot_be_adapted_are_refused_with_the_layers():
    student = network(3, 1)
    distiller = Distiller(network(4, 0), FitNet(), ["2", "4"], ["2", "7"])
    message = r"features of the student's layer 4 and the teacher's 7 must be .* got \(6, 6, 4, 4\) of .* and \(6, 3\) of"
    with attach(torch.optim.SGD(student.parameters(), 0.1), distiller, total_steps=6, model=student) as handle:
        outputs = student(X)
        with pytest.raises(ValueError, match=message):
            handle.loss(F.cross_entropy(outputs, Y), X, Y, outputs)


@pytest.mark.parametrize("name", READING)
@pytest.mark.parametrize("is_copy", [True, False])
def test_channels_go_while_a_loss_compares_them(name, is_copy):
    """Of a student that began as a copy of its teacher, too; the optimizer's state follows, or its step would fail."""
    student = network(4, 1)
    teacher = deepcopy(student) if is_copy else network(6, 0)
    optimizer = torch.optim.Adam(student.parameters(), 0.01)
    pruner = GradualPruner(student, 0.5, "local", "large_final", "agp", example_inputs=X, round_to=1)
    distiller = Distiller(teacher, READING[name], ["2", "4"], ["2", "4"])
    with attach(optimizer, pruner, distiller, total_steps=3, model=student) as handle:
        for _ in range(3):
            outputs = student(X)
            loss = handle.loss(F.cross_entropy(outputs, Y), X, Y, outputs)
            assert torch.isfinite(loss)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert len(student[0].weight) == 2
