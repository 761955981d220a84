from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasterai.graph.channels import channel_graph
from fasterai.prune.scratch import learning
from fasterai.prune.scratch.gating import Gating
from fasterai.prune.scratch.learning import Learned, Recipe, learn_gates, read_data

RECIPE = Recipe(epochs=2, steps=None, gamma=0.5, level=0.2, lr=0.3)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))


def batches(count: int = 3) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(8, 4), torch.randint(3, (8,))) for _ in range(count)]


def learn(model: nn.Module, data: Any, recipe: Recipe = RECIPE, **options: Any) -> Learned:
    gating = Gating(model, channel_graph(model, (torch.randn(2, 4),)))
    return learn_gates(model, gating, data, recipe, progress=False, **options)


def test_gates_follow_the_published_rule() -> None:
    model, data = network(), batches()
    found = learn(network(), data)
    gates = torch.ones(6)
    first, second, total = torch.zeros(6), torch.zeros(6), torch.zeros(6)
    losses = []
    for step in range(1, 7):
        x, y = data[(step - 1) % 3]
        gates.requires_grad_()
        task = F.cross_entropy(model[3](F.relu(gates * model[1](model[0](x)))), y)
        (g,) = torch.autograd.grad(task + 0.5 * (gates.sum() / 6 - 0.2) ** 2, gates)
        first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g**2
        moved = gates.detach() - 0.3 * (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
        gates = moved.clamp(0, 1)
        total, losses = total + gates, [*losses, float(task.detach())]
    assert (gates == 0).any()  # the projection has acted
    torch.testing.assert_close(found.gates, gates.double(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.averages, (total / 6).double(), rtol=1e-4, atol=1e-5)
    assert found.losses == pytest.approx((sum(losses[:3]) / 3, sum(losses[3:]) / 3), rel=1e-4)
    assert found.means[1] == pytest.approx(float(gates.mean()), rel=1e-4)
    assert found.steps == 6


def test_weights_stay_and_steps_end_the_search_within_an_epoch() -> None:
    model = network()
    before = {name: p.clone() for name, p in model.named_parameters()}
    found = learn(model, batches(), Recipe(9, 4, 0.5, 0.2, 0.3))
    assert (found.steps, len(found.losses)) == (4, 2)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


class Interrupted:
    """Batches in an order of torch's generator; reading ends with an error after so many."""

    def __init__(self, most: int) -> None:
        self.left, self.data = most, batches(8)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for i in torch.randperm(8).tolist()[:3]:
            if not self.left:
                raise KeyboardInterrupt
            self.left -= 1
            yield self.data[i]


def test_a_search_goes_on_where_it_was_interrupted_bit_for_bit(tmp_path: Path) -> None:
    recipe = Recipe(4, None, 0.5, 0.2, 0.1)

    def begin(most: int, seed: int, **options: Any) -> Learned:
        model, data = network(), Interrupted(most)
        torch.manual_seed(seed)
        return learn(model, data, recipe, **options)

    whole = begin(99, 7)
    for most, seed in ((4, 7), (5, 8)):  # in the second epoch, then in the third
        with pytest.raises(KeyboardInterrupt):
            begin(most, seed, folder=tmp_path, words={"seed": "0"})
    found = begin(99, 9, folder=tmp_path, words={"seed": "0"})
    assert torch.equal(found.gates, whole.gates)
    assert torch.equal(found.averages, whole.averages)
    assert (found.losses, found.means, found.steps) == (whole.losses, whole.means, whole.steps)
    done = learn(network(), Interrupted(0), recipe, folder=tmp_path, words={"seed": "0"})
    assert torch.equal(done.gates, whole.gates)
    with pytest.raises(ValueError, match=r"folder must be of the same call, got .*seed was 0 and is 1"):
        learn(network(), batches(), recipe, folder=tmp_path, words={"seed": "1"})
    (tmp_path / "gates.pt").write_bytes(b"torn")
    with pytest.raises(ValueError, match="folder must hold what search_from_scratch wrote"):
        learn(network(), batches(), recipe, folder=tmp_path, words={"seed": "0"})


def test_other_losses() -> None:
    class Answer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = network()

        def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
            logits = self.body(x)
            return logits if labels is None else SimpleNamespace(loss=F.cross_entropy(logits, labels))

    wanted = learn(network(), batches()).gates
    assert torch.equal(learn(network(), batches(), loss=F.cross_entropy).gates, wanted)
    named = [{"x": x, "labels": y} for x, y in batches()]
    assert torch.equal(learn(Answer(), named).gates, wanted)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([(torch.randn(8, 4),)], r"data must hold labels, as batches .x, y., got 1 input alone; or pass loss="),
        ([(torch.full((8, 4), torch.nan), torch.zeros(8, dtype=torch.long))], "loss must be finite, got nan at step 1"),
    ],
    ids=["labels", "nan"],
)
def test_data_that_gates_cannot_be_learned_on(data: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        learn(network(), data)


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ("folder", TypeError, "data must be batches"),
        (torch.zeros(3), TypeError, "data must be batches"),
        (iter([1]), ValueError, "data must be batches that can be read again, got list_iterator"),
        ([], ValueError, "data must hold at least one batch, got none"),
    ],
    ids=["text", "tensor", "iterator", "empty"],
)
def test_what_is_no_data(data: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        read_data(data)


def test_processes_average_their_gradients(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    alone = learn(network(), batches())
    other = torch.tensor([-9.0, 0, 0, 0, 0, 0])  # the other process: its first gate only helps
    seen: list[Tensor] = []
    two = SimpleNamespace(is_available=lambda: True, is_initialized=lambda: True, get_world_size=lambda: 2)
    two.all_reduce = lambda g: seen.append(g.clone()) or g.add_(seen[-1] + other)
    monkeypatch.setattr(learning, "distributed", two)
    found = learn(network(), batches())
    assert len(seen) == 6
    assert found.gates[0] == 1 > alone.gates[0]
    two.all_reduce = lambda g: g.mul_(2)
    assert torch.equal(learn(network(), batches()).gates, alone.gates)
    with pytest.raises(ValueError, match="folder must be left out where 2 processes search together"):
        learn(network(), batches(), folder=tmp_path)
