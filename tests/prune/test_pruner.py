"""Pruner: the asked share of channels goes, the lowest first, and the optimizer goes on with the same parameters."""

import copy
import pickle
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn

from fasterai.analyze.cost import cost
from fasterai.core import criteria
from fasterai.core.criteria import Criterion
from fasterai.core.granularities import Coupled
from fasterai.graph.channels import channel_graph
from fasterai.prune.choice.budget import Budget
from fasterai.prune.pruner import Pruner
from fasterai.prune.small_files import load_small, save_small
from fasterai.sparse.sparsifier import Sparsifier
from fasterai.units.channel_pools import channel_pools
from fasterai.units.pool import WeightScores
from tests.messages import heard
from tests.networks import Heads, perceptron

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)),
    ).eval()


def test_local_takes_the_share_of_every_group():
    model = net()
    removal = Pruner(model, 0.5, "local", "large_final", example_inputs=X).prune_model()
    assert removal.removed == {"0.weight": (8, 4), "3.weight": (16, 8)}
    assert (model[0].out_channels, model[1].num_features, model[3].in_channels, model[8].in_features) == (4, 4, 4, 8)
    assert model(X).shape == (2, 5)


def test_global_takes_the_share_of_all_channels():
    model = net()
    with torch.no_grad():
        model[3].weight.fill_(1.0)  # so that its 16 channels are worth the same, more than the six small ones of the other
        model[8].weight.fill_(1.0)
        model[0].weight[:2] = 5.0
    removal = Pruner(model, 0.25, "global", "large_final", example_inputs=X).prune_model()
    assert removal.removed == {"0.weight": (8, 2)}, "6 of 24"
    assert (model[0].weight == 5.0).all()


def test_groups_compare_by_the_mean_of_their_scores():
    """A layer of small weights is not emptied: the scale of its weights is not its worth."""
    model = net()
    with torch.no_grad():
        model[3].weight.mul_(100)
        model[8].weight.mul_(100)
    removal = Pruner(model, 0.5, "global", "large_final", example_inputs=X).prune_model()
    assert removal.removed["0.weight"][1] >= 2
    assert removal.removed["3.weight"][1] <= 14


def test_a_channel_is_scored_by_all_weights_that_it_runs_through():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 3)).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, -3.0], [0.0, 4.0]]))
        model[2].weight.copy_(torch.tensor([[3.0, 0.0], [0.0, 3.0], [0.0, 0.0]]))
    graph = channel_graph(model, (torch.randn(4, 2),))

    def scores(over, reducer):
        (pool,) = channel_pools(model, graph, Coupled(over))
        return pool.score(WeightScores(lambda t: t.parameter.detach().abs(), reducer)).tolist()

    assert scores("sum", "mean") == [3.0, 3.0], "2 + 1 and 2 + 1"
    assert scores("max", "mean") == [2.0, 2.0]
    assert scores("mean", "sum") == [3.5, 3.5]


def test_the_lowest_channels_go():
    model = net()
    with torch.no_grad():
        for loud in (1, 4, 6):
            model[0].weight[loud] *= 50
    Pruner(model, {"0": 5 / 8}, "local", "large_final", example_inputs=X).prune_model()
    fresh = net()
    for kept, loud in enumerate((1, 4, 6)):
        assert torch.equal(model[0].weight[kept], fresh[0].weight[loud] * 50)


def test_a_dict_leaves_other_layers_alone():
    removal = Pruner(net(), {"3": 0.25}, "local", "large_final", example_inputs=X).prune_model()
    assert removal.removed == {"3.weight": (16, 12)}


def test_ignored_layers_are_added_to_what_stays_anyway():
    model = net()
    removal = Pruner(model, 0.5, "local", "large_final", ignored_layers=[model[0]], example_inputs=X).prune_model()
    assert removal.removed == {"3.weight": (16, 8)}
    assert model[8].out_features == 5


def test_iterative_steps_reach_the_ratio_of_what_there_was():
    model = net()
    pruner = Pruner(model, 0.5, "local", "large_final", example_inputs=X, iterative_steps=4)
    reached = [pruner.prune_model() and model[3].out_channels for _ in range(4)]
    assert reached == [14, 12, 10, 8]
    with pytest.raises(ValueError, match="iterative_steps must be at least the number of calls, got 4 and a further call"):
        pruner.prune_model()


def test_kept_counts_are_rounded_up():
    model = net()
    Pruner(model, 0.5, "local", "large_final", example_inputs=X, round_to=3).prune_model()
    assert (model[0].out_channels, model[3].out_channels) == (6, 9)


@pytest.mark.parametrize("make", [lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), torch.optim.Adam, torch.optim.AdamW])
def test_the_optimizer_goes_on_with_the_same_parameters(make):
    model = net().train()
    optimizer = make(model.parameters())

    def step() -> None:
        optimizer.zero_grad()
        model(X).square().sum().backward()
        optimizer.step()

    step()
    before, modes = [id(p) for p in model.parameters()], [m.training for m in model.modules()]
    Pruner(model, 0.5, "local", "large_final", example_inputs=X).prune_model(optimizer)
    assert [id(p) for p in model.parameters()] == before
    assert [m.training for m in model.modules()] == modes
    for parameter, state in optimizer.state.items():
        assert all(s.shape == parameter.shape for s in state.values() if s.dim())
    weights = [model[i].weight for i in (0, 3, 8)]
    before_step = [w.detach().clone() for w in weights]
    step()
    assert not any(torch.equal(w, old) for w, old in zip(weights, before_step, strict=True))


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((50, "local", "large_final"), {}, r"pruning_ratio must be in \[0, 1\], got 50; pass 0.5 for 50 %"),
        ((0.5, "lokal", "large_final"), {}, "context must be one of .*, got 'lokal'; did you mean 'local'"),
        ((0.5, "two_four", "large_final"), {}, "context must be 'local', 'global', 'erk' or 'lamp', got 'two_four'"),
        (({"0": 0.5}, "global", "large_final"), {}, r"pruning_ratio must be one number for context Global\(\), got a dict"),
        ((0.5, "local", "large_final"), {"example_inputs": None}, "example_inputs must be .*, got None"),
        (
            (0.5, "local", "large_final"),
            {"ignored_layers": ["x"]},
            "ignored_layers must be modules of the model or their names",
        ),
        ((0.5, "local", "large_final"), {"over_places": "median"}, "over_places must be one of sum, mean, max, got 'median'"),
    ],
)
def test_bad_arguments_are_named(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        Pruner(net(), *arguments, **{"example_inputs": X, **options})


def test_a_name_that_makes_no_channels_is_refused_and_nothing_is_changed():
    model = net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        ValueError,
        match=r"pruning_ratio's keys must be the name of a target or a glob over them, of 0.weight, 3.weight, got '8'",
    ):
        Pruner(model, {"8": 0.5}, "local", "large_final", example_inputs=X).prune_model()
    assert all(torch.equal(v, model.state_dict()[n]) for n, v in before.items())


def test_a_criterion_of_your_own():
    criterion = Criterion(lambda e: -e.weight.abs())
    model, fresh = net(), net()
    Pruner(model, {"0": 7 / 8}, "local", criterion, example_inputs=X).prune_model()
    scores = fresh[0].weight.abs().mean((1, 2, 3)) + fresh[3].weight.abs().mean((0, 2, 3))
    assert torch.equal(model[0].weight[0], fresh[0].weight[scores.argmin()])


class HardCoded(nn.Module):
    """Its second convolution's width is written into its code."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 16, 1), nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.b(self.a(x).relu()).relu().mean((2, 3)).reshape(-1, 16))


def test_a_group_that_cannot_go_gets_its_weights_back():
    torch.manual_seed(0)
    model = HardCoded().eval()
    head, bias = model.head.weight.detach().clone(), model.b.bias.detach().clone()
    removal = Pruner(model, 0.5, "local", "large_final", example_inputs=X, rewrite=False).prune_model()
    assert removal.removed == {"a.weight": (8, 4)}
    assert list(removal.refused) == ["b.weight"]
    assert torch.equal(model.head.weight, head)
    assert torch.equal(model.b.bias, bias)
    assert (model.b.weight != 0).all()


class Counted(nn.Module):
    """Its code counts the channels: without some of them the outputs move."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 16), nn.Linear(16, 5)

    def forward(self, x):
        y = self.a(x)
        return self.b(y / y.shape[1])


def test_a_budget_that_the_check_makes_miss_is_said():
    torch.manual_seed(0)
    pruner = Pruner(Counted(), Budget(params=0.5), "local", "large_final", example_inputs=torch.randn(2, 6))
    with pytest.warns(
        UserWarning, match=r"Budget\(.*params=0\.5.*\) was not reached: channels of a\.weight cannot be removed; the"
    ):
        assert pruner.prune_model(measure=False).removed == {}


# --- any criterion, context and budget ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", criteria.__all__)
def test_every_criterion_takes_the_asked_channels(name):
    model = net()
    batch = (X, torch.tensor([0, 3]))
    pruner = Pruner(
        model, 0.5, "global", name, example_inputs=X, data=[batch], loss=nn.functional.cross_entropy, iterative_steps=2
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    gone = []
    for _ in range(2):
        gone.append(sum(n - m for n, m in pruner.prune_model(measure=False).removed.values()))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    assert gone == [6, 6], "12 of 24 in two steps"
    assert sum(now for _, now in pruner.channels.values()) == 12


def test_earlier_weights_are_cut_with_the_model():
    """The channels that have moved most stay, counted from where they were when the pruner was made."""
    model = net()
    pruner = Pruner(model, {"3": 0.5}, "local", "movement", example_inputs=X, iterative_steps=2)
    with torch.no_grad():
        model[3].weight[:4] += 10  # the first four of 16 move, and then the last four of what is left
    pruner.prune_model(measure=False)
    assert model[3].out_channels == 12
    with torch.no_grad():
        model[3].weight[-4:] += 10
    pruner.prune_model(measure=False)
    first, last = model[3].weight[:4].flatten(1).mean(1), model[3].weight[4:].flatten(1).mean(1)
    assert (first > 5).all(), "they count as moved although the weights were cut in between"
    assert (last > 5).all()


@pytest.mark.parametrize("context", ["erk", "lamp"])
def test_contexts_that_allocate(context):
    pruner = Pruner(net(), 0.5, context, "large_final", example_inputs=X)
    pruner.prune_model(measure=False)
    assert sum(now for _, now in pruner.channels.values()) == 12


@pytest.mark.parametrize(("budget", "count"), [(Budget(params=0.5), "params"), (Budget(macs=0.4), "macs")])
def test_a_budget_stands_where_a_ratio_stands(budget, count):
    model = net()
    dense = cost(model, X)
    Pruner(model, budget, "global", "large_final", example_inputs=X).prune_model(measure=False)
    small = cost(model, X)
    share = small.macs / dense.macs if count == "macs" else small.parameters / dense.parameters
    # A single channel of this tiny network costs up to 6 % of it.
    assert budget.share - 0.07 < share <= budget.share


def test_a_budget_is_of_the_first_model_over_several_steps():
    model = net()
    dense = cost(model, X).parameters
    pruner = Pruner(model, Budget(params=0.4), "global", "large_final", example_inputs=X, iterative_steps=3)
    left = [pruner.prune_model(measure=False).parameters[1] / dense for _ in range(3)]
    assert all(wanted - 0.07 < share <= wanted for share, wanted in zip(left, (0.8, 0.6, 0.4), strict=True)), left


@pytest.mark.parametrize(
    ("ratio", "is_within"),
    [(Budget(params=0.035), True), (Budget(params=0.034), False), (Budget(macs=1.0), True), (0.99, True)],
)
def test_whether_a_budget_is_within_reach(ratio, is_within):
    """One channel of each group leaves 28 + 2 + 10 + 2 + 10 = 52 of 224 + 16 + 1168 + 32 + 85 = 1525 parameters, 0.0341."""
    model = net()
    assert Pruner(model, ratio, "local", "large_final", example_inputs=X).is_within_reach() is is_within


@pytest.mark.filterwarnings("ignore:asked to prune")
def test_a_channel_of_each_group_stays():
    model = net()
    Pruner(model, 0.99, "local", "large_final", example_inputs=X).prune_model(measure=False)
    assert (model[0].out_channels, model[3].out_channels) == (1, 1)
    assert model(X).shape == (2, 5)


@pytest.mark.parametrize("ratio", [1.0, {"0": 0.5, "3": 1}])
def test_a_ratio_that_would_leave_nothing_is_refused(ratio):
    with pytest.raises(
        ValueError, match=r"pruning_ratio must be below 1, got 1(.0)?: it would leave a layer without a channel"
    ):
        Pruner(net(), ratio, "local", "large_final", example_inputs=X)


def test_an_optimizer_of_another_model_is_refused():
    model, other = net(), net()
    before = copy.deepcopy(model.state_dict())
    pruner = Pruner(model, 0.5, "local", "large_final", example_inputs=X)
    with pytest.raises(ValueError, match="optimizer must train the model that channels go from, got one that holds none"):
        pruner.prune_model(torch.optim.SGD(other.parameters(), 0.1))
    assert all(torch.equal(v, model.state_dict()[n]) for n, v in before.items())


@pytest.mark.parametrize(("ratio", "left"), [(0.9, 1), (0.3, 6), (0.0, 8)])
def test_small_groups_are_pruned_to_the_channel(ratio, left):
    model = net()
    Pruner(model, {"0": ratio}, "local", "large_final", example_inputs=X).prune_model(measure=False)
    assert model[0].out_channels == left


def test_big_groups_keep_multiples_of_eight_unless_told_otherwise():
    for round_to, left in ((None, 40), (1, 36), (16, 48)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 64, 1), nn.ReLU(), nn.Conv2d(64, 4, 1)).eval()
        Pruner(model, 0.44, "local", "large_final", example_inputs=X, round_to=round_to).prune_model(measure=False)
        assert model[0].out_channels == left


def test_a_masked_model_is_pruned_without_a_further_move():
    """What filters were sparsified before goes first, and nothing else does, so the outputs stay."""
    model = net()
    Sparsifier(model, "filter", "local", "large_final", example_inputs=X, targets=["0", "3"]).sparsify_model(0.5)
    before = model(X)
    Pruner(model, 0.5, "local", "large_final", example_inputs=X).prune_model(measure=False)
    assert (model[0].out_channels, model[3].out_channels) == (4, 8)
    assert torch.allclose(model(X), before, rtol=0, atol=1e-5 * float(before.abs().max()))


def test_a_failure_leaves_the_weights_as_they_were():
    model = net()
    pruner = Pruner(model, 0.5, "local", "large_final", example_inputs=X)
    before = copy.deepcopy(model.double().state_dict())
    with pytest.raises(ValueError, match="example_inputs must be arguments that the model runs on"):
        pruner.prune_model()  # the inputs are in float32
    assert all(torch.equal(v, model.state_dict()[n]) for n, v in before.items())


CHANGING = [f"fasterai.{m}" for m in ["prune.pruner", "prune.removal", "prune.surgery.operate", "model.cuts", "units.scoring"]]


def calls_of(run, interrupted=None, nth=0):
    """How often each function of the modules that change something is called; at one of these calls comes a Ctrl-C."""
    calls = Counter()

    def trace(frame, *_):
        code = frame.f_code
        if frame.f_globals.get("__name__") in CHANGING and code.co_name != "undo" and code.co_name.isidentifier():
            calls[code] += 1
            if code is interrupted and calls[code] == nth:
                raise KeyboardInterrupt

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        run()
    finally:
        sys.settrace(before)
    return calls


def test_after_a_ctrl_c_all_is_as_it_was_or_all_is_small():
    torch.manual_seed(0)
    model, x, widths = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)).eval(), torch.randn(4, 3), {}
    optimizer = torch.optim.Adam(model.parameters())
    pruner = Pruner(model, 0.5, "local", "movement", example_inputs=x)
    sparsifier = Sparsifier(model, "coupled", example_inputs=x)
    model(x).sum().backward()
    optimizer.step()
    fresh = model, optimizer, pruner, sparsifier
    _, mine, twin, _ = copy.deepcopy(fresh)
    for function, count in calls_of(lambda: twin.prune_to(1.0, mine, measure=False)).items():
        model, optimizer, pruner, sparsifier = copy.deepcopy(fresh)
        with pytest.raises(KeyboardInterrupt):
            calls_of(lambda p=pruner, o=optimizer: p.prune_to(1.0, o, measure=False), function, count)
        width = widths[function.co_name] = model[0].out_features
        assert width in (4, 8), function
        assert width == 4 or all(torch.equal(v, fresh[0].state_dict()[n]) for n, v in model.state_dict().items()), function
        assert all(v.shape in ((), p.shape) for p, entry in optimizer.state.items() for v in entry.values()), function
        assert pruner.channels["0.weight"] == (8, width), function
        sparsifier.apply_masks()
        pruner.prune_to(1.0, optimizer, measure=False)
        assert model(x).shape == (4, 2) and model[0].out_features == 4, function
    assert {"mask_channels_": 8, "operate": 8, "announce": 8, "after_cut": 8, "note_move": 4}.items() <= widths.items()


def test_an_interrupted_timing_leaves_the_small_model(monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    model = net()
    pruner = Pruner(model, 0.5, "local", "large_final", example_inputs=X)
    monkeypatch.setattr("fasterai.prune.removal.measured", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pruner.prune_model()
    assert (model[0].out_channels, pruner.channels["0.weight"]) == (4, (8, 4))


def test_what_a_sparsifier_remembers_is_cut_with_the_model():
    model = net()
    sparsifier = Sparsifier(model, "coupled", "local", "movement", example_inputs=X)
    Pruner(model, 0.5, "local", "large_final", example_inputs=X).prune_model(measure=False)
    with torch.no_grad():
        model[0].weight[1] += 1  # moves most
    sparsifier.sparsify_model(0.75)
    assert sparsifier.masks["0.weight"].flatten(1).all(1).tolist() == [False, True, False, False]


def test_groups_that_were_big_keep_multiples_of_eight_to_the_end():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 72), nn.ReLU(), nn.Linear(72, 5))
    pruner = Pruner(model, 0.8, "local", "large_final", example_inputs=torch.randn(2, 6), iterative_steps=10)
    for _ in range(10):
        pruner.prune_model(measure=False)
        assert model[0].out_features % 8 == 0
    assert model[0].out_features == 16


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
def test_a_copy_follows_its_own_model(copied):
    model = net()
    both = model, Pruner(model, 0.5, "local", "large_final", example_inputs=X)
    other, pruner = copied(both)
    Pruner(other, 0.25, "local", "large_final", example_inputs=X).prune_model(measure=False)
    assert pruner.channels["0.weight"] == (8, 6)
    pruner.prune_model(measure=False)
    assert (other[0].out_channels, model[0].out_channels) == (4, 8)


def halved_heads() -> tuple[Heads, torch.Tensor]:
    """A network whose attention has lost one of two heads, and half of what it reads."""
    x = torch.randn(2, 5, 6)
    model = Heads()
    pruner = Pruner(model, 0.5, "local", "large_final", example_inputs=x, round_to=1)
    pruner.prune_model(measure=False)
    assert pruner.channels == {"embed.weight": (8, 4), "query.weight": (2, 1)}
    return model, x


def test_of_a_small_model_the_ratio_counts_from_the_channels_there_were_at_first():
    model, x = halved_heads()
    first = {"embed.weight": 8, "query.weight": 2}
    pruner = Pruner(model, {"embed": 0.75, "value": 0.5}, "local", "large_final", example_inputs=x, round_to=1, original=first)
    assert pruner.channels == {"embed.weight": (8, 4), "query.weight": (2, 1)}
    pruner.prune_model(measure=False)
    assert pruner.channels == {"embed.weight": (8, 2), "query.weight": (2, 1)}
    with pytest.raises(ValueError, match=r"pruning_ratio's keys must be the name of a target .* got 'other'"):
        Pruner(model, {"other": 0.5}, "local", "large_final", example_inputs=x, original=first)


def test_a_state_leaves_groups_alone_that_the_last_head_makes():
    model, x = halved_heads()
    saved = Pruner(model, 0.5, "local", "large_final", example_inputs=x, original={"embed.weight": 8, "query.weight": 2})
    pruner = Pruner(model, 0.5, "local", "large_final", example_inputs=x)
    assert pruner.channels == {"embed.weight": (4, 4), "value.weight": (4, 4)}
    pruner.load_state_dict(saved.state_dict())
    assert pruner.channels == {"embed.weight": (8, 4), "query.weight": (2, 1)}


def test_exact_counts_that_leave_one_of_each_group_are_not_laid_to_rounding():
    pruner = Pruner(perceptron(6, 2, 3), 0.9, "local", "large_final", example_inputs=torch.ones(1, 6), round_to=1)
    with heard() as said:
        pruner.prune_model(measure=False)
    assert pruner.channels == {"0.weight": (2, 1)}
    assert len(said) == 1 and "min_keep=1 of each target are kept" in said[0]


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.m, self.b = nn.Linear(6, 32), nn.MultiheadAttention(32, 4, batch_first=True), nn.Linear(32, 3)

    def forward(self, x):
        x = self.a(x)
        return self.b(x + self.m(x, x, x)[0])


def test_features_go_that_an_attention_reads_while_all_its_heads_stay(tmp_path):
    x = torch.randn(2, 5, 6)
    model = Attention().eval()
    removal = Pruner(model, {"a": 0.5}, "local", "large_final", example_inputs=x).prune_model()
    assert (removal.removed, removal.refused) == ({"a.weight": (32, 16)}, {})
    assert (model.m.num_heads, model.m.embed_dim, model.m.kdim, model.m.vdim) == (4, 16, 16, 16)
    assert tuple(model.m.in_proj_weight.shape) == (96, 16)
    save_small(tmp_path / "small.safetensors", model)
    assert torch.equal(load_small(tmp_path / "small.safetensors", Attention().eval())(x), model(x))
    again = Pruner(model, 0.5, "local", "large_final", example_inputs=x).prune_model()
    assert again.removed == {"a.weight": (16, 8), "m.in_proj_weight": (4, 2)}
    assert (model.m.num_heads, model.m.embed_dim) == (2, 8)


def test_a_group_of_one_channel_counts_after_a_restart_as_well():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.ReLU(), nn.Conv2d(2, 12, 1), nn.ReLU(), nn.Conv2d(12, 4, 1)).eval()
    with torch.no_grad():
        model[0].weight[0], model[0].bias[0], model[2].weight[:, 0] = 1e-6, 1e-6, 1e-6
    pruner = Pruner(model, 0.7, "global", "large_final", example_inputs=X, round_to=1)
    pruner.prune_to(0.2, measure=False)  # 2 of 14: the small one, and one of twelve
    assert (model[0].out_channels, model[2].out_channels) == (1, 11)
    again = Pruner(copy.deepcopy(model), 0.7, "global", "large_final", example_inputs=X, round_to=1)
    again.load_state_dict(copy.deepcopy(pruner.state_dict()))
    assert again.channels == {"0.weight": (2, 1), "2.weight": (12, 11)}
    for one in (pruner, again):
        one.prune_to(1.0, measure=False)
        assert one.model[2].out_channels == 3  # 10 of 14 are gone


class Reading(nn.Module):
    """An attention whose outputs alone may go: it reads what comes in."""

    def __init__(self, **how):
        super().__init__()
        self.m, self.b = nn.MultiheadAttention(8, 2, batch_first=True, **how), nn.Linear(8, 3)

    def forward(self, x):
        return self.b(self.m(x, x, x, need_weights=False)[0])


@pytest.mark.parametrize("how", [{}, {"add_bias_kv": True}, {"add_zero_attn": True}], ids=str)
def test_an_attention_that_only_hands_on_less_stays_torchs_own(how):
    torch.manual_seed(0)
    model = Reading(**how).eval()
    ratios = {"m.out_proj": 0.5}
    removal = Pruner(model, ratios, "local", "large_final", example_inputs=torch.randn(2, 5, 8)).prune_model(measure=False)
    assert (removal.removed, removal.refused) == ({"m.out_proj.weight": (8, 4)}, {})
    assert type(model.m) is nn.MultiheadAttention


def test_groups_that_are_left_out_after_a_restart_do_not_count_as_gone():
    model = net()
    pruner = Pruner(model, 0.5, "local", "large_final", example_inputs=X)
    again = Pruner(copy.deepcopy(model), 0.5, "local", "large_final", ignored_layers=["0"], example_inputs=X)
    again.load_state_dict(pruner.state_dict())
    assert again.channels == {"3.weight": (16, 16)}


def test_a_removal_for_the_time_of_a_batch_is_timed_on_such_a_batch(monkeypatch):
    half = lambda model, graph, *_: [np.arange(g.channels) % 2 == 0 for g in graph.groups]  # noqa: E731
    monkeypatch.setattr("fasterai.prune.pruner.fit_budget", half)
    for budget, shape in ((Budget(latency=0.5, batch=3), "3x4"), (Budget(latency=0.5), "1x4")):
        pruner = Pruner(perceptron(4, 8, 2), budget, "local", "large_final", example_inputs=torch.randn(1, 4))
        assert pruner.prune_model().measurement.inputs == f"{shape} float32"


def test_the_line_has_a_schedule_where_one_was_given():
    given = [Pruner(net(), 0.5, "local", "large_final", *one, example_inputs=X) for one in ((), ("agp",))]
    start = "<Pruner: 0.5, Local(), Criterion(large_final)"
    assert [repr(one) for one in given] == [
        f"{start}; 24 of 24 channels left>",
        f"{start}, AGP(start_pct=0.2, end_pct=1.0); 24 of 24 channels left>",
    ]


class Shown(nn.Module):
    """Returns its 40 hidden channels too; 4 others may go."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 40), nn.Linear(40, 4), nn.Linear(4, 2)

    def forward(self, x):
        hidden = self.a(x)
        return hidden, self.c(self.b(hidden).relu())


def pruner_of(net, ratio=0.5, **options):
    return Pruner(net, ratio, "local", "large_final", example_inputs=torch.randn(1, 4), round_to=1, **options)


def test_half_asked_and_little_gone_is_said_with_the_share_that_each_reason_keeps():
    with heard() as said:
        removal = pruner_of(Shown()).prune_model(measure=False)
    # 374 numbers: 82 of the 164 of b go, and 4 of the 10 of c.
    assert removal.parameters == (374, 288)
    # Half of each matrix is its rows': 80 + 40 of a with its bias, 4 + 2 of c, and 80, the columns of b, that read the output.
    shares = {"it is an output of the network": 206 / 374, "linear reads a dimension of fixed size": 80 / 374}
    assert removal.kept_because == pytest.approx(shares)
    assert len(said) == 1 and said[0].startswith(
        "asked to prune 50 % of the channels, 23 % of the parameters went: 76 % cannot shrink, 55 % because it is an output "
    )
    assert removal.shortfall in str(removal) and removal.to_dict()["kept_because"] == removal.kept_because


def test_what_the_user_keeps_is_no_reason_to_warn():
    net = nn.Sequential(nn.Linear(4, 40), nn.ReLU(), nn.Linear(40, 4), nn.ReLU(), nn.Linear(4, 2))
    with heard() as said:
        removal = pruner_of(net, ignored_layers=["0"]).prune_model(measure=False)
    assert removal.kept_because["ignored_layers keeps it"] == pytest.approx((80 + 40 + 80) / 374)
    assert not said


def test_in_two_steps_the_share_counts_from_the_first_model():
    net = nn.Sequential(nn.Linear(4, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 4))
    pruner = pruner_of(net, iterative_steps=2)
    with heard() as said:
        pruner.prune_model(measure=False)
        removal = pruner.prune_model(measure=False)
    assert removal.dense > removal.parameters[0] and not removal.shortfall and not said


def test_a_model_without_removable_channels_is_refused_with_the_reasons():
    with pytest.raises(ValueError, match="got none: of its parameters 60 % because it is an output of the network, 40 %"):
        pruner_of(nn.Linear(4, 8))
