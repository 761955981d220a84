from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from fasterai.analyze.sensitivity import sensitivity
from fasterai.prune.pruner import Pruner
from fasterai.sparse.sparsifier import Sparsifier


def net():
    """Two targets of 10 and 20 weights, none of them zero or equal."""
    model = nn.Sequential(nn.Linear(5, 2, bias=False), nn.Linear(2, 10, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.arange(1.0, 11).view(2, 5))
        model[1].weight.copy_(-torch.arange(1.0, 21).view(10, 2))
    return model


def zeros(model, layer):
    return int((model[layer].weight == 0).sum())


def accuracy(model):
    """Every zero of the first layer costs three hundredths, every zero of the second one."""
    return 1 - 0.03 * zeros(model, 0) - 0.01 * zeros(model, 1)


def run(model=None, evaluate=accuracy, **arguments):
    return sensitivity(
        net() if model is None else model, evaluate, **{"progress": False, "sparsities": (0.2, 0.5), **arguments}
    )


def test_scores_of_one_target_at_a_time():
    found = run()
    assert found.baseline == 1
    assert found.scores["0.weight"] == pytest.approx((1 - 0.06, 1 - 0.15))
    assert found.scores["1.weight"] == pytest.approx((1 - 0.04, 1 - 0.10))
    assert found.reached == {"0.weight": (0.2, 0.5), "1.weight": (0.2, 0.5)}
    assert found.units == {"0.weight": 10, "1.weight": 20}
    assert found.drops("0.weight") == pytest.approx((0.06, 0.15))
    assert (found.sparsities, found.granularity, found.higher_is_better) == ((0.2, 0.5), "weight", True)
    assert repr(found).endswith("; largest mean drops: 0.weight (0.105), 1.weight (0.07)>")


def test_of_a_loss_a_rise_is_a_drop():
    found = run(evaluate=lambda m: 1 + 0.1 * zeros(m, 0), higher_is_better=False)
    assert found.drops("0.weight") == pytest.approx((0.2, 0.5))
    assert found.drops("1.weight") == (0, 0)


def test_what_is_reached_is_counted_in_whole_units():
    found = run(targets="0", sparsities=(0.14, 0.16))
    assert found.reached == {"0.weight": (0.1, 0.2)}
    assert list(found.scores) == ["0.weight"]


def test_the_criterion_chooses_what_goes():
    seen = []
    run(
        evaluate=lambda m: seen.append(m[0].weight.abs().sum().item()) or 1.0,
        criteria="small_final",
        targets="0",
        sparsities=(0.2,),
    )
    assert seen == [55, 55 - 10 - 9]


def test_options_go_to_the_sparsifier():
    model = nn.Sequential(nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
    nn.init.ones_(model[1].bias)
    seen = []

    def evaluate(m):
        seen.append(int((m[1].bias == 0).sum()))
        return 1.0

    found = run(model, evaluate, granularity="filter", example_inputs=torch.zeros(1, 1, 2, 2), sparsities=(0.5,))
    assert seen == [0, 2]  # the norm's shift is silenced with its filters
    assert found.granularity == "filter"
    assert list(found.scores) == ["0.weight"]  # the layer that makes the output is left out
    assert torch.equal(model[1].bias, torch.ones(4))
    assert list(run(net(), layer_type=nn.Linear).scores) == ["0.weight", "1.weight"]


class Noisy(nn.Module):
    """Values that are easily lost: negative zero, NaN elsewhere, half precision, buffers."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4).half(), nn.BatchNorm1d(4), nn.Dropout())
        self.other = nn.Parameter(torch.tensor([-0.0, math.nan, math.inf]))
        self.register_buffer("table", torch.tensor([-0.0, math.nan]))
        with torch.no_grad():
            self.body[0].weight[0, 0] = -0.0


def bits(model):
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: bytes(x.detach().contiguous().view(-1).view(torch.uint8).tolist()) for name, x in state.items()}


class Stop(BaseException):
    pass


@pytest.mark.parametrize("fails_at", [None, 0, 1, 2])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, Stop])
def test_weights_come_back_bit_for_bit(fails_at, error):
    model = Noisy()
    model.body[2].eval()
    before, modes, rng, identity = (
        bits(model),
        [m.training for m in model.modules()],
        torch.get_rng_state(),
        list(model.parameters()),
    )
    calls = []

    def evaluate(m):
        calls.append(bits(m))
        torch.rand(3)
        m.train()
        with torch.no_grad():
            m.table.fill_(7)
            m.body[0].bias.add_(1)
            m.body[1](torch.ones(3, 4))
        if len(calls) - 1 == fails_at:
            raise error
        return 1.0

    if fails_at is None:
        run(model, evaluate, targets="body.0")
        assert len(calls) == 3
    else:
        with pytest.raises(error):
            run(model, evaluate, targets="body.0")
    assert bits(model) == before
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(a is b for a, b in zip(identity, model.parameters(), strict=True))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    # each evaluation found all but its own target as it was
    assert all(found["other"] == before["other"] and found["body.0.bias"] == before["body.0.bias"] for found in calls)


def test_weights_come_back_when_pruning_fails(monkeypatch):
    model = net()

    def fail_halfway(self, sparsity):
        with torch.no_grad():
            model[1].weight.zero_()
        raise RuntimeError("halfway")

    monkeypatch.setattr(Sparsifier, "sparsify_model", fail_halfway)
    with pytest.raises(RuntimeError, match="halfway"):
        run(model)
    assert bits(model) == bits(net())


def test_every_evaluation_is_in_eval_mode_and_sees_the_same_random_numbers():
    seen = []
    model = net().train()

    def evaluate(m):
        seen.append((m.training, torch.rand(1).item()))
        m.train()
        return 1.0

    run(model, evaluate)
    assert len(seen) == 5
    assert len(set(seen)) == 1 and seen[0][0] is False
    assert model.training


def test_frozen_targets_are_left_out():
    model = net()
    model[0].weight.requires_grad_(False)
    assert list(run(model).scores) == ["1.weight"]
    assert list(run(model, targets="0").scores) == ["0.weight"]
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="targets must train, and all are frozen"):
        run(model)


def test_the_progress_bar(capsys):
    run(progress=False)
    assert capsys.readouterr() == ("", "")
    run(progress=True)
    out, err = capsys.readouterr()
    assert out == "" and "4/4" in err and "1.weight" in err


def test_an_allocation_makes_a_sparsity():
    found = run(sparsities=(0.5,))
    # a unit of the first costs three times one of the second: 10 and 20 units, 0.3 and 0.2 per share
    shares = found.allocate(0.4)
    assert shares == {"0.weight": 0.3, "1.weight": 0.45}
    model = net()
    sparsifier = Sparsifier(model, "weight", "local")
    sparsifier.sparsify_model(shares)
    assert sparsifier.sparsity.overall == 0.4
    assert (zeros(model, 0), zeros(model, 1)) == (3, 9)


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.33, 0.5, 0.77, 0.9])
def test_an_allocation_is_met_to_the_unit(sparsity):
    found = run()
    model = net()
    sparsifier = Sparsifier(model, "weight", "local")
    sparsifier.sparsify_model(found.allocate(sparsity))
    assert zeros(model, 0) + zeros(model, 1) == round(sparsity * 30)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"sparsities": (0.5, 50)}, ValueError, "sparsities must be in .*, got 50; pass 0.5"),
        ({"sparsities": (0.5, 0.2)}, ValueError, r"sparsities must be at least one share, rising, got \(0.5, 0.2\)"),
        ({"sparsities": ()}, ValueError, r"sparsities must be at least one share, rising, got \(\)"),
        ({"evaluate": 0.9}, TypeError, r"evaluate must be a function of the model, got 0.9 \(float\)"),
        ({"evaluate": lambda m: "good"}, TypeError, r"evaluate must return a number, got 'good' \(str\)"),
        ({"evaluate": lambda m: None}, TypeError, r"evaluate must return a number, got None \(NoneType\)"),
        ({"evaluate": lambda m: math.nan}, ValueError, "evaluate must return a finite score of the model as it is, got nan"),
        ({"context": "global"}, TypeError, "options must be what a Sparsifier takes .*, got context"),
        ({"granularity": "pixel"}, ValueError, "granularity must be one of .*, got 'pixel'"),
        ({"targets": "none"}, ValueError, "targets must be .*, got 'none'"),
        ({"model": 3}, TypeError, r"model must be a torch\.nn\.Module, got 3"),
    ],
)
def test_bad_arguments_change_nothing(arguments, error, message):
    model = net()
    before = bits(model)
    with pytest.raises(error, match=message):
        run(**{"model": model, **arguments})
    assert bits(model) == before


def test_a_score_as_a_tensor_is_a_number():
    assert run(evaluate=lambda m: torch.tensor(0.5)).baseline == 0.5


class TwoPaths(nn.Module):
    """`quiet` counts for nothing in the output, `loud` for all; both have channels of their own."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.quiet = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        self.loud = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))

    def forward(self, x):
        return 1e-3 * self.quiet(x) + self.loud(x)


def test_coupled_groups_are_tried_one_by_one_and_the_pruner_takes_what_is_allocated():
    model, x = TwoPaths().eval(), torch.randn(16, 4, generator=torch.Generator().manual_seed(1))
    wanted = model(x).detach()

    def loss(m):
        return float((m(x) - wanted).square().mean())

    found = sensitivity(
        model,
        loss,
        granularity="coupled",
        example_inputs=x,
        sparsities=(0.25, 0.5, 0.75),
        higher_is_better=False,
        progress=False,
    )
    assert set(found.scores) == {"quiet.0.weight", "loud.0.weight"}
    assert str(found).split()[:2] == ["target", "channels"]
    assert found.plot().get_xlabel() == "share of the target's channels pruned"
    assert found.units == {"quiet.0.weight": 8, "loud.0.weight": 8}
    assert found.top(1)[0].name == "loud.0.weight"
    shares = found.allocate(0.5)
    assert shares["quiet.0.weight"] > shares["loud.0.weight"]
    removal = Pruner(model, shares, "local", "large_final", example_inputs=x).prune_model(measure=False)
    assert sum(n - m for n, m in removal.removed.values()) == 8


@pytest.mark.parametrize(("options", "pruned"), [({}, 3), ({"round_to": 8}, 0), ({"round_to": None}, 0)])
def test_counts_of_coupled_channels_are_exact_unless_rounding_is_asked_for(options, pruned):
    model, x = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2)), torch.zeros(1, 4)
    options = {"granularity": "coupled", "example_inputs": x, "sparsities": (0.1,), **options}
    assert run(model, lambda _: 1.0, **options).reached == {"0.weight": (pruned / 32,)}


def test_coupled_channels_need_example_inputs_and_the_message_says_so():
    with pytest.raises(ValueError, match="example_inputs must be given for granularity 'coupled', got None"):
        run(granularity="coupled")
