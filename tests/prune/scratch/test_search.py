import copy
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasterai.prune.choice.budget import Budget
from fasterai.prune.scratch.found import FromScratch
from fasterai.prune.scratch.search import search_from_scratch
from fasterai.prune.small_files import load_small, save_small
from tests.networks import perceptron
from tests.prune.scratch.nets import NETS, make

HALF = Budget(macs=0.5)


def batches(x: Tensor, count: int = 2, classes: int = 4) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn_like(x), torch.randint(classes, (len(x),))) for _ in range(count)]


def search(model: nn.Module, x: Tensor, budget: Budget = HALF, **options: Any) -> FromScratch:
    return search_from_scratch(model, batches(x), budget, **{"steps": 2, "lr": 0.1, "progress": False, **options})


def mlp() -> tuple[nn.Module, Tensor]:
    return perceptron(8, 40, 40, 4), torch.randn(16, 8)


@pytest.mark.parametrize("name", list(NETS))
@pytest.mark.filterwarnings("ignore:.*was asked for")  # eight channels: one is more than 1 %
def test_a_small_network_is_found_whose_shapes_fit_and_that_trains(name: str) -> None:
    model, x = make(name)
    before = copy.deepcopy(model.state_dict())
    found = search(model, x)
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())
    assert found.share <= 0.5
    assert found.small.macs == round(found.share * found.dense.macs)
    assert all(1 <= width.small <= width.searched == width.dense for width in found.widths.values())
    small = found.model
    assert small.training
    optimizer = torch.optim.SGD(small.parameters(), 0.01)
    torch.autograd.backward(F.cross_entropy(small(x), torch.zeros(len(x), dtype=torch.long)))
    optimizer.step()
    assert small(x).isfinite().all()
    exported = torch.export.export(small.eval(), (x,))
    torch.testing.assert_close(exported.module()(x), small(x))


@pytest.mark.parametrize("budget", [Budget(macs=0.5), Budget(macs=0.2), Budget(params=0.4)], ids=repr)
def test_the_budget_is_met_within_one_percent(budget: Budget, recwarn: pytest.WarningsRecorder) -> None:
    found = search(*mlp(), budget)
    dense = sum(p.numel() for p in mlp()[0].parameters())
    small = sum(p.numel() for p in found.model.parameters())
    widths = [w.small for w in found.widths.values()]
    macs = 8 * widths[0] + widths[0] * widths[1] + widths[1] * 4
    share = macs / (8 * 40 + 40 * 40 + 40 * 4) if budget.kind == "macs" else small / dense
    assert budget.share - 0.01 <= share <= budget.share
    assert found.share == pytest.approx(share)
    assert not recwarn.list


def test_the_highest_gates_of_the_whole_network_stay() -> None:
    found = search(*mlp(), Budget(macs=0.3), steps=6)
    kept = {name: found.plan.keep[name, 0] for name in found.widths}
    highest = max(float(gates[np.setdiff1d(np.arange(40), kept[name])].max()) for name, gates in found.gates.items())
    lowest = min(float(gates[kept[name]].min()) for name, gates in found.gates.items())
    assert lowest >= highest - 1e-9  # one group may end within the last step of the search
    assert found.widths["0.weight"].small != found.widths["2.weight"].small


class OneSided(nn.Module):
    """The wide way is multiplied by zero, so that its gates fall together; the narrow one makes the answer."""

    def __init__(self) -> None:
        super().__init__()
        self.idle, self.used = nn.Linear(8, 30), nn.Linear(8, 6)
        self.a, self.b = nn.Linear(30, 4), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return 0 * self.a(F.relu(self.idle(x))) + self.b(F.relu(self.used(x)))


@pytest.mark.filterwarnings("ignore:.*was asked for")
def test_no_layer_is_emptied_and_idle_channels_go_first() -> None:
    model = OneSided()
    x = torch.randn(16, 8)
    options: dict[str, Any] = {"gamma": 5.0, "level": 1 / 6, "lr": 0.05, "epochs": 20, "progress": False}
    found = search_from_scratch(
        model,
        batches(x, 2),
        Budget(macs=0.21),
        loss=lambda output, y: -10 * output.mean(),  # all that is read is worth its gate
        reset=lambda one: nn.init.ones_(one.b.weight),
        **options,
    )
    assert found.gates["idle.weight"].max() < found.gates["used.weight"].min()
    assert (found.widths["idle.weight"].small, found.widths["used.weight"].small) == (1, 6)


def test_twice_is_equal_bit_for_bit_and_generators_stay() -> None:
    model, x = mlp()
    loader = torch.utils.data.DataLoader(list(zip(*batches(x, 1)[0], strict=True)), batch_size=4, shuffle=True)

    def once(seed: int) -> FromScratch:
        return search_from_scratch(model, loader, HALF, steps=4, seed=seed, progress=False)

    torch.manual_seed(11)
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    first = once(3)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == states[1:]
    torch.rand(5)
    with torch.no_grad():
        model[0].weight.mul_(2)  # the weights that the model has do not matter
    again, other = once(3), once(4)
    for name, gates in first.gates.items():
        assert torch.equal(gates, again.gates[name])
        assert not torch.equal(gates, other.gates[name])
    weights = first.model.state_dict()
    assert all(torch.equal(t, weights[name]) for name, t in again.model.state_dict().items())
    first.model.eval()
    assert all(torch.equal(t, weights[name]) for name, t in first.fresh(3).state_dict().items())
    assert not torch.equal(first.fresh(5)[0].weight, weights["0.weight"])
    assert all(module.training for module in first.fresh(5).modules())


def test_expanded_networks_meet_the_budget_of_the_one_that_was_given() -> None:
    model, x = mlp()
    found = search(model, x, expand=1.25)
    assert [(w.dense, w.searched) for w in found.widths.values()] == [(40, 50), (40, 50)]
    assert 0.49 < found.share <= 0.5
    whole = search(model, x, Budget(macs=1.0), expand=1.25)
    assert 0.99 < whole.share <= 1
    given = search(perceptron(8, 50, 50, 4), x, dense=model)
    assert given.widths == found.widths


def test_a_folder_gives_other_budgets_from_the_same_gates(tmp_path: Path) -> None:
    model, x = mlp()
    first = search(model, x, folder=tmp_path)

    def never(output: Tensor, y: Tensor) -> Tensor:
        raise AssertionError

    state = torch.load(tmp_path / "gates.pt", weights_only=True)
    assert state["steps"] == 2
    second = search(model, x, Budget(params=0.25), folder=tmp_path)
    assert all(torch.equal(gates, second.gates[name]) for name, gates in first.gates.items())
    assert second.share <= 0.25
    with pytest.raises(ValueError, match=r"folder must be of the same call, .*loss was None"):
        search(model, x, folder=tmp_path, loss=never)


def test_the_small_network_goes_through_a_file(tmp_path: Path) -> None:
    model, x = mlp()
    small = search(model, x).model.eval()
    save_small(tmp_path / "small.safetensors", small)
    torch.testing.assert_close(load_small(tmp_path / "small.safetensors", mlp()[0]).eval()(x), small(x))


class FixedWidth(nn.Module):
    """Its code checks the number of channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        if h.shape[1] > 12:
            raise RuntimeError("12 at most")
        return self.b(F.relu(h))


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "budget": ({"budget": 0.5}, TypeError, r"budget must be a Budget, as Budget\(macs=0.5\), got 0.5"),
    "latency": ({"budget": Budget(latency=0.5)}, ValueError, "budget must be of macs or params, got Budget.latency=0.5"),
    "met": ({"budget": Budget(macs=1.0)}, ValueError, "budget must be below what the searched network has, 1.000"),
    "small": ({"budget": Budget(macs=0.001)}, ValueError, "macs must be at least 0.007 for this model, got 0.001"),
    "epochs": ({"epochs": 0}, ValueError, "epochs must be at least 1, got 0"),
    "level": ({"level": 20}, ValueError, r"level must be in \[0, 1\], got 20; pass 0.2"),
    "gamma": ({"gamma": -1.0}, ValueError, "gamma must be a number of at least 0, got -1.0"),
    "lr": ({"lr": 0}, ValueError, "lr must be a number above 0, got 0"),
    "expand": ({"expand": 0.8}, ValueError, "expand must be a number of at least 1, got 0.8"),
    "both": ({"expand": 1.5, "dense": nn.Linear(8, 4)}, ValueError, "expand must be 1 where dense is given, got 1.5"),
    "seed": ({"seed": -1}, ValueError, "seed must be at least 0, got -1"),
    "no channels": ({"model": nn.Linear(8, 4)}, ValueError, "model must have channels that can be removed, got none"),
    "all ignored": ({"ignored_layers": ["0", "2"]}, ValueError, "ignored_layers must leave some channels to remove"),
    "no model": ({"model": 3}, TypeError, "model must be a torch.nn.Module, got 3"),
    "fixed": ({"model": FixedWidth(), "expand": 1.5}, ValueError, "expand must be 1 for a network whose code fixes its widths"),
    "inputs": ({"example_inputs": torch.randn(2, 3)}, ValueError, "example_inputs must be arguments that the model runs on"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_is_refused(case: str) -> None:
    given, error, message = REFUSED[case]
    model, x = mlp()

    def never(output: Tensor, y: Tensor) -> Tensor:
        raise AssertionError("it is refused before the search")

    options = {"loss": never, "model": model, "data": batches(x), "budget": HALF, "steps": 1, "progress": False, **given}
    state = torch.get_rng_state()
    with pytest.raises(error, match=message):
        search_from_scratch(**options)
    assert torch.equal(torch.get_rng_state(), state)
