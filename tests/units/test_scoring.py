"""From targets to unit scores: open evidence, rules on units, normalisers of the user's own; values by hand."""

import copy
import pickle
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fasterai.callbacks.plain import attach
from fasterai.core import granularities
from fasterai.core.checks import from_catalogue
from fasterai.core.criteria import Criterion, fisher, large_final, taylor, variety
from fasterai.core.granularities import Block, Coupled, Keep, layer, weight
from fasterai.core.schedules import OneShot
from fasterai.graph.channels import channel_graph
from fasterai.model.targets import all_targets
from fasterai.prune.pruner import Pruner
from fasterai.sparse.sparsifier import Sparsifier
from fasterai.testing import check_criterion
from fasterai.units.channel_pools import channel_pools
from fasterai.units.evidence import Source
from fasterai.units.scoring import Scorer
from fasterai.units.target_pools import TargetPool


def linear(rows, bias=False):
    values = torch.tensor(rows, dtype=torch.float32)
    layer = nn.Linear(values.shape[1], values.shape[0], bias=bias)
    with torch.no_grad():
        layer.weight.copy_(values)
    return layer


def scores_of(model, criterion, granularity, keep=None, **given):
    pools = [TargetPool(t, granularity) for t in all_targets(model)]
    scorer = Scorer(criterion, granularity, Source(), [p.target for p in pools])
    return {s.name: s.tensor() for s in scorer(model, pools, keep or {}, **given)}


# --- gatherers -------------------------------------------------------------------------------------------------------


def positions(model, targets, source):
    """A gatherer: 1, 2, 3, ... for the outputs of each target."""
    return {t.name: torch.arange(1.0, len(t.parameter) + 1).view(-1, 1) for t in targets}


@dataclass(frozen=True)
class Times:
    """A gatherer with settings."""

    factor: float
    name: str = "times"

    def __call__(self, model, targets, source):
        return {t.name: torch.tensor(self.factor) for t in targets}


def test_a_function_gathers_under_its_own_name():
    criterion = Criterion(lambda e: e.weight * e.gathered["positions"], needs={positions})
    found = scores_of(linear([[1, 2], [3, 4]]), criterion, weight)
    assert found["weight"].tolist() == [[1, 2], [6, 8]]


def test_an_object_gathers_under_its_name_and_beside_named_evidence():
    def score(e):
        return e.weight * e.gathered["times"] + e.gathered["positions"] + e.initial

    criterion = Criterion(score, needs={Times(10.0), positions, "initial"})
    found = scores_of(linear([[1, 2], [3, 4]]), criterion, Keep("out"))
    # Means of the rows (10 + 1 + 1, 20 + 1 + 2) and (30 + 2 + 3, 40 + 2 + 4).
    assert found["weight"].tolist() == [[17.5], [40.5]]
    assert criterion.evidence_names == ("initial",)
    assert list(criterion.gatherers) == ["positions", "times"]


def test_an_elementwise_criterion_may_gather():
    def same_shape(model, targets, source):
        return {t.name: 2 * t.parameter for t in targets}

    criterion = Criterion(lambda e: e.gathered["same_shape"] - e.weight, needs={same_shape}, elementwise=True)
    assert scores_of(linear([[1, 2], [3, 4]]), criterion, weight)["weight"].tolist() == [[1, 2], [3, 4]]
    broadcast = Criterion(lambda e: e.weight * e.gathered["positions"], needs={positions}, elementwise=True)
    assert scores_of(linear([[1, 2], [3, 4]]), broadcast, weight)["weight"].tolist() == [[1, 2], [6, 8]]


@pytest.mark.parametrize("reads_data", [False, True])
def test_a_gatherer_that_says_so_sees_the_batch_of_a_training(reads_data):
    def first_input(model, targets, source):
        return {t.name: source.batches("inputs")[0].inputs[0][:1] for t in targets}

    first_input.reads_data = reads_data
    model = nn.Linear(4, 2, bias=False)
    criterion = Criterion(lambda e: e.gathered["first_input"].expand_as(e.weight), needs={first_input})
    sparsifier = Sparsifier(model, criteria=criterion, sparsity=0.5, schedule=OneShot(0.0), targets="weight")
    assert sparsifier.hears("after_forward") == reads_data
    optimizer, x = torch.optim.SGD(model.parameters(), 0.1), torch.tensor([[1.0, 4.0, 3.0, 2.0]])
    with attach(optimizer, sparsifier, total_steps=1) as handle:
        loss = handle.loss(model(x).sum(), x)
        loss.backward()
        if not reads_data:
            with pytest.raises(ValueError, match="data must be given"):
                optimizer.step()
            return
        optimizer.step()
    assert sparsifier.masks["weight"].tolist() == [[False, True, True, False]] * 2


def test_a_gatherer_sees_the_data_that_was_given():
    seen = []

    def batch_mean(model, targets, source):
        batch = source.batches("means")[0]
        seen.append(batch.inputs[0])
        return {t.name: batch.inputs[0].mean(0) for t in targets}

    model = nn.Linear(3, 2)
    criterion = Criterion(lambda e: e.weight.abs() * e.gathered["batch_mean"], needs={batch_mean})
    sparsifier = Sparsifier(model, "weight", criteria=criterion, sparsity=0.5, targets="weight", data=[torch.ones(4, 3)])
    sparsifier.sparsify_model()
    assert seen[0].shape == (4, 3)


@pytest.mark.parametrize(
    ("bring", "error", "message"),
    [
        (
            lambda m, t, s: {},
            ValueError,
            "gatherer own of criterion score must return a tensor for every target, got None for 0.weight",
        ),
        (
            lambda m, t, s: [1],
            TypeError,
            "gatherer own of criterion score must return a dict of target names to tensors, got a list",
        ),
        (
            lambda m, t, s: {x.name: torch.ones(3) for x in t},
            ValueError,
            r"broadcast against the weight, got shape \(3,\) for 0.weight of shape \(2, 4\)",
        ),
        (lambda m, t, s: {x.name: torch.ones(2, 2, 4) for x in t}, ValueError, r"got shape \(2, 2, 4\) for 0.weight"),
        (lambda m, t, s: {x.name: 1.0 for x in t}, ValueError, "must return a tensor for every target, got 1.0 for 0.weight"),
    ],
)
def test_what_a_gatherer_brings_is_checked(bring, error, message):
    def score(e):
        return e.weight

    bring.__name__ = "own"
    model = nn.Sequential(nn.Linear(4, 2))
    before = model[0].weight.clone()
    sparsifier = Sparsifier(model, criteria=Criterion(score, needs={bring}), targets="*weight")
    with pytest.raises(error, match=message):
        sparsifier.sparsify_model(0.5)
    assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize(
    ("needs", "error", "message"),
    [
        ({"norm"}, ValueError, "needs must be one of gradient, .*, got 'norm'"),
        ({lambda m, t, s: {}}, ValueError, "gatherers must have a name of their own, got '<lambda>'"),
        ({Times(1.0, "gradient")}, ValueError, "a name of their own, got 'gradient'"),
        ({Times(1.0), Times(2.0)}, ValueError, "gatherers of different names, got times, times"),
        ({Times(1.0, 3)}, TypeError, "gatherers must have a name, got Times"),
    ],
)
def test_needs_are_checked(needs, error, message):
    with pytest.raises(error, match=message):
        Criterion(lambda e: e.weight, needs=needs)


def test_a_criterion_with_a_gatherer_keeps_its_contract_and_its_sparsifier_its_state():
    criterion = Criterion(_times, needs={Times(2.0)}, elementwise=True, unit_rule=_reversed)
    check_criterion(criterion)
    assert pickle.loads(pickle.dumps(criterion)) == criterion
    sparsifier = Sparsifier(nn.Linear(4, 2), criteria=criterion, targets="weight")
    sparsifier.sparsify_model(0.5)
    twin = copy.deepcopy(sparsifier)
    twin.load_state_dict(sparsifier.state_dict())
    assert torch.equal(twin.masks["weight"], sparsifier.masks["weight"])


def _times(e):
    return e.weight.abs() * e.gathered["times"]


def _reversed(scores, weights):
    return -scores


# --- the layout and the mask so far ----------------------------------------------------------------------------------


def test_a_criterion_sees_the_layout():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 4, 1, groups=2))
    seen = []
    criterion = Criterion(lambda e: seen.append(e.layout) or e.weight.abs())
    Sparsifier(model, "filter", criteria=criterion, targets="*weight").sparsify_model(0.5)
    assert seen[0].shape == (2, 2, 2, 1, 1)


@pytest.mark.parametrize("elementwise", [False, True])
def test_a_criterion_sees_the_mask_so_far(elementwise):
    seen = []

    def note(e):
        seen.append(None if e.keep is None else e.keep.clone())
        return e.weight.abs()

    model = linear([[1, 2], [3, 4]])
    sparsifier = Sparsifier(model, "weight", criteria=Criterion(note, elementwise=elementwise), targets="weight")
    sparsifier.sparsify_model(0.25)
    assert all(x is None for x in seen)
    seen.clear()
    sparsifier.sparsify_model(0.5)
    assert seen[0].view(2, 2).tolist() == [[False, True], [True, True]]


@pytest.mark.parametrize("granularity", ["filter", "coupled"])
def test_the_mask_so_far_has_the_weights_shape(granularity):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
    seen = {}

    def note(e):
        seen.setdefault(e.name, e.keep)
        return e.weight.abs()

    sparsifier = Sparsifier(model, granularity, criteria=Criterion(note), example_inputs=torch.ones(1, 1, 9, 9), round_to=1)
    sparsifier.sparsify_model(0.25)
    seen.clear()
    sparsifier.sparsify_model(0.5)
    assert seen["0.weight"].shape == (4, 1, 3, 3)
    assert int(seen["2.weight"].sum()) == (3 * 4 if granularity == "filter" else 3 * 3) * 9


# --- rules on units, and normalisers ---------------------------------------------------------------------------------


def test_a_rule_sees_the_units_and_their_weights():
    seen = []

    def rule(scores, weights):
        seen.append((scores.tolist(), weights.tolist()))
        return scores.flip(0)

    found = scores_of(linear([[1, 3], [5, 7]]), large_final.using(unit_rule=rule), Keep("out"))
    assert seen == [([2.0, 6.0], [[1.0, 3.0], [5.0, 7.0]])]
    assert found["weight"].tolist() == [[6.0], [2.0]]


def test_a_rule_on_single_weights():
    found = scores_of(linear([[1, 3], [5, 7]]), large_final.using(unit_rule=lambda s, w: s * w[:, 0]), weight)
    assert found["weight"].tolist() == [[1.0, 9.0], [25.0, 49.0]]


def test_a_rule_comes_before_the_normaliser():
    criterion = large_final.using(reducer="sum", normalizer="sum", unit_rule=lambda s, w: s + 4)
    # Sums 4 and 12, by the rule 8 and 16.
    assert scores_of(linear([[1, 3], [5, 7]]), criterion, Keep("out"))["weight"].flatten().tolist() == pytest.approx(
        [1 / 3, 2 / 3]
    )


def test_no_weights_are_joined_without_a_rule(monkeypatch):
    monkeypatch.setattr(TargetPool, "vectors_of_units", lambda self: pytest.fail("not asked for"))
    scores_of(linear([[1, 3], [5, 7]]), large_final, Keep("out"))


def test_weights_of_units_by_granularity():
    model = linear([[1, 2, 3], [4, 5, 6]])
    (target,) = all_targets(model)

    def vectors(granularity):
        return TargetPool(target, granularity).vectors_of_units().tolist()

    assert vectors(Keep("out")) == [[1, 2, 3], [4, 5, 6]]
    assert vectors(Keep("in")) == [[1, 4], [2, 5], [3, 6]]
    assert vectors(layer) == [[1, 2, 3, 4, 5, 6]]
    assert vectors(weight) == [[1], [2], [3], [4], [5], [6]]
    assert vectors(Block(1, 2)) == [[1, 2], [3, 0], [4, 5], [6, 0]], "smaller ones at the edge are filled up"
    assert vectors(Block(2, 2)) == [[1, 2, 4, 5], [3, 6, 0, 0]]
    assert vectors(Block(2, 3)) == [[1, 2, 3, 4, 5, 6]]


def test_weights_of_kernels_of_a_grouped_convolution():
    conv = nn.Conv2d(4, 4, (1, 2), groups=2, bias=False)
    with torch.no_grad():
        conv.weight.copy_(torch.arange(16.0).view(4, 2, 1, 2))
    (target,) = all_targets(conv)
    assert TargetPool(target, Keep("out", "in")).vectors_of_units().tolist() == [[2.0 * i, 2.0 * i + 1] for i in range(8)]


def test_weights_of_coupled_channels_are_all_their_slices():
    first, last = linear([[1, 2], [3, 4]]), linear([[5, 6], [7, 8], [9, 0]])
    model = nn.Sequential(first, nn.ReLU(), last)
    (pool,) = channel_pools(model, channel_graph(model, (torch.ones(1, 2),)), Coupled())
    # A channel is a row of the first layer and a column of the second.
    assert pool.vectors_of_units().tolist() == [[1, 2, 5, 7, 9], [3, 4, 6, 8, 0]]


def test_half_precision_is_widened_for_a_rule():
    model = linear([[1, 2], [3, 4]]).half()
    (target,) = all_targets(model)
    assert TargetPool(target, Keep("out")).vectors_of_units().dtype is torch.float32


def test_a_normaliser_may_be_a_function():
    criterion = large_final.using(normalizer=lambda scores: scores * 10)
    assert scores_of(linear([[1, 3], [5, 7]]), criterion, Keep("out"))["weight"].tolist() == [[20.0], [60.0]]
    assert scores_of(linear([[1, 3], [5, 7]]), criterion, weight)["weight"].tolist() == [[10.0, 30.0], [50.0, 70.0]]


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (
            {"unit_rule": lambda s, w: w},
            r"unit_rule of criterion <lambda> for 0.weight must return as many scores .* shape \(2,\), got \(2, 4\)",
        ),
        (
            {"unit_rule": lambda s, w: None},
            "unit_rule of criterion <lambda> for 0.weight must return as many scores .*, got None",
        ),
        (
            {"normalizer": lambda s: s.sum()},
            r"normalizer of criterion <lambda> for 0.weight must return .* of shape \(2, 1\), got \(\)",
        ),
    ],
)
def test_what_rules_and_normalisers_return_is_checked(part, message):
    sparsifier = Sparsifier(
        nn.Sequential(nn.Linear(4, 2)), Keep("out"), criteria=Criterion(lambda e: e.weight, **part), targets="*weight"
    )
    with pytest.raises(ValueError, match=message):
        sparsifier.sparsify_model(0.5)


def test_a_rule_that_is_no_function_is_refused():
    with pytest.raises(TypeError, match="unit_rule must be a function of unit scores and their weights, got 'max'"):
        Criterion(lambda e: e.weight, unit_rule="max")


def median_distance(scores, weights):
    """Distance to all others: what is like the others is replaced by them (FPGM, He et al. 2019)."""
    return torch.cdist(weights, weights).sum(1)


def test_a_rule_prunes_what_is_like_the_others_in_masks_and_removals():
    torch.manual_seed(0)
    first, last = linear([[0, 1], [0, 1.1], [0, 1.2], [9, 0]]), nn.Linear(4, 2)
    with torch.no_grad():
        last.weight.fill_(1.0)
    criterion = large_final.using(unit_rule=median_distance)
    model = nn.Sequential(first, nn.ReLU(), last)
    x = torch.ones(1, 2)
    sparsifier = Sparsifier(copy.deepcopy(model), "coupled", criteria=criterion, example_inputs=x, round_to=1)
    sparsifier.sparsify_model(0.25)
    # Distances: 0.1 + 0.2 + 9.06, 0.1 + 0.1 + 9.07, 0.2 + 0.1 + 9.08, and 27.2 of the last.
    assert sparsifier.masks["0.weight"].any(1).tolist() == [True, False, True, True]
    Pruner(model, 0.25, "local", criterion, example_inputs=x, round_to=1).prune_model()
    torch.testing.assert_close(model[0].weight, torch.tensor([[0, 1], [0, 1.2], [9, 0]]))


def test_gathered_evidence_is_there_in_a_training():
    def of_gradient(model, targets, source):
        return {t.name: t.parameter.grad for t in targets}

    model = nn.Linear(8, 4)
    criterion = Criterion(lambda e: e.gathered["of_gradient"].abs(), needs={of_gradient})
    sparsifier = Sparsifier(model, criteria=criterion, sparsity=0.5, schedule=OneShot(0.0), targets="weight")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with attach(optimizer, sparsifier, total_steps=1):
        F.cross_entropy(model(torch.randn(4, 8)), torch.arange(4)).backward()
        optimizer.step()
    kept = sparsifier.masks["weight"]
    assert model.weight.grad.abs()[kept].min() >= model.weight.grad.abs()[~kept].max()


# --- variety: a rule that compares units -----------------------------------------------------------------------------


def with_copies():
    """Two convolutions: in the first, the filters 1, 3 and 5 point the same way, and filter 7 is small."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with torch.no_grad():
        model[0].weight[3], model[0].weight[5] = 2 * model[0].weight[1], 0.5 * model[0].weight[1]
        model[0].bias.zero_()
        model[0].weight[7] *= 0.01
    return model


IMAGES = torch.randn(4, 3, 9, 9, generator=torch.Generator().manual_seed(1))


def kept(sparsifier, name="0.weight"):
    return sparsifier.masks[name].flatten(1).any(1).nonzero().flatten().tolist()


@pytest.mark.parametrize("on", ["weights", "activations"])
@pytest.mark.parametrize(("granularity", "similarity"), [("filter", "cosine"), ("filter", "pearson"), ("coupled", "cosine")])
def test_copies_go_and_the_rare_stay(granularity, similarity, on):
    model = with_copies()
    with torch.no_grad():  # a channel's readers are slices of it, too
        model[2].weight[:, 3], model[2].weight[:, 5] = 2 * model[2].weight[:, 1], 0.5 * model[2].weight[:, 1]
    options = {"targets": ["0.weight"]} if granularity == "filter" else {}
    by = variety(large_final, similarity, on)
    sparsifier = Sparsifier(model, granularity, "local", by, data=[IMAGES], example_inputs=IMAGES, **options)
    sparsifier.sparsify_model(0.25)
    assert kept(sparsifier) == [0, 2, 3, 4, 6, 7]
    plain = Sparsifier(with_copies(), "filter", "local", large_final, example_inputs=IMAGES, targets=["0.weight"])
    plain.sparsify_model(0.25)
    assert 7 not in kept(plain)


@pytest.mark.parametrize("sparsity", [0.1, 0.4, 0.75])
@pytest.mark.parametrize("context", ["local", "global", "erk", "lamp"])
def test_each_layer_loses_as_many_as_by_the_criterion_alone(context, sparsity):
    counts = []
    for by in (large_final, variety(large_final)):
        sparsifier = Sparsifier(with_copies(), "filter", context, by, targets="*weight")
        sparsifier.sparsify_model(sparsity)
        counts.append([len(kept(sparsifier, name)) for name in ("0.weight", "2.weight")])
    assert counts[0] == counts[1] and (sum(counts[0]) == 24 - round(24 * sparsity) or context == "local")


def test_pruned_units_disturb_no_other_and_an_empty_pool_stays_empty():
    sparsifier = Sparsifier(with_copies(), "filter", "local", "variety(small_final)", targets=["0.weight"], min_keep=0)
    gone: list[int] = []
    for sparsity in (0.25, 0.5, 0.75, 1.0, 1.0):
        sparsifier.sparsify_model(sparsity)
        now = sorted(set(range(8)) - set(kept(sparsifier)))
        assert set(gone) <= set(now) and len(now) == 8 * sparsity
        gone = now
    sparsifier.sparsify_model(0.5)
    assert len(kept(sparsifier)) == 4


def test_zeros_that_no_mask_has_made_are_refused_where_they_are_all_and_nothing_changes():
    model = with_copies()
    nn.init.zeros_(model[2].weight)
    sparsifier = Sparsifier(model, "filter", "local", "variety(large_final)", targets="*weight")
    with pytest.raises(ValueError, match="must have a direction to be compared by cosine, got units of norm 0: 16") as found:
        sparsifier.sparsify_model(0.5)
    assert found.value.__notes__ == ["raised by the unit_rule of the criterion large_final, for 2.weight"]
    assert sparsifier.sparsity.overall == 0 and bool((model[0].weight != 0).all())


@pytest.mark.parametrize("granularity", ["filter", "coupled"])
def test_what_filters_put_out_is_compared_where_that_is_asked_for(granularity):
    """Filters 0 and 1 differ where the images have nothing; filters 2 and 3 are nearly copies, but for their readers."""
    model = nn.Sequential(nn.Conv2d(2, 4, 1, bias=False), nn.ReLU(), nn.Conv2d(4, 3, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[2.0, 9.0], [1.9, -9.0], [1.0, -1.0], [0.9, -1.0]]).view(4, 2, 1, 1))
        model[2].weight.copy_(torch.eye(4)[:3].view(3, 4, 1, 1))
    x = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 0.0]).view(2, 1, 1)
    gone = {}
    for on in ("weights", "activations"):
        options = {"targets": ["0.weight"]} if granularity == "filter" else {}
        by = variety("small_final", on=on)
        sparsifier = Sparsifier(copy.deepcopy(model), granularity, "local", by, data=[x], example_inputs=x, **options)
        sparsifier.sparsify_model(0.25)
        gone[on] = sorted({0, 1, 2, 3} - set(kept(sparsifier)))
    assert gone["activations"] == [0]  # the larger of the first two
    assert gone["weights"] == ([2] if granularity == "filter" else [1])  # the readers count as well, and tell 2 and 3 apart


def test_a_pruner_takes_copies_out():
    model = with_copies()
    pruner = Pruner(model, 0.25, "local", "variety(large_final)", example_inputs=IMAGES, round_to=1)
    with torch.no_grad():
        model[2].weight[:, 3], model[2].weight[:, 5] = 2 * model[2].weight[:, 1], 0.5 * model[2].weight[:, 1]
    wanted = model[0].weight[[0, 2, 3, 4, 6, 7]].clone()
    pruner.prune_model()
    assert torch.equal(model[0].weight, wanted)


def test_a_criterion_of_outputs_reads_the_batches_of_a_training():
    model = with_copies()
    by = variety("taylor", on="activations")
    sparsifier = Sparsifier(model, "filter", "local", by, sparsity=0.5, schedule="lin", targets="*weight")
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    with attach(optimizer, sparsifier, total_steps=3, model=model) as handle:
        for _ in range(3):
            out = model(IMAGES)
            handle.loss(out.square().mean(), IMAGES, (), out).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert (len(kept(sparsifier)), len(kept(sparsifier, "2.weight"))) == (4, 8)
    assert copy.deepcopy(sparsifier).criteria == by


# --- units whose parts are summed up and squared ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("granularity", "wanted"), [("row", [[25.0], [4.0]]), ("column", [[16.0, 121.0]]), ("layer", [[49.0]])]
)
def test_taylor_of_a_unit_is_the_square_of_its_summed_parts(granularity, wanted):
    model = linear([[1.0, 2.0], [3.0, -1.0]])
    model.weight.grad = torch.tensor([[1.0, -3.0], [1.0, 5.0]])  # parts 1, -6 and 3, -5
    found = scores_of(model, taylor, from_catalogue("granularity", granularity, granularities))["weight"]
    assert found.tolist() == wanted


def test_taylor_of_a_weight_and_fisher_of_a_unit_are_of_single_squares():
    model = linear([[1.0, 2.0], [3.0, -1.0]])
    model.weight.grad = torch.tensor([[1.0, -3.0], [1.0, 5.0]])
    assert scores_of(model, taylor, weight)["weight"].tolist() == [[1.0, 36.0], [9.0, 25.0]]
    assert scores_of(model, fisher, granularities.row)["weight"].tolist() == [[18.5], [17.0]]


@pytest.mark.parametrize("over", ["sum", "mean"])
def test_taylor_of_a_channel_is_the_squared_gradient_of_gates_averaged_over_batches(over):
    """Against autograd: a gate on what makes a channel, and one on what reads it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    data = [(torch.randn(6, 4).double(), torch.randint(0, 3, (6,))) for _ in range(3)]
    granularity = Coupled(over, relative=False)
    pools = channel_pools(model, channel_graph(model, (data[0][0],)), granularity)
    scorer = Scorer(taylor, granularity, Source(data=data, loss=F.cross_entropy), all_targets(model))
    (found,) = scorer(model, pools, {})
    wanted = torch.zeros(5, dtype=torch.float64)
    for x, y in data:
        made, read = (torch.ones(5, dtype=torch.float64, requires_grad=True) for _ in range(2))
        hidden = F.linear(x, model[0].weight * made[:, None], model[0].bias).tanh() * read
        slopes = torch.autograd.grad(F.cross_entropy(model[2](hidden), y), (made, read))
        wanted += (sum(slopes) / (1 if over == "sum" else 2)).square() / len(data)
    assert torch.allclose(found.tensor(), wanted, rtol=1e-9)
