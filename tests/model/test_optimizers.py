"""An optimizer's state is cut as the parameter is, and training goes on as it would in the masked model."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from fastai.optimizer import SGD as FastaiSGD
from fastai.optimizer import Adam as FastaiAdam
from fastai.optimizer import Lookahead, OptimWrapper
from torch import Tensor, nn

from fasterai.graph.channels import channel_graph
from fasterai.model.optimizers import check_optimizer, clear_entries_, cut_entry, states_of, strange_keys
from fasterai.prune.removal import mask_channels_, remove
from fasterai.prune.surgery.operate import Surgery
from fasterai.prune.surgery.plan import make_plan

KEPT = np.array([0, 2])
EIGHT = torch.arange(8.0).reshape(4, 2)


# --- one entry ---------------------------------------------------------------------------------------------------------------

# Shape of the parameter, what goes on which dimension, the state, what it becomes by hand.
ENTRIES: list[tuple[tuple[int, ...], dict[int, Any], Tensor, list[Any]]] = [
    ((4, 2), {0: KEPT}, EIGHT, [[0, 1], [4, 5]]),
    ((4, 2), {0: KEPT}, torch.tensor([[0.0], [1], [2], [3]]), [[0], [2]]),  # torch's Adafactor: rows
    ((4, 2), {0: KEPT}, torch.tensor([[5.0, 6]]), [[5, 6]]),  # and columns
    ((4, 2), {1: np.array([1])}, torch.tensor([[5.0, 6]]), [[6]]),
    ((4, 2), {0: KEPT}, torch.tensor([0.0, 1, 2, 3]), [0, 2]),  # one dimension less, and only one fits
    ((4, 2), {0: KEPT}, torch.tensor([5.0, 6]), [5, 6]),
    ((4, 4), {0: KEPT, 1: KEPT}, torch.tensor([0.0, 1, 2, 3]), [0, 2]),  # two fit, and both come to the same
    ((2, 4, 3), {1: KEPT}, torch.arange(8.0).reshape(2, 4), [[0, 2], [4, 6]]),
    ((4,), {0: KEPT}, torch.tensor(3.0), 3),  # a number
    ((4,), {0: KEPT}, torch.tensor([3.0]), [3]),
    ((4, 2), {0: KEPT}, torch.tensor([3.0]), [3]),
]


@pytest.mark.parametrize(("shape", "kept", "state", "expected"), ENTRIES)
def test_a_tensor_is_cut_along_the_dimensions_that_it_has(shape: Any, kept: Any, state: Tensor, expected: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        entry = cut_entry({"step": 5, "it": state}, "w", shape, kept)
    assert entry["step"] == 5
    assert entry["it"].tolist() == expected


STRANGERS: list[tuple[tuple[int, ...], dict[int, Any], Tensor]] = [
    ((4, 4), {0: KEPT}, torch.zeros(4)),  # rows or columns?
    ((4, 2), {0: KEPT}, torch.zeros(4, 4)),  # a preconditioner
    ((4, 2), {0: KEPT}, torch.zeros(8)),
    ((4, 2), {0: KEPT}, torch.zeros(3)),  # blocks of a quantised state
    ((4,), {0: KEPT}, torch.zeros(4, 1)),
]


@pytest.mark.parametrize(("shape", "kept", "state"), STRANGERS)
def test_what_cannot_be_told_starts_anew_with_a_warning(shape: Any, kept: Any, state: Tensor) -> None:
    with pytest.warns(
        UserWarning,
        match=r"optimizer's state of layer\.w .* cannot be cut, because of its odd .*state is reset",
    ) as seen:
        assert cut_entry({"step": 5, "odd": state, "fine": torch.zeros(shape)}, "layer.w", shape, kept) == {}
    assert str(tuple(state.shape)) in str(seen[0].message)


def test_strange_keys_are_those_with_a_shape_that_is_not_the_parameters() -> None:
    square, flat = nn.Parameter(torch.zeros(4, 4)), nn.Parameter(torch.zeros(4, 2))
    whole = {
        "step": torch.tensor(3.0),
        "mean": torch.zeros(4, 4),
        "row": torch.zeros(4, 1),
        "L": torch.eye(4),
        "Q": [torch.eye(4)],
    }
    assert strange_keys({square: whole}) == set()
    other = {"mean": torch.zeros(4, 2), "row": torch.zeros(4, 1), "L": torch.eye(4), "Q": [torch.zeros(2), torch.eye(4)]}
    assert strange_keys({square: whole, flat: other, "all": 5}) == {"L", "Q"}


OTHER = np.array([1, 3])
# Shape of the parameter, what goes on which dimension, a state that holds preconditioners elsewhere, what it becomes by hand.
STRANGE: list[tuple[tuple[int, ...], dict[int, Any], Tensor, Any]] = [
    ((4, 4), {0: KEPT, 1: OTHER}, torch.eye(4), None),  # rows by rows, or columns by columns?
    ((4, 4), {0: KEPT}, torch.eye(4), None),
    ((4, 4, 3), {0: KEPT}, torch.eye(4), None),
    ((4, 4), {0: KEPT, 1: KEPT}, torch.arange(16.0).reshape(4, 4), [[0, 2], [8, 10]]),  # all come to the same
    ((4, 2), {0: KEPT}, EIGHT, [[0, 1], [4, 5]]),
    ((4, 2, 2), {0: KEPT}, torch.arange(16.0).reshape(4, 2, 2), [[[0, 1], [2, 3]], [[8, 9], [10, 11]]]),
    ((4,), {0: KEPT}, torch.tensor([0.0, 1, 2, 3]), [0, 2]),
    ((4, 2), {0: KEPT}, torch.tensor([[0.0], [1], [2], [3]]), [[0], [2]]),
]


@pytest.mark.parametrize(("shape", "kept", "state", "expected"), STRANGE)
@pytest.mark.filterwarnings("ignore:optimizer's state of w")
def test_a_square_is_not_taken_for_the_parameters_where_it_may_be_a_preconditioner(
    shape: Any, kept: Any, state: Tensor, expected: Any
) -> None:
    entry = cut_entry({"step": 5, "it": state}, "w", shape, kept, {"it"})
    assert entry == {} if expected is None else entry["it"].tolist() == expected


def test_states_inside_of_lists_are_cut_as_well() -> None:
    entry = cut_entry({"slow": [EIGHT, {"deep": EIGHT + 1}]}, "w", (4, 2), {0: KEPT})
    assert entry["slow"][0].tolist() == [[0, 1], [4, 5]]
    assert entry["slow"][1]["deep"].tolist() == [[1, 2], [5, 6]]


# --- optimizers --------------------------------------------------------------------------------------------------------------


def test_the_states_of_wrapped_optimizers_are_found() -> None:
    weights = [nn.Parameter(torch.zeros(3))]
    inner = torch.optim.Adam(weights)
    assert states_of(None) == []
    assert [id(s) for s in states_of(inner)] == [id(inner.state)]
    wrapper = OptimWrapper(opt=inner)
    assert id(inner.state) in [id(s) for s in states_of(wrapper)]
    other = torch.optim.SGD(weights, 0.1)
    assert {id(s) for s in states_of([inner, other, inner])} == {id(inner.state), id(other.state)}


@pytest.mark.parametrize("none", [None, [], [None]])
def test_no_optimizer_is_fine(none: Any) -> None:
    check_optimizer(none)
    assert states_of(none) == []


@pytest.mark.parametrize("bad", ["adam", 0.1, torch.optim.Adam])
def test_what_keeps_no_state_is_no_optimizer(bad: Any) -> None:
    with pytest.raises(TypeError, match=r"optimizer must be torch's or fastai's, with a state for each parameter, got"):
        check_optimizer(bad)


def test_an_optimizer_with_one_state_for_all_is_refused_before_anything_changes() -> None:
    model = net()
    optimizer = torch.optim.LBFGS(model.parameters())
    silence(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="optimizer must keep a state for each parameter, got LBFGS"):
        remove(model, X, optimizer=optimizer)
    assert all(torch.equal(model.state_dict()[n], t) for n, t in before.items())


# --- training goes on --------------------------------------------------------------------------------------------------------

X = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))
Y = torch.randn(4, 2, generator=torch.Generator().manual_seed(1))
STAYS = [0, 2]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    # No bias before the norm: its gradient is rounding alone, which Adam makes steps of.
    layers = [
        nn.Conv2d(3, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 2, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    ]
    return nn.Sequential(*layers).train()


@torch.no_grad()
def silence(model: nn.Module) -> None:
    """Channels 1 and 3 of the first layer, with all that belongs to them."""
    for tensor in (model[0].weight, model[1].weight, model[1].bias):
        tensor[[1, 3]] = 0
    model[3].weight[:, [1, 3]] = 0


def groups(model: nn.Module) -> list[dict[str, Any]]:
    return [{"params": list(model[0].parameters()), "lr": 0.02}, {"params": [*model[1].parameters(), *model[3].parameters()]}]


def lists(model: nn.Module) -> list[list[nn.Parameter]]:
    return [group["params"] for group in groups(model)]


OPTIMIZERS: dict[str, Callable[[nn.Module], Any]] = {
    "sgd": lambda m: torch.optim.SGD(groups(m), 0.05, momentum=0.9, weight_decay=0.01),
    "nesterov": lambda m: torch.optim.SGD(groups(m), 0.05, momentum=0.9, nesterov=True),
    "adam": lambda m: torch.optim.Adam(groups(m), 0.01),
    "adam, one by one": lambda m: torch.optim.Adam(groups(m), 0.01, foreach=False),
    "adamw amsgrad": lambda m: torch.optim.AdamW(groups(m), 0.01, amsgrad=True),
    "adamw fused": lambda m: torch.optim.AdamW(groups(m), 0.01, fused=True),
    "rmsprop": lambda m: torch.optim.RMSprop(groups(m), 0.01, momentum=0.9, centered=True),
    "adagrad": lambda m: torch.optim.Adagrad(groups(m), 0.01),
    "fastai sgd": lambda m: FastaiSGD(lists(m), lr=0.05, mom=0.9),
    "fastai adam": lambda m: FastaiAdam(lists(m), lr=0.01),
    "fastai lookahead": lambda m: Lookahead(FastaiAdam(lists(m), lr=0.01), k=2),
    "wrapper": lambda m: OptimWrapper(opt=torch.optim.AdamW(groups(m), 0.01)),
    "timm lookahead": lambda m: pytest.importorskip("timm.optim").Lookahead(torch.optim.AdamW(groups(m), 0.01), k=2),
}


def steps(model: nn.Module, optimizer: Any, count: int) -> Tensor:
    for _ in range(count):
        loss = (model(X) - Y).square().sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return loss


def settings(optimizer: Any) -> Any:
    if hasattr(optimizer, "param_groups"):
        return [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    return [dict(h) for h in optimizer.hypers]


def parameters(optimizer: Any) -> list[list[int]]:
    found = optimizer.param_lists if hasattr(optimizer, "param_lists") else [g["params"] for g in optimizer.param_groups]
    return [[id(p) for p in ps] for ps in found]


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_small_model_takes_the_steps_that_the_masked_one_takes(kind: str) -> None:
    """The oracle: the same training on the masked model, with the mask applied after every step, never cut."""
    small, masked = net(), net()
    optimizer, other = OPTIMIZERS[kind](small), OPTIMIZERS[kind](masked)
    for model, its in ((small, optimizer), (masked, other)):
        silence(model)
        for _ in range(3):
            last = steps(model, its, 1)
            silence(model)
    before = settings(optimizer), parameters(optimizer)
    removal = remove(small, X, optimizer=optimizer)
    assert removal.removed == {"0.weight": (4, 2)}
    assert (settings(optimizer), parameters(optimizer)) == before
    assert sorted(i for ids in parameters(optimizer) for i in ids) == sorted(id(p) for p in small.parameters())
    for _ in range(4):
        last = steps(small, optimizer, 1)
        other_loss = steps(masked, other, 1)
        silence(masked)
        torch.testing.assert_close(last, other_loss, rtol=1e-4, atol=1e-5)
    for name in ("0.weight", "1.weight", "1.bias", "1.running_mean"):
        torch.testing.assert_close(small.state_dict()[name], masked.state_dict()[name][STAYS], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(small[3].weight, masked[3].weight[:, STAYS], rtol=1e-4, atol=1e-5)


def test_the_averages_of_an_optimizer_come_back_with_the_weights() -> None:
    model = net()
    optimizer = Lookahead(FastaiSGD(lists(model), lr=0.05), k=2)
    steps(model, optimizer, 3)
    slow = [average for averages in optimizer.slow_weights for average in averages]
    before = [average.clone() for average in slow]
    graph = channel_graph(model, (X,))
    plan = replace(make_plan(model, graph, [np.array([True, False, True, False])]), scales={"0.weight": 2.0})
    done = Surgery(model, plan, optimizer)
    for average, parameter in zip(slow, model.parameters(), strict=True):
        assert average.shape == parameter.shape
    assert torch.equal(slow[0], 2 * before[0][STAYS])
    assert torch.equal(slow[3], before[3][:, STAYS])
    done.undo()
    assert all(torch.equal(a, b) for a, b in zip(slow, before, strict=True))


def test_adafactor_goes_on_with_its_factors_cut() -> None:
    model = net()
    optimizer = torch.optim.Adafactor(model.parameters(), lr=0.01)
    silence(model)
    steps(model, optimizer, 2)
    silence(model)
    before = {k: v.clone() for k, v in optimizer.state[model[3].weight].items()}
    first = {k: v.clone() for k, v in optimizer.state[model[0].weight].items()}
    assert (first["row_var"].shape, first["col_var"].shape) == ((4, 3, 3, 1), (4, 3, 1, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        remove(model, X, optimizer=optimizer, measure=False)
    state = optimizer.state[model[3].weight]
    assert torch.equal(state["row_var"], before["row_var"][:, STAYS])
    for key in ("row_var", "col_var"):
        assert torch.equal(optimizer.state[model[0].weight][key], first[key][STAYS])
    assert torch.equal(state["step"], before["step"])
    weights = [p.detach().clone() for p in model.parameters()]
    steps(model, optimizer, 1)
    assert not any(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))


class Rows(torch.optim.Optimizer):
    """Keeps the means of squared gradients over rows and columns, one dimension each, as the transformers' Adafactor does."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    def step(self) -> None:  # type: ignore[override]
        for p in (p for g in self.param_groups for p in g["params"] if p.dim() == 2):
            state = self.state[p]
            if not state:
                state["row"], state["column"] = p.new_zeros(p.shape[0]), p.new_zeros(p.shape[1])
            state["row"] += p.grad.square().mean(1)
            state["column"] += p.grad.square().mean(0)


@pytest.mark.parametrize("inputs", [5, 8])
def test_factors_of_one_dimension_are_cut_where_it_is_clear_and_start_anew_where_not(inputs: int) -> None:
    model = nn.Sequential(nn.Linear(inputs, 8), nn.ReLU(), nn.Linear(8, 3))
    x = torch.randn(4, inputs)
    optimizer = Rows(model.parameters())
    model(x).sum().backward()
    optimizer.step()
    graph = channel_graph(model, (x,))
    mask_channels_(model, graph, [np.arange(8) != 2])
    rows = optimizer.state[model[0].weight]["row"].clone()
    if inputs == 8:  # a square matrix
        with pytest.warns(
            UserWarning,
            match=r"optimizer's state of 0\.weight \(8, 8\) cannot be cut, because of its row \(8,\)",
        ):
            remove(model, x, optimizer=optimizer)
        assert optimizer.state[model[0].weight] == {}
    else:
        remove(model, x, optimizer=optimizer)
        assert torch.equal(optimizer.state[model[0].weight]["row"], rows[[0, 1, 3, 4, 5, 6, 7]])
        assert optimizer.state[model[0].weight]["column"].shape == (5,)
    assert optimizer.state[model[2].weight]["column"].shape == (7,)
    model.zero_grad()
    model(x).sum().backward()
    optimizer.step()


class Shampoo(torch.optim.Optimizer):
    """Preconditions matrices from both sides: rows by rows, columns by columns (after Gupta et al. 2018)."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for p in (p for g in self.param_groups for p in g["params"] if p.dim() == 2):
            state = self.state[p]
            if not state:
                state["sides"] = [torch.eye(p.shape[0]), torch.eye(p.shape[1])]
            left, right = state["sides"]
            left += p.grad @ p.grad.T
            right += p.grad.T @ p.grad
            p -= 0.01 * torch.linalg.inv(left) @ p.grad @ torch.linalg.inv(right)


def test_the_preconditioners_of_a_square_matrix_start_anew() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    x = torch.randn(4, 5)
    optimizer = Shampoo(model.parameters())
    model(x).sum().backward()
    optimizer.step()
    mask_channels_(model, channel_graph(model, (x,)), [np.arange(8) != 2, np.arange(8) != 5])
    with pytest.warns(
        UserWarning,
        match=r"optimizer's state of 2\.weight \(8, 8\) cannot be cut, because of its sides \(8, 8\)",
    ):
        remove(model, x, optimizer=optimizer, measure=False)
    assert model[2].weight.shape == (7, 7)
    assert not any(optimizer.state[model[i].weight] for i in (0, 2, 4))
    model.zero_grad()
    model(x).sum().backward()
    optimizer.step()
    for side in optimizer.state[model[2].weight]["sides"]:
        assert torch.equal(side, side.T)


# --- single entries are cleared ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "kept"),
    [
        (lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), ["momentum_buffer"]),
        (lambda p: torch.optim.AdamW(p, 0.1, amsgrad=True), ["exp_avg", "exp_avg_sq", "max_exp_avg_sq"]),
        (lambda p: torch.optim.Rprop(p, 0.1), ["prev"]),
        (lambda p: FastaiAdam(p, 0.1), ["grad_avg", "sqr_avg"]),
        (lambda p: Lookahead(FastaiSGD(p, 0.1, mom=0.9), k=2), ["grad_avg"]),
    ],
)
def test_what_is_kept_for_single_weights_is_cleared_there_alone(make: Any, kept: list[str]) -> None:
    model = nn.Linear(3, 3)
    optimizer = make(list(model.parameters()))
    for _ in range(2):
        model(torch.ones(2, 3)).square().sum().backward()
        optimizer.step()
    (state,) = states_of(optimizer)
    before = copy.deepcopy({key: value for key, value in state[model.weight].items() if isinstance(value, Tensor)})
    where = torch.eye(3, dtype=torch.bool)
    clear_entries_([optimizer], [(model.weight, where)])
    for key, old in before.items():
        new = state[model.weight][key]
        assert torch.equal(new, old * ~where if key in kept else old), key
        assert key not in kept or bool(old[where].all())
    slow = getattr(optimizer, "slow_weights", None)
    if slow is not None:
        assert not bool(slow[0][0][where].any()) and bool(slow[0][0][~where].all())
    other = state[model.bias]
    assert all(bool(other[key].any()) for key in kept)


def test_what_is_kept_for_many_weights_at_once_stays() -> None:
    model = nn.Linear(3, 2)
    square = {"sides": torch.ones(3, 3), "momentum": torch.ones(2, 3), "codes": torch.ones(2, 3, dtype=torch.uint8)}
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    optimizer.state[model.weight] = {"step": torch.tensor(3.0), "rows": torch.ones(2, 1), **square}
    clear_entries_(optimizer, [(model.weight, torch.ones(2, 3, dtype=torch.bool))])
    state = optimizer.state[model.weight]
    assert [int(state[key].sum()) for key in ("step", "rows", "sides", "momentum", "codes")] == [3, 2, 9, 0, 6]
    assert optimizer.state.get(model.bias) is None
