"""First looks at groups of channels: several steps choose as one does, states go on bit for bit, and training shows."""

import copy
import warnings

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import nn

from fasterai.core import criteria
from fasterai.core.checks import from_catalogue
from fasterai.core.saved import check_parts
from fasterai.prune.pruner import Pruner
from fasterai.prune.removal import remove
from fasterai.sparse.sparsifier import Sparsifier
from fasterai.units.looks import Look, check_looks, look_at
from tests.networks import perceptron, residual

X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1))
#: Criteria of the weights alone, by which all channels compete, or those of their group.
BY = {"large_final": "global", "squared_final": "global", "small_final": "global", "random": "global", "abs": "local"}


def drawn(model, seed):
    """Fill a model's parameters with numbers of a seed, of another size in each."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * torch.rand((), generator=generator) + 0.01)
    return model


@pytest.fixture(scope="module")
def made():
    """Criterion -> a model with its pruner, and one with its sparsifier, to copy; looking at a model takes long."""
    pairs = {}
    for context in set(BY.values()):
        first, second = residual(8, 7), residual(8, 7)
        options = {"example_inputs": X, "round_to": 1}
        pruner = Pruner(first, 0.6, context, "large_final", **options)
        pairs[context] = (first, pruner), (second, Sparsifier(second, "coupled", context, "large_final", **options))
    found = {by: copy.deepcopy(pairs[context]) for by, context in BY.items()}
    for by, two in found.items():
        for _, one in two:
            one.criteria = one._scorer.criterion = from_catalogue("criteria", by, criteria)
    return found


def removed(pair, seed, shares):
    model, pruner = copy.deepcopy(pair)
    drawn(model.eval(), seed)
    for share in shares:
        pruner.prune_to(share, measure=False)
    return model.state_dict()


def masked(pair, seed, shares):
    model, sparsifier = copy.deepcopy(pair)
    drawn(model, seed)
    for share in shares:
        sparsifier.sparsify_model(0.6 * share)
    return model.state_dict()


def equal(one, other):
    return all(torch.equal(x, y) for x, y in zip(one.values(), other.values(), strict=True))


STEPS = st.lists(st.floats(0.1, 1), min_size=1, max_size=4).map(sorted)


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
@given(by=st.sampled_from(list(BY)), seed=st.integers(0, 99), shares=STEPS)
@example(by="large_final", seed=0, shares=[i / 10 for i in range(1, 11)])
def test_masks_of_any_steps_are_those_of_one(made, by, seed, shares):
    assert equal(masked(made[by][1], seed, shares), masked(made[by][1], seed, shares[-1:]))


@settings(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
@given(by=st.sampled_from(list(BY)), seed=st.integers(0, 99), shares=STEPS)
@example(by="large_final", seed=0, shares=[0.2, 0.5, 1.0])
def test_channels_removed_in_any_steps_are_those_of_one(made, by, seed, shares):
    assert equal(removed(made[by][0], seed, shares), removed(made[by][0], seed, shares[-1:]))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_saved_state_goes_on_as_if_it_had_not_been_left(made, seed):
    first, sparsifier = copy.deepcopy(made["large_final"][1])
    drawn(first, seed)
    sparsifier.sparsify_model(0.3)
    state, saved = sparsifier.state_dict(), copy.deepcopy(first.state_dict())
    kept = copy.deepcopy(state)
    second, other = copy.deepcopy(made["large_final"][1])
    second.load_state_dict(saved)
    other.load_state_dict(state)
    assert str(state) == str(kept)
    for one in (sparsifier, other):
        one.sparsify_model(0.6)
    assert equal(first.state_dict(), second.state_dict())
    assert str(other.state_dict()["looks"]) == str(sparsifier.state_dict()["looks"])


def test_the_state_of_a_pruner_goes_on_and_an_earlier_one_looks_anew(made):
    model, pruner = copy.deepcopy(made["large_final"][0])
    drawn(model.eval(), 3)
    pruner.prune_to(0.5, measure=False)
    state = pruner.state_dict()
    other = copy.deepcopy(pruner)
    other._scorer.forget_looks()
    assert not other.state_dict()["looks"]
    other.load_state_dict(state)
    assert str(other.state_dict()) == str(state)
    del state["looks"]
    other.load_state_dict(state)
    assert not other.state_dict()["looks"]
    other.prune_to(1.0, measure=False)
    assert sum(now for _, now in other.channels.values()) == 6  # of 15


def test_the_scale_stays_where_channels_are_taken_out_by_others(made):
    model, sparsifier = copy.deepcopy(made["large_final"][1])
    drawn(model.eval(), 4)
    sparsifier.sparsify_model(0.4)
    before = sparsifier._scorer.looks
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        remove(model, X, measure=False)
    after = sparsifier._scorer.looks
    assert {n: float(look.scale) for n, look in before.items()} == {n: float(look.scale) for n, look in after.items()}
    assert all(not look.base.numel() for look in after.values())
    sparsifier.sparsify_model(0.5)
    assert sparsifier.sparsity.overall == pytest.approx(0.5, abs=0.07)


# --- by hand ---------------------------------------------------------------------------------------------------------


def look(scale, base, then, mean=1.0):
    return Look(torch.tensor(scale), torch.tensor(mean), torch.tensor(base), torch.tensor(then))


def test_what_others_took_is_given_back_and_training_counts_by_its_ratio():
    # The first channel is as it was, the second has grown by half, the third has lost all, the fourth has changed its sign.
    one = look(4.0, [3.0, 8.0, 5.0, -2.0], [1.0, 4.0, 5.0, 1.0])
    found, scale = look_at(torch.tensor([1.0, 6.0, 0.0, 2.0]), None, one)
    assert found.tolist() == [3.0, 12.0, 0.0, -1.0]
    assert float(scale) == 16.0  # their mean magnitude is 4, the last step had left 1


def test_the_scale_follows_training_and_stays_to_the_bit_without():
    one = look(0.1, [1.0, 3.0], [0.5, 3.0], mean=1.9)
    assert torch.equal(look_at(torch.tensor([0.5, 3.0]), None, one)[1], one.scale)  # not 0.1 x 2 / 1.9
    assert float(look_at(torch.tensor([0.5, 6.0]), None, one)[1]) == pytest.approx(0.1 * 3.5 / 1.9)


def test_a_channel_of_which_nearly_nothing_was_left_does_not_grow_by_factors():
    one = look(1.0, [2.0, 2.0], [0.0, 1e-3])
    assert look_at(torch.tensor([0.5, 1.001]), None, one)[0].tolist() == [2.5, 3.0]


def test_scores_of_data_have_the_scale_that_the_first_channels_would_have():
    # The last step has left channels of mean 5, of first ones with mean 4; now those left have mean 10.
    one = look(4.0, [], [], mean=5.0)
    found, scale = look_at(torch.tensor([8.0, 12.0, 0.0]), torch.tensor([True, True, False]), one)
    assert found.tolist() == [8.0, 12.0, 0.0]
    assert float(scale) == 8.0


def test_the_first_look_is_at_the_mean_of_what_is_kept():
    scores = torch.tensor([1.0, 2.0, 3.0, -6.0])
    assert float(look_at(scores, None, None)[1]) == 3.0
    assert float(look_at(scores, torch.tensor([False, True, True, False]), None)[1]) == 2.5


def test_what_a_step_leaves_behind():
    found = Look.after(torch.tensor([4.0, 2.0]), torch.tensor(3.0), torch.tensor([True, False]), torch.tensor([1.0, 0.0]))
    assert (found.base.tolist(), found.then.tolist(), float(found.mean)) == ([4.0, 0.0], [1.0, 0.0], 4.0)
    assert str(Look.from_dict(found.to_dict())) == str(found)


def test_units_of_one_target_are_not_looked_at():
    sparsifier = Sparsifier(perceptron(4, 6, 3), "row", "global", "large_final", example_inputs=torch.ones(1, 4))
    sparsifier.sparsify_model(0.5)
    assert sparsifier.state_dict()["looks"] == {}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda one: one.pop("scale"), ValueError, "without scale"),
        (lambda one: one.update(base=3), TypeError, "must be a tensor, got 3"),
        (lambda one: one.update(mean=torch.tensor(float("nan"))), ValueError, "must be finite"),
        (lambda one: one.update(then=torch.ones(3)), ValueError, r"as many scores then as before, got \(3,\)"),
        (lambda one: one.update(scale=torch.ones(2)), ValueError, "one scale and one mean, got 2 and 1"),
    ],
)
def test_a_broken_look_is_refused(change, error, message):
    one = look(1.0, [1.0], [1.0]).to_dict()
    check_parts({"looks": {"conv": one}}, "Sparsifier", {"looks": check_looks})
    change(one)
    with pytest.raises(error, match=message):
        check_parts({"looks": {"conv": one}}, "Sparsifier", {"looks": check_looks})


def test_a_function_that_is_bound_to_the_shapes_still_prunes_once():
    model = residual(8, 7).eval()
    tables = {p.shape: torch.rand(p.shape) for p in model.parameters()}
    pruner = Pruner(model, 0.5, "global", lambda w: w.abs() * tables[w.shape], example_inputs=X, round_to=1)
    pruner.prune_model(measure=False)
    assert sum(now for _, now in pruner.channels.values()) == 7  # of 15
    assert not any(look["base"].numel() for look in pruner.state_dict()["looks"].values())


def test_training_in_between_changes_the_choice(made):
    model, sparsifier = copy.deepcopy(made["large_final"][1])
    drawn(model, 5)
    sparsifier.sparsify_model(0.2)
    keep = sparsifier._record.keep["stem.weight"]
    strongest = int((sparsifier._scorer.looks["stem.weight"].base * keep).argmax())
    with torch.no_grad():
        for name, d in (("stem.weight", 0), ("branch.0.weight", 1), ("branch.3.weight", 0), ("head.weight", 1)):
            nn.Module.get_parameter(model, name).select(d, strongest).mul_(1e-3)
    sparsifier.sparsify_model(0.4)
    assert keep[strongest] and not sparsifier._record.keep["stem.weight"][strongest]
