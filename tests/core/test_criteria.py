from __future__ import annotations

import pickle
import re
import zlib
from dataclasses import FrozenInstanceError
from functools import partial
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest
import torch

from fasterai.core import criteria
from fasterai.core.checks import entry_name, from_catalogue
from fasterai.core.criteria import NORMALIZERS, REDUCERS, Criterion, Random, as_criterion, large_final, movement, variety
from fasterai.core.types import EVIDENCE, Evidence

KNOWN = {
    "weight": [2.0, -1.0, 0.5, -3.0],
    "initial": [1.0, -2.0, -0.5, 3.0],
    "previous": [-2.0, 1.0, 1.0, -1.0],
    "gradient": [0.5, 2.0, -1.0, 1.0],
    "hessian_gradient": [1.0, -1.0, 2.0, 0.5],
    "synaptic_flow": [1.0, 2.0, 3.0, 4.0],
    "activation": [1.0, 2.0, 0.5, 4.0],
    "hessian_diagonal": [1.0, 2.0, -4.0, 0.5],
}
# entry -> (what it needs besides the weight, scores by hand)
CASES = {
    "large_final": ((), [2.0, 1.0, 0.5, 3.0]),
    "squared_final": ((), [4.0, 1.0, 0.25, 9.0]),
    "small_final": ((), [-2.0, -1.0, -0.5, -3.0]),
    "large_init": (("initial",), [1.0, 2.0, 0.5, 3.0]),
    "small_init": (("initial",), [-1.0, -2.0, -0.5, -3.0]),
    "large_init_large_final": (("initial",), [1.0, 1.0, 0.5, 3.0]),
    "small_init_small_final": (("initial",), [-2.0, -2.0, -0.5, -3.0]),
    "magnitude_increase": (("initial",), [1.0, -1.0, 0.0, 0.0]),
    "movement": (("initial",), [1.0, 1.0, 1.0, 6.0]),
    "movmag": (("initial",), [1.0, 1.0, 0.0, 0.0]),
    "mov_large_final": (("initial",), [2.0, 1.0, 0.5, 18.0]),
    "updating_magnitude_increase": (("previous",), [0.0, 0.0, -0.5, 2.0]),
    "updating_movement": (("previous",), [4.0, 2.0, 0.5, 2.0]),
    "updating_movmag": (("previous",), [0.0, 0.0, 0.5, 2.0]),
    "taylor": (("gradient",), [1.0, 4.0, 0.25, 9.0]),
    "fisher": (("gradient",), [1.0, 4.0, 0.25, 9.0]),
    "fpgm": ((), [2.0, 1.0, 0.5, 3.0]),  # a rule on units does the rest, below
    "hessian": (("hessian_diagonal",), [4.0, 2.0, -1.0, 4.5]),
    "snip": (("gradient",), [1.0, 2.0, 0.5, 3.0]),
    "grasp": (("hessian_gradient",), [2.0, 1.0, 1.0, -1.5]),
    "synflow": (("synaptic_flow",), [2.0, 2.0, 1.5, 12.0]),
    "wanda": (("activation",), [2.0, 2.0, 0.25, 12.0]),
    "random": ((), None),  # below
}


def evidence(names=tuple(n for n in EVIDENCE if n in KNOWN), dtype=torch.float32, name="layer.weight"):
    tensors = {key: torch.tensor(KNOWN[key], dtype=dtype).view(2, 2) for key in ("weight", *names)}
    return Evidence(name, **tensors)


def entry(name):
    return getattr(criteria, name)


def scores(criterion, weight):
    return criterion(Evidence("w", torch.tensor(weight))).tolist()


def test_every_entry_has_a_case():
    assert set(CASES) == set(criteria.__all__)


@pytest.mark.parametrize("name", [n for n in CASES if n != "random"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_by_hand_in_float32_at_least(name, dtype):
    needs, wanted = CASES[name]
    found = entry(name)(evidence(needs, dtype))
    assert found.flatten().tolist() == wanted
    assert found.shape == (2, 2)
    assert found.dtype == (torch.float64 if dtype is torch.float64 else torch.float32)


@pytest.mark.parametrize("name", CASES)
def test_it_says_what_it_needs(name):
    assert entry(name).needs == frozenset(CASES[name][0])


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_written_to_and_no_random_number_is_used_up(name):
    given = evidence()
    before = {key: getattr(given, key).clone() for key in KNOWN}
    state = torch.get_rng_state()
    entry(name)(given)
    assert all(torch.equal(getattr(given, key), value) for key, value in before.items())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", CASES)
def test_entries_pickle_and_are_frozen(name):
    copy = pickle.loads(pickle.dumps(entry(name)))
    assert copy == entry(name)
    assert torch.equal(copy(evidence()), entry(name)(evidence()))
    with pytest.raises(FrozenInstanceError):
        entry(name).reducer = "sum"


@pytest.mark.parametrize("name", [n for n in CASES if entry(n).elementwise])
def test_elementwise_scores_can_be_had_in_parts(name):
    given = evidence()
    part = entry(name)(given.map(lambda x: x.view(-1)[1:3]))
    assert part.tolist() == CASES[name][1][1:3]


def test_what_cannot_be_had_in_parts():
    assert {n for n in CASES if not entry(n).elementwise} == {"wanda", "random", "fpgm"}


def test_only_taylor_has_parts_that_are_summed_up_and_squared():
    assert [n for n in CASES if entry(n).joint is not None] == ["taylor"]
    parts = criteria.taylor.of_parts()
    assert parts(evidence(["gradient"])).flatten().tolist() == [1.0, -2.0, -0.5, -3.0]
    assert (parts.reducer, parts.joint, parts.elementwise) == ("sum", None, True)
    assert criteria.fisher.of_parts() is criteria.fisher
    with pytest.raises(TypeError, match="joint must be a function of evidence, got 3"):
        Criterion(squeezed, joint=3)


def test_fpgm_adds_up_the_distances_to_those_that_are_left():
    # (0, 3), (4, 0) and (4, 3) are 5, 3 and 4 apart; the pruned third unit is nobody's neighbour
    weights = torch.tensor([[0.0, 3.0], [4.0, 0.0], [0.0, 0.0], [4.0, 3.0]])
    assert criteria.fpgm.rank(torch.ones(4), lambda: weights).tolist() == pytest.approx([9.0, 8.0, 0.0, 7.0])


@pytest.mark.parametrize("values", [[4.0, -1.0, 0.0, 2.0, 2.0], [0.0, 0.0], [3.0]])
def test_fpgm_of_single_weights_is_the_same_in_one_pass(values):
    weights = torch.tensor(values)[:, None]
    living = (weights != 0).squeeze(1)
    wanted = ((weights - weights.T).abs() * living).sum(1) * living
    assert criteria.fpgm.rank(torch.ones(len(weights)), lambda: weights).tolist() == wanted.tolist()


def test_fpgm_in_pieces_is_the_same(monkeypatch):
    weights = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))
    whole = criteria.fpgm.rank(torch.ones(7), lambda: weights)
    monkeypatch.setattr(criteria, "MOST_DISTANCES", 14)
    assert torch.allclose(criteria.fpgm.rank(torch.ones(7), lambda: weights), whole)


def test_those_with_a_numpy_function_give_the_same_by_it():
    fast = {n for n in CASES if entry(n).ufunc is not None}
    assert fast == {"large_final", "squared_final"}
    for name in fast:
        assert entry(name).ufunc(np.array(KNOWN["weight"])).tolist() == CASES[name][1]
        assert entry(name).nonnegative and scores(entry(name), [0.0, -0.0]) == [0.0, 0.0]


def test_half_precision_does_not_tie_or_overflow():
    close = torch.tensor([1.0, 1.0009765625], dtype=torch.float16)  # neighbours; their squares differ by 0.002
    found = criteria.squared_final(Evidence("w", close))
    assert found[0] < found[1]
    large = torch.tensor([300.0, 400.0], dtype=torch.float16)
    assert criteria.squared_final(Evidence("w", large)).tolist() == [90000.0, 160000.0]


def test_wanda_spreads_the_norms_over_the_inputs():
    weight = torch.tensor([[1.0, -2.0], [3.0, 4.0], [0.0, -1.0]])
    found = criteria.wanda(Evidence("w", weight, activation=torch.tensor([[10.0, 0.5]])))
    assert found.tolist() == [[10.0, 1.0], [30.0, 2.0], [0.0, 0.5]]


# --- random ---


def test_random_depends_on_the_seed_and_the_name_alone():
    def draw(seed=0, name="a", shape=(64,)):
        return Random(seed)(Evidence(name, torch.randn(shape)))

    assert torch.equal(draw(), draw())
    assert torch.equal(draw(), criteria.random(Evidence("a", torch.zeros(64))))
    assert not torch.equal(draw(), draw(seed=1))
    assert not torch.equal(draw(), draw(name="b"))
    assert torch.equal(draw(shape=(8, 8)).flatten(), draw())
    assert 0 <= draw().min() < 0.2 and 0.8 < draw().max() < 1


def test_random_is_uniform_from_a_generator_of_its_own():
    generator = torch.Generator().manual_seed(zlib.crc32(b"7 fc.weight"))
    assert torch.equal(Random(7)(Evidence("fc.weight", torch.ones(3, 5))), torch.rand(3, 5, generator=generator))


def test_random_of_half_precision_has_no_ties():
    found = Random()(Evidence("w", torch.zeros(4096, dtype=torch.bfloat16)))
    assert found.dtype == torch.float32
    assert len(found.unique()) > 4000


# --- reducers and normalisers ---

OF_1_2_5 = {
    "sum": [0.125, 0.25, 0.625],
    "mean": [0.375, 0.75, 1.875],
    "max": [0.2, 0.4, 1.0],
    "standardise": [-0.9805807, -0.3922323, 1.3728129],  # -5, -2 and 7 thirds over the root of 78 / 27
}


@pytest.mark.parametrize("name", OF_1_2_5)
def test_normalisers_by_hand(name):
    assert NORMALIZERS[name](torch.tensor([1.0, 2.0, 5.0])).tolist() == pytest.approx(OF_1_2_5[name])


def test_gaussian_is_the_distribution_function_of_the_standardised():
    wanted = [NormalDist().cdf(z) for z in OF_1_2_5["standardise"]]
    assert NORMALIZERS["gaussian"](torch.tensor([1.0, 2.0, 5.0])).tolist() == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "wanted"), [("sum", [0.125, 0.25, 0.625]), ("mean", [0.375, 0.75, 1.875]), ("max", [1.0, 2.0, 5.0])]
)
def test_negative_scores_are_divided_by_what_they_add_up_to(name, wanted):
    """A negative scale is one to divide by: sum -8, mean -8 / 3, and the highest is -1."""
    normalized = criteria.small_final.using(normalizer=name)
    unit_scores = normalized(Evidence("w", torch.tensor([1.0, -2.0, 5.0])))
    assert unit_scores.tolist() == [-1.0, -2.0, -5.0]
    assert normalized.normalize(unit_scores).tolist() == pytest.approx(wanted)


def test_every_normaliser_has_a_case():
    assert set(NORMALIZERS) == {*OF_1_2_5, "gaussian"}
    assert REDUCERS == ("mean", "sum")


@pytest.mark.parametrize("name", NORMALIZERS)
@pytest.mark.parametrize("values", [[0.0, 0.0, 0.0], [4.0, 4.0], [3.0]])
def test_equal_scores_stay_equal_and_finite(name, values):
    found = NORMALIZERS[name](torch.tensor(values))
    assert found.isfinite().all()
    assert len(found.unique()) == 1


@pytest.mark.parametrize("name", NORMALIZERS)
def test_normalisers_keep_shape_and_order_and_write_into_nothing(name):
    given = torch.rand(4, 1, 3) + 0.1
    before = given.clone()
    found = criteria.large_final.using(normalizer=name).normalize(given)
    assert found.shape == given.shape
    assert torch.equal(found.flatten().argsort(), given.flatten().argsort())
    assert torch.equal(given, before)


def test_without_a_normaliser_scores_are_what_they_are():
    given = torch.rand(3)
    assert criteria.large_final.normalize(given) is given


def test_using_changes_what_is_named():
    changed = criteria.movement.using(reducer="sum", normalizer="max")
    assert (changed.reducer, changed.normalizer) == ("sum", "max")
    assert (changed.function, changed.needs) == (criteria.movement.function, criteria.movement.needs)
    assert (criteria.movement.reducer, criteria.movement.normalizer) == ("mean", None)
    assert changed.using(reducer="mean") == criteria.movement.using(normalizer="max")


# --- your own ---


def squeezed(e):
    return e.weight.flatten()


def test_a_function_of_the_weight_is_a_criterion_and_gets_a_copy():
    weight = torch.tensor([-2.0, 1.0])
    criterion = as_criterion(torch.Tensor.abs_)
    assert criterion(Evidence("w", weight)).tolist() == [2.0, 1.0]
    assert weight.tolist() == [-2.0, 1.0]
    assert as_criterion(criterion) is criterion
    assert not criterion.elementwise and not criterion.nonnegative


def test_a_function_of_evidence_says_what_it_needs():
    criterion = Criterion(lambda e: e.weight * e.gradient, needs=["gradient"])
    assert criterion.needs == {"gradient"}
    assert criterion(evidence(["gradient"])).flatten().tolist() == [1.0, -2.0, -0.5, -3.0]


def test_one_need_is_given_without_a_set():
    def gatherer(model, targets, source):
        return {}

    assert Criterion(squeezed, needs="gradient").needs == {"gradient"}
    assert Criterion(squeezed, needs=gatherer).needs == {gatherer}


@pytest.mark.parametrize(
    ("function", "needs"),
    [
        (lambda e: (e.weight * e.gradient).abs(), "{'gradient'}"),
        (lambda e: e.gradient.abs(), "{'gradient'}"),
        (lambda e: torch.maximum(e.weight * e.initial, e.previous), "{'initial', 'previous'}"),
    ],
)
def test_evidence_that_is_read_and_not_asked_for_is_named(function, needs):
    with pytest.raises(TypeError, match=rf"got <lambda>, for which evidence\.\w+ is None; .*needs={needs}\)"):
        Criterion(function)(evidence([]))


def test_an_error_of_the_function_itself_stays_its_own():
    def failing(e):
        return e.weight + "x" if e.gradient is None else e.weight

    with pytest.raises(TypeError, match="unsupported operand") as found:
        Criterion(failing)(evidence([]))
    assert found.value.__notes__ == ["raised by the criterion failing, for layer.weight"]


def test_the_page_lists_the_needs_that_the_error_lists():
    page = (Path(__file__).parents[2] / "docs/criteria.md").read_text()
    sentence = page.partition("The names of the needs: ")[2].partition(". Besides these")[0]
    assert sorted(re.findall(r"`(\w+)`", sentence)) == sorted(EVIDENCE)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Criterion(3), TypeError, "function must be a function of evidence, got 3"),
        (lambda: Criterion(squeezed, needs={"grad"}), ValueError, "needs must be one of gradient, .*, got 'grad'"),
        (lambda: Criterion(squeezed, reducer="max"), ValueError, "reducer must be one of mean, sum, got 'max'"),
        (lambda: Criterion(squeezed, normalizer="std"), ValueError, "normalizer must be one of sum, mean, .*, got 'std'"),
        (lambda: criteria.movement.using(normalizer="std"), ValueError, "got 'std'"),
        (lambda: as_criterion(0.5), TypeError, "criteria must be a criterion, its name, or a function .*, got 0.5"),
        (lambda: Criterion(squeezed)(evidence()), ValueError, r"shape \(2, 2\) for layer.weight, got \(4,\)"),
        (
            lambda: from_catalogue("criteria", "large_finale", criteria),
            ValueError,
            "criteria must be one of fisher, fpgm, grasp, .*, got 'large_finale'; did you mean 'large_final'",
        ),
    ],
)
def test_what_is_no_criterion_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


GIVEN = Evidence("w", torch.tensor([2.0, -1.0, 0.5]))


def of_evidence(evidence):
    return (evidence.gradient * evidence.weight).abs()


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            of_evidence,
            r"got the function of_evidence, which reads \.gradient of evidence; .*Criterion\(of_evidence, needs={'gradient'}\)",
        ),
        (
            lambda e: e.weight.abs(),
            r"got the function <lambda>, which reads \.weight of evidence; wrap it: Criterion\(function\)",
        ),
    ],
)
def test_a_function_of_evidence_that_is_not_wrapped_is_told_so(function, message):
    with pytest.raises(TypeError, match=message):
        as_criterion(function)(GIVEN)


def test_other_missing_attributes_stay_errors_of_their_own():
    with pytest.raises(AttributeError, match="no attribute 'absolut'"):
        as_criterion(lambda w: w.absolut())(GIVEN)
    with pytest.raises(AttributeError, match="no attribute 'gradient'"):
        as_criterion(lambda w: torch.ones(3).gradient)(GIVEN)


def fails(x, *_):
    raise KeyError("inside")


@pytest.mark.parametrize(
    ("call", "note"),
    [
        (lambda: Criterion(fails)(GIVEN), "raised by the criterion fails, for w"),
        (lambda: as_criterion(partial(fails))(GIVEN), "raised by the criterion fails, for w"),
        (
            lambda: large_final.using(normalizer=fails).normalize(torch.ones(2)),
            "raised by the normalizer of the criterion large_final, for a target",
        ),
        (
            lambda: large_final.using(unit_rule=fails).rank(torch.ones(2), lambda: torch.ones(2, 3), "conv"),
            "raised by the unit_rule of the criterion large_final, for conv",
        ),
    ],
)
def test_errors_of_a_users_own_part_say_where_they_come_from(call, note):
    with pytest.raises(KeyError, match="inside") as caught:
        call()
    assert caught.value.__notes__ == [note]


def test_scores_that_are_no_tensor_name_the_criterion():
    with pytest.raises(TypeError, match=r"criterion must return a tensor of scores for w, got 3 from <lambda>"):
        Criterion(lambda e: 3)(GIVEN)


# --- variety ---


def test_variety_is_the_criterion_with_a_rule_on_units():
    made = variety(movement, "pearson")
    assert made == variety("movement", "pearson") != variety("movement")
    assert (made.function, made.needs, made.elementwise) == (movement.function, {"initial"}, True)
    assert repr(made) == "Criterion(movement; needs=initial; unit_rule=variety('pearson'))"
    assert made.rank(torch.tensor([3.0, 2, 1]), lambda: torch.tensor([[1.0, 0], [1, 0.1], [0, 1]])).tolist() == [3, 1, 2]
    assert pickle.loads(pickle.dumps(made)) == made
    on = variety("taylor", on="activations")
    assert on.needs == {"gradient", "outputs"} and on.reads_outputs and not made.reads_outputs


def test_variety_of_a_function_of_the_weight():
    assert scores(variety(torch.square), [3.0, -2.0]) == [9.0, 4.0]


def test_variety_follows_a_rule_that_there_is():
    flipped = large_final.using(unit_rule=lambda scores, weights: -scores)
    found = variety(flipped).rank(torch.tensor([3.0, 2, 1]), lambda: torch.tensor([[1.0, 0], [1, 0.1], [0, 1]]))
    assert found.tolist() == [-3, -2, -1]  # the first two are alike, and by the rule the first is the lower


@pytest.mark.parametrize(
    ("word", "wanted"),
    [
        ("variety(large_final)", variety(large_final)),
        ("variety(magnitude)", variety(large_final)),
        (" variety( movement, euclidean )", variety(movement, "euclidean")),
        ("variety(l1, cosine, activations)", variety(large_final, on="activations")),
    ],
)
def test_variety_in_a_word(word, wanted):
    name = entry_name("criteria", word, criteria)  # as the command line keeps it
    assert from_catalogue("criteria", name, criteria) == wanted and "magnitude" not in name
    assert from_catalogue("criteria", word, criteria) == wanted


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: variety("nope"), "criterion must be one of .*, got 'nope'"),
        (lambda: variety(large_final, "angle"), "similarity must be one of .*, got 'angle'"),
        (lambda: variety(large_final, on="inputs"), "on must be one of activations, weights, got 'inputs'"),
        (lambda: variety(variety(large_final)), r"must be one without variety, got Criterion\(large_final; unit_rule=variety"),
        (
            lambda: variety(large_final.using(unit_rule=lambda s, w: s), on="activations"),
            "must have no unit_rule of its own for on='activations', got .*take on='weights'",
        ),
        (
            lambda: from_catalogue("criteria", "variety", criteria),
            "got 'variety'; it takes a criterion: 'variety.large_final.'",
        ),
        (lambda: from_catalogue("criteria", "variety(nope)", criteria), "criteria must be one of .*, got 'nope'"),
        (lambda: from_catalogue("criteria", "variety(movement, nope)", criteria), "similarity must be .*, got 'nope'"),
        (lambda: entry_name("criteria", "variety(movement, nope)", criteria), "similarity must be .*, got 'nope'"),
    ],
)
def test_variety_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()
