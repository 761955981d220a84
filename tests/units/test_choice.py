"""From scores to masks by each rule, with expected decisions worked out by hand."""

import pickle
from dataclasses import FrozenInstanceError

import pytest
import torch
from torch import nn

from fasterai.callbacks.plain import attach
from fasterai.core import contexts
from fasterai.core.contexts import NM, PerTarget
from fasterai.core.criteria import Criterion, Random, WeightFunction, large_final
from fasterai.core.granularities import Keep, layer, weight
from fasterai.core.schedules import OneShot
from fasterai.core.selection import TensorScores
from fasterai.core.types import Limits
from fasterai.model.targets import all_targets
from fasterai.sparse.sparsifier import Sparsifier
from fasterai.units import rules
from fasterai.units.choice import Goal, choose, limits_of
from fasterai.units.rules import DropAndGrow, Free, Moment, Nested, Rule, free, large_gradient, nested
from fasterai.units.target_pools import TargetPool

LOCAL, HALF = contexts.local, Goal(contexts.local, 0.5)
T, F = True, False


def pools(*sizes, granularity=weight):
    model = nn.ModuleDict({f"l{i}": nn.Linear(n, 1, bias=False) for i, n in enumerate(sizes)})
    return [TargetPool(t, granularity) for t in all_targets(model)]


def scores(values, keep=None, name="l0.weight"):
    held = None if keep is None else torch.tensor([keep])
    return TensorScores(name, torch.tensor([values], dtype=torch.float32), held)


def chosen(values, keep, goal=HALF, rule=nested, moment=None, grow=None, **limits):
    """The decisions on one target of a row of weights."""
    (pool,) = pools(len(values))
    given = None if grow is None else lambda criterion: [scores(grow)]
    (result,) = choose([pool], [scores(values, keep)], goal, Limits(**limits), rule=rule, moment=moment, grow=given)
    return result[0].tolist()


# --- goals ---------------------------------------------------------------------------------------------------------------


def test_a_share_of_a_goal_is_that_share_of_its_sparsity():
    assert Goal(LOCAL, 0.8).at(0.5) == Goal(LOCAL, 0.4)


def test_what_is_asked_for_in_units():
    counts = {"a": 10, "b": 4}
    assert Goal(LOCAL, 0.5).total(counts) == 7
    assert Goal(PerTarget({"a": 0.2}), 0.5).asked(counts) == (1, 0)


def test_the_highest_sparsity_of_any_pool():
    assert Goal(LOCAL, 0.7).highest == 0.7
    assert Goal(PerTarget({"a": 0.2, "b": 0.6}), 0.5).highest == pytest.approx(0.3)
    assert Goal(PerTarget({}), 1.0).highest == 0


def test_what_is_left_to_go_of_groups_that_have_shrunk():
    # Half of 10 and of 8 are to go, 5 and 4; 2 and 4 are gone: 3 of the 8 left, and none of the 4.
    found = Goal(LOCAL, 0.5).left({"a": 10, "b": 8}, {"a": 8, "b": 4})
    assert found == Goal(PerTarget({"a": 3 / 8, "b": 0.0}), 1.0)


def test_what_is_left_to_go_where_all_groups_compete():
    # 10 of 20 are to go; 2 and 7 are gone, the second group has one channel left and is none any more: 1 of 10.
    assert Goal(contexts.global_, 0.5).left({"a": 12, "b": 8}, {"a": 10}) == Goal(contexts.global_, 0.1)


def test_what_is_left_to_go_of_named_groups():
    found = Goal(PerTarget({"a": 0.5}), 0.8).left({"a": 10, "b": 8}, {"a": 8, "b": 8})
    assert found == Goal(PerTarget({"a": 2 / 8, "b": 0.0}), 1.0)


def test_limits_follow_the_pools():
    assert limits_of(pools(4)) == Limits(min_keep=1, make_up=True)
    assert limits_of(pools(4, granularity=layer), min_keep=3).min_keep == 0, "a target that is one unit may go"
    assert limits_of(pools(4, 8), round_to=4) == Limits(round_to={"l0.weight": 4, "l1.weight": 4})
    assert limits_of(pools(4), round_to=1) == Limits(), "a multiple of one is no rounding"


# --- rules ---------------------------------------------------------------------------------------------------------------


def test_every_rule_is_a_frozen_value_that_pickles():
    for rule in (nested, free, Free(every=3, until=0.5), DropAndGrow(), DropAndGrow(2, 0.5, 0.1, "random")):
        assert pickle.loads(pickle.dumps(rule)) == rule
        assert isinstance(rule, Rule)
    with pytest.raises(FrozenInstanceError):
        free.every = 2
    assert rules.__all__ == ["free", "nested"]


def test_nested_keeps_what_it_has_at_the_same_count():
    assert chosen([1, 2, 3, 4], [T, T, F, F]) == [T, T, F, F]


def test_nested_goes_on_from_what_is_pruned():
    assert chosen([5, 6, 7, 1, 2, 3], [F, T, T, T, T, T]) == [F, T, T, F, F, T]


def test_free_chooses_anew_at_the_same_count():
    assert chosen([1, 2, 3, 4], [T, T, F, F], rule=free) == [F, F, T, T]
    assert chosen([1, 2, 3, 4], [T, T, F, F], rule=free, moment=Moment(5, 0.5)) == [F, F, T, T]


def test_free_prunes_no_less_than_is_pruned_while_the_number_rises():
    quarter = Goal(LOCAL, 0.25)
    assert chosen([1, 2, 3, 4], [T, F, F, F], quarter, free, may_fall=False) == [F, F, F, T]
    assert chosen([1, 2, 3, 4], [T, F, F, F], quarter, free, may_fall=True) == [F, T, T, T]


def test_free_is_nested_after_its_end():
    late = Moment(9, 0.9)
    assert chosen([1, 2, 3, 4], [T, T, F, F], rule=Free(until=0.8), moment=late) == [T, T, F, F]
    assert chosen([1, 2, 3, 4], [T, T, F, F], rule=Free(until=0.9), moment=late) == [F, F, T, T]


def test_free_leaves_min_keep_in_each_target():
    two = pools(4, 4)
    given = [scores([1, 2, 3, 4], [F, T, T, T]), scores([9, 8, 7, 6], [T, T, T, T], "l1.weight")]
    keeps = choose(two, given, Goal(contexts.global_, 0.5), Limits(min_keep=1), rule=free)
    assert [k[0].tolist() for k in keeps] == [[F, F, F, T], [T, T, T, F]]


def test_free_leaves_two_of_four_anew():
    half = Goal(contexts.two_four, 0.5)
    values, keep = [4, 3, 2, 1, 5, 6, 7, 8], [F, F, T, T, T, T, F, F]
    assert chosen(values, keep, half) == keep
    assert chosen(values, keep, half, free) == [T, T, F, F, F, F, T, T]


@pytest.mark.parametrize("context", [contexts.local, contexts.global_, contexts.erk, contexts.lamp, NM(1, 4)])
@pytest.mark.parametrize("share", [0.25, 0.5, 0.6])
def test_counts_are_exact_and_the_choice_is_that_of_a_dense_model(context, share):
    # The oracle: the same context without any masks so far.
    generator = torch.Generator().manual_seed(0)
    two = pools(8, 20)
    values = [torch.rand(1, n, generator=generator) for n in (8, 20)]
    keeps = [torch.rand(1, n, generator=generator) > 0.3 for n in (8, 20)]
    masked = [TensorScores(p.name, v, k) for p, v, k in zip(two, values, keeps, strict=True)]
    dense = [TensorScores(p.name, v) for p, v in zip(two, values, strict=True)]
    found = choose(two, masked, Goal(context, share), Limits(), rule=free)
    wanted = choose(two, dense, Goal(context, share), Limits())
    assert all(map(torch.equal, found, wanted))
    wanted_count = round(8 * share) + round(20 * share) if not context.joins_targets else round(28 * share)
    assert sum(int((~k).sum()) for k in found) == wanted_count


def test_rules_are_due_every_few_steps_until_a_position():
    rule = Free(every=3, until=0.5)
    assert [step for step in range(1, 21) if rule.is_due(Moment(step, step / 20))] == [3, 6, 9]
    assert not nested.is_due(Moment(3, 0.3))


EVERY = Moment(100, 0.5)


def test_drop_and_grow_exchanges_the_lowest_kept_for_the_best_pruned():
    # Four are kept, half of them are exchanged: 6 and 5 go, gradients 4 and 3 of the pruned come; 9 belongs to a kept one.
    found = chosen(
        [8, 7, 6, 5, 4, 3, 2, 1],
        [T, T, T, T, F, F, F, F],
        rule=DropAndGrow(fraction=0.5),
        moment=EVERY,
        grow=[9, 9, 9, 9, 1, 4, 2, 3],
    )
    assert found == [T, T, F, F, F, T, F, T]


def test_drop_and_grow_settles_ties_by_position():
    found = chosen(
        [1, 1, 1, 1, 0, 0, 0, 0], [T, T, T, T, F, F, F, F], rule=DropAndGrow(fraction=0.5), moment=EVERY, grow=[0] * 8
    )
    assert found == [F, F, T, T, F, F, T, T], "the first drop first, the last grow first"


def test_drop_and_grow_exchanges_no_more_than_are_pruned():
    found = chosen([4, 3, 2, 1], [T, T, T, F], Goal(LOCAL, 0.25), DropAndGrow(fraction=1.0), EVERY, [0, 0, 0, 0])
    assert found == [T, T, F, T]


def test_drop_and_grow_follows_a_rising_count_and_what_was_dropped_does_not_grow():
    # From 2 to 4 pruned: 1 and 2 go by the schedule. Of 4 kept 2 are exchanged: 3 and 4 for the two pruned before.
    found = chosen([9, 9, 1, 2, 3, 4, 5, 6], [F, F, T, T, T, T, T, T], HALF, DropAndGrow(fraction=0.5), EVERY, [0, 0, *[9] * 6])
    assert found == [T, T, F, F, F, F, T, T]


def test_drop_and_grow_keeps_the_count_of_each_pool():
    two = pools(6, 6)
    given = [
        scores([1, 2, 3, 4, 5, 6], [F, F, F, F, T, T]),
        scores([1, 2, 3, 4, 5, 6], [F, F, T, T, T, T], "l1.weight"),
    ]
    grow = [scores([1, 2, 3, 4, 5, 6]), scores([6, 5, 4, 3, 2, 1], name="l1.weight")]
    goal = Goal(contexts.global_, 0.5)
    keeps = choose(two, given, goal, Limits(), rule=DropAndGrow(fraction=0.5), moment=EVERY, grow=lambda c: grow)
    assert [k[0].tolist() for k in keeps] == [[F, F, F, T, F, T], [T, T, F, F, T, T]]


@pytest.mark.parametrize("moment", [None, Moment(99, 0.5), Moment(100, 0.76)], ids=["at once", "between", "after the end"])
def test_drop_and_grow_is_nested_otherwise(moment):
    found = chosen([1, 2, 3, 4], [T, T, F, F], rule=DropAndGrow(fraction=0.5), moment=moment, grow=[1, 2, 3, 4])
    assert found == [T, T, F, F]


def test_drop_and_grow_exchanges_nothing_of_a_dense_target():
    assert chosen([1, 2, 3, 4], None, rule=DropAndGrow(), moment=EVERY, grow=[1, 2, 3, 4]) == [F, F, T, T]


def test_the_exchanged_fraction_may_follow_the_position():
    rule = DropAndGrow(fraction=lambda position: 1 - position)
    assert rule.exchanged(Moment(100, 0.25)) == 0.75
    with pytest.raises(ValueError, match=r"what fraction returns must be in \[0, 1\], got 2.0"):
        DropAndGrow(fraction=lambda position: 2.0).exchanged(EVERY)


def test_random_growth_is_drawn_anew_and_any_other_criterion_is_as_given():
    rule = DropAndGrow(grow=Random(5))
    assert rule.growing(Moment(100, 0.1)) == Random(105)
    assert rule.growing(Moment(200, 0.2)) == Random(205)
    assert DropAndGrow().growing(EVERY) is large_gradient
    assert DropAndGrow(grow="large_final").growing(EVERY) is large_final
    assert isinstance(DropAndGrow(grow=torch.square).growing(EVERY), Criterion)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Free(every=0), ValueError, "every must be at least 1, got 0"),
        (lambda: Free(until=2), ValueError, r"until must be in \[0, 1\], got 2"),
        (lambda: DropAndGrow(fraction=-0.1), ValueError, r"fraction must be in \[0, 1\], got -0.1"),
        (lambda: DropAndGrow(grow="largest"), ValueError, "grow must be one of .*, got 'largest'"),
        (lambda: DropAndGrow(grow=3), TypeError, "must be a criterion, its name, or a function of the weight, got 3"),
    ],
)
def test_settings_of_rules_are_checked(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_unit_of_several_weights_is_exchanged_as_one():
    (pool,) = [TargetPool(t, Keep("out")) for t in all_targets(nn.Linear(3, 4, bias=False))]
    given = TensorScores("weight", torch.tensor([[4.0], [3.0], [2.0], [1.0]]), torch.tensor([[T], [T], [F], [F]]))
    grow = TensorScores("weight", torch.tensor([[0.0], [0.0], [1.0], [2.0]]))
    rule = DropAndGrow(fraction=0.5)
    (keep,) = choose([pool], [given], HALF, Limits(), rule=rule, moment=EVERY, grow=lambda c: [grow])
    assert keep.flatten().tolist() == [T, F, F, T]


def test_nested_is_the_rule_by_default():
    assert Nested() == nested


# --- scores that are not finite ---


def nan_scores(weight):
    return weight * float("nan")


@pytest.mark.parametrize("granularity", ["weight", "row"])
@pytest.mark.parametrize("context", ["local", "global", "erk", "lamp"])
def test_a_criterion_whose_scores_are_not_finite_is_named_and_no_weight_is_blamed(granularity, context):
    layer = nn.Linear(8, 4)
    with pytest.raises(ValueError, match=r"got NaN or infinity from nan_scores for weight, whose weights are finite$"):
        Sparsifier(layer, granularity, context, nan_scores).sparsify_model(0.5)


def test_what_such_a_criterion_reads_is_said():
    layer = nn.Linear(8, 4)
    layer.weight.grad = torch.full((4, 8), 3e38)
    criterion = Criterion(lambda e: e.gradient * 10 * e.weight.sign(), needs={"gradient"})
    with pytest.raises(ValueError, match=r"from <lambda> for weight, whose weights are finite; it reads gradient"):
        Sparsifier(layer, "weight", "local", criterion).sparsify_model(0.5)


def test_a_weight_that_is_not_finite_is_blamed_itself():
    layer = nn.Linear(8, 4)
    with torch.no_grad():
        layer.weight[1, 2] = float("inf")
    with pytest.raises(ValueError, match="for weight; look for NaN or infinite weights there"):
        Sparsifier(layer, "weight", "local", large_final).sparsify_model(0.5)


def test_a_criterion_that_grows_units_is_named_too():
    layer = nn.Linear(8, 4)
    rule = DropAndGrow(every=1, grow=Criterion(WeightFunction(nan_scores), needs="initial"))  # not tried at once
    sparsifier = Sparsifier(layer, "weight", "local", large_final, sparsity=0.5, schedule=OneShot(0), rule=rule)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    with attach(optimizer, sparsifier, total_steps=5):
        layer(torch.ones(1, 8)).sum().backward()
        optimizer.step()
        with pytest.raises(ValueError, match="from nan_scores for weight, whose weights are finite"):
            optimizer.step()
