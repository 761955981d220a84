import copy
import json

import pytest
import torch
from torch import nn

from fasterai.model.cuts import follow
from fasterai.model.slim_norms import dense_size
from fasterai.prune.pruner import Pruner
from fasterai.prune.small_files import load_small, save_small
from fasterai.prune.surgery.plan import Plan
from fasterai.prune.surgery.replay import GRADUAL_FORMAT, read_state, replay, shapes_of

X = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.attention, self.head = nn.MultiheadAttention(8, 4, batch_first=True), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


def pruned(model: nn.Module, inputs, steps: int = 3) -> list[Plan]:
    pruner = Pruner(model, 0.75, "local", "large_final", example_inputs=inputs, iterative_steps=steps)
    return [pruner.prune_model(measure=False).plan for _ in range(steps)]


@pytest.mark.parametrize("had", [0, 1, 2, 3])
def test_what_a_model_has_not_had_yet_is_taken_out(had):
    small = net()
    plans = pruned(small, X)
    # 2, 4 and 6 of 8 channels are gone
    assert [p.shape_after("0.weight") for p in plans] == [(6, 3), (4, 3), (2, 3)]
    other = net()
    replay(other, plans[:had], shapes_of(other) | shapes_after(plans[:had]), None, list)
    assert len(replay(other, plans, shapes_of(small), None, list)) == 3 - had
    assert shapes_of(other) == shapes_of(small)
    other.load_state_dict(small.state_dict())
    assert torch.equal(other.eval()(X), small.eval()(X))


def shapes_after(plans: list[Plan]) -> dict[str, tuple[int, ...]]:
    return {name: plan.shape_after(name) for plan in plans for name in plan.shapes}


def test_attention_loses_its_heads_again(tmp_path):
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    small, other = Attention(), Attention()
    plans = [Plan.from_dict(json.loads(json.dumps(p.to_dict()))) for p in pruned(small, x)]
    replay(other, plans, shapes_of(small), None, list)
    other.load_state_dict(small.state_dict())
    assert other.attention.num_heads == small.attention.num_heads == 1
    assert torch.equal(other.eval()(x), small.eval()(x))
    save_small(tmp_path / "small.safetensors", small)
    assert shapes_of(load_small(tmp_path / "small.safetensors", Attention())) == shapes_of(other)


def test_norms_of_a_stream_are_told_again_how_many_there_were():
    def stream() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.Linear(8, 8, bias=False), nn.RMSNorm(8), nn.Linear(8, 2))

    small, other = stream(), stream()
    plans = [Plan.from_dict(json.loads(json.dumps(p.to_dict()))) for p in pruned(small, X)]
    replay(other, plans, shapes_of(small), None, list)
    other.load_state_dict(small.state_dict())
    assert [(n, dense_size(other[n]), other[n].normalized_shape) for n in (1, 3)] == [(1, 8, (2,)), (3, 8, (2,))]
    assert torch.equal(other(X), small(X))


def test_optimizer_and_copies_are_cut_alike():
    small, model = net(), net()
    plans = pruned(small, X)
    average = copy.deepcopy(model)
    optimizer = torch.optim.Adam(model.parameters())
    model(X).sum().backward()
    optimizer.step()
    replay(model, plans, shapes_of(small), optimizer, lambda: [average])
    assert shapes_of(average) == shapes_of(small)
    assert all(optimizer.state[p]["exp_avg"].shape == p.shape for p in model.parameters())


def test_it_can_be_taken_back():
    small, model = net(), net()
    plans = pruned(small, X)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    for surgeries in reversed(replay(model, plans, shapes_of(small), None, list)):
        for surgery in reversed(surgeries):
            surgery.undo()
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


class Followed:
    def __init__(self):
        self.seen = []

    def after_cut(self, cut):
        self.seen.append(len(cut["0.weight", 0]))


def test_followers_are_told():
    small, model, follower = net(), net(), Followed()
    plans = pruned(small, X)
    follow(model, follower)
    replay(model, plans, shapes_of(small), None, list)
    assert follower.seen == [6, 4, 2]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (nn.Sequential(nn.Linear(3, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 2)), r"0.weight is \(8, 3\), here \(7, 3\)"),
        (nn.Sequential(nn.Linear(3, 1), nn.BatchNorm1d(1), nn.ReLU(), nn.Linear(1, 2)), r"0.weight is \(8, 3\), here \(1, 3\)"),
        (nn.Sequential(nn.Linear(3, 8)), r"1.weight is \(8,\), here missing"),
    ],
)
def test_another_model_is_refused(other, message):
    small = net()
    plans = pruned(small, X)
    before = shapes_of(other)
    with pytest.raises(ValueError, match=f"state must be of this model as it was .* where {message}; build the model anew"):
        replay(other, plans, shapes_of(small), None, list)
    assert shapes_of(other) == before


def test_what_fails_half_way_is_taken_back():
    small, model = net(), net()
    plans = pruned(small, X)
    copies = iter([[], []])  # no third time
    before = shapes_of(model)
    with pytest.raises(StopIteration):
        replay(model, plans, shapes_of(small), None, lambda: next(copies))
    assert shapes_of(model) == before


def test_states_are_read():
    plans = pruned(net(), X)
    state = {"format": GRADUAL_FORMAT, "plans": [p.to_dict() for p in plans], "shapes": {"0.weight": [2, 3]}}
    state |= {"channels": {}, "done": 1.0, "pruner": {}}
    read, shapes = read_state(state)
    assert [str(p) for p in read] == [str(p) for p in plans]
    assert shapes == {"0.weight": (2, 3)}
    with pytest.raises(ValueError, match="got one without plans, done"):
        read_state({k: v for k, v in state.items() if k not in ("plans", "done")})
    with pytest.raises(ValueError, match=f"state's format must be {GRADUAL_FORMAT}, got 'x'"):
        read_state({**state, "format": "x"})
