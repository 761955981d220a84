"""Looking at a model leaves no trace in it: attributes, their entries, hooks, modes, values, gradients, random numbers."""

from __future__ import annotations

from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fasterai.analyze.cost import cost
from fasterai.graph.channels import channel_graph
from fasterai.model.attributes import attributes_kept
from fasterai.prune.pruner import Pruner
from fasterai.sparse.sparsifier import Sparsifier


class Child(nn.Module):
    def __init__(self, shared: Any) -> None:
        super().__init__()
        self.shared, self.own = shared, nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.own(x).relu()


class Sharing(nn.Module):
    """Containers of every kind, shared with a child; heads that only training uses, found through the shared list."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.lists, self.sizes = [[1, 2], nn.Conv2d(8, 2, 1)], {"a": [8], "b": (8, [8])}
        self.names, self.queue, self.ordered, self.counts = {"x"}, deque([1]), OrderedDict(a=1), defaultdict(list)
        self.child, self.head, self.pair = Child(self.lists), nn.Linear(8, 2), (self.lists, self.sizes)
        self.child.sizes = self.sizes
        self.register_buffer("seen", torch.zeros(()))
        self.last: Any = None

    def forward(self, x: Tensor) -> Tensor:
        x = self.child(self.norm(self.stem(x)))
        self.last = x
        self.queue.append(2)
        self.counts["calls"].append(len(self.queue))
        self.names.add("y")
        return self.head(x.mean((2, 3)))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inside, self.cell, self.head = nn.Conv2d(3, 8, 8), nn.LSTM(8, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(self.inside(x).flatten(1)[None])[0][0])


def plain() -> nn.Module:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Dropout(), nn.Flatten(), nn.Linear(128, 2)
    )
    net[1].eval()
    net[3].register_forward_hook(lambda *_: None)
    net[0].register_full_backward_hook(lambda *_: None)
    return net


def states(model: nn.Module) -> list[Any]:
    """List what makes up a model, down to the identity of each attribute and each entry."""
    found: list[Any] = [torch.get_rng_state().tolist()]

    def walk(where: str, x: Any) -> None:
        found.append((where, id(x)))
        if isinstance(x, dict):
            for key, value in x.items():
                walk(f"{where}[{key!r}]", value)
        elif isinstance(x, list | tuple | deque | set):
            for i, value in enumerate(sorted(x) if isinstance(x, set) else x):
                walk(f"{where}[{i}]", value)
        elif isinstance(x, Tensor):
            found.append((where, x.dtype, x.requires_grad, x.tolist(), None if x.grad is None else x.grad.tolist()))
        elif isinstance(x, bool | int | str):
            found.append((where, x))

    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            walk(f"{name}.{attribute}", value)
    return found


LOOKS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "channel_graph": lambda m, x: channel_graph(m, (x,)),
    "Pruner": lambda m, x: Pruner(m, 0.5, "local", "large_final", example_inputs=x),
    "cost": cost,
    "coupled": lambda m, x: Sparsifier(m, "coupled", "local", sparsity=0.5, example_inputs=x),
    "filter": lambda m, x: Sparsifier(m, "filter", "local", sparsity=0.5, example_inputs=x),
}


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("make", [Sharing, Recurrent, plain])
def test_looking_at_a_model_leaves_no_trace(make: Callable[[], nn.Module], look: str) -> None:
    torch.manual_seed(0)
    model, x = make(), torch.randn(2, 3, 8, 8)
    model(x).sum().backward()
    before = states(model)
    LOOKS[look](model, x)
    assert states(model) == before


def test_a_list_that_two_modules_share_stays_one_list() -> None:
    model = Sharing()
    channel_graph(model, (torch.randn(2, 3, 8, 8),))
    assert model.child.shared is model.lists is model.pair[0]
    assert model.child.sizes is model.sizes is model.pair[1]


def test_what_a_pass_notes_is_forgotten_and_what_it_takes_away_is_back() -> None:
    model = Sharing()
    names = list(vars(model))
    with attributes_kept(model):
        model.new, model.sizes["a"][0] = 1, 3
        model.lists.clear()
        model.queue.popleft()
        model.ordered.move_to_end("a")
        model.counts["x"] = [1]
        del model.sizes["b"], model.last
    assert list(vars(model)) == names
    assert (model.lists[0], model.sizes, model.queue, dict(model.counts)) == ([1, 2], {"a": [8], "b": (8, [8])}, deque([1]), {})


def test_attributes_come_back_after_an_error() -> None:
    model = Sharing()
    with pytest.raises(KeyError), attributes_kept(model):
        model.sizes.pop(model.lists.append(1))
    assert len(model.lists) == 2
