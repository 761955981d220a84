"""The calls of the public fasterai's core, as its users write them."""

from __future__ import annotations

import pickle
from dataclasses import FrozenInstanceError
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from fasterai.core import criteria, schedules
from fasterai.core.criteria import Criterion
from fasterai.core.schedules import Schedule, sched_agp, sched_dsd, sched_iterative, sched_onecycle, sched_oneshot
from fasterai.core.types import Evidence
from fasterai.familiar import (
    EPS,
    Criteria,
    Granularities,
    Normalizer,
    Reducer,
    activation_criteria,
    available_criterias,
    available_schedules,
    criterias,
    grad_crit,
    init_based_criteria,
    magnitude_criteria,
    unit_scores,
    update_based_criteria,
)
from fasterai.model.layouts import read_module, register_axes
from fasterai.model.targets import find_targets

# The dimensions of weight[None] that each granularity reduces; 0 where it reduces none.
CONV2D = {
    "weight": [0],
    "shared_weight": [1],
    "channel": [2],
    "column": [3],
    "row": [4],
    "kernel": [3, 4],
    "filter": [2, 3, 4],
    "shared_channel": [1, 2],
    "shared_column": [1, 3],
    "shared_row": [1, 4],
    "vertical_slice": [2, 3],
    "horizontal_slice": [2, 4],
    "shared_vertical_slice": [1, 2, 3],
    "shared_horizontal_slice": [1, 2, 4],
    "shared_kernel": [1, 3, 4],
    "layer": [1, 2, 3, 4],
}
LINEAR = {"weight": [0], "row": [2], "column": [1], "layer": [1, 2]}
SWAPPED = {0: 0, 1: 2, 2: 1, 3: 3, 4: 4}

EVIDENCE = Evidence(
    "w",
    torch.tensor([2.0, -1.0, 0.5]),
    initial=torch.tensor([1.0, -3.0, 0.25]),
    previous=torch.tensor([-1.0, 1.0, 1.0]),
    activation=torch.tensor([1.0, 10.0, 0.0]),
)


def scores(criterion):
    return criterion(EVIDENCE).tolist()


# --- granularities ---


@pytest.mark.parametrize("name", CONV2D)
def test_dimensions_of_conv2d(name):
    assert Granularities.get_dim(nn.Conv2d(4, 8, 3), name) == CONV2D[name]


@pytest.mark.parametrize("name", CONV2D)
def test_dimensions_of_conv_transpose2d_have_in_and_out_exchanged(name):
    assert Granularities.get_dim(nn.ConvTranspose2d(4, 8, 3), name) == sorted(SWAPPED[d] for d in CONV2D[name])


@pytest.mark.parametrize("name", LINEAR)
def test_dimensions_of_linear(name):
    assert Granularities.get_dim(nn.Linear(4, 8), name) == LINEAR[name]


@pytest.mark.parametrize("name", CONV2D)
def test_reducing_those_dimensions_gives_the_familiar_shape(name):
    layer = nn.Conv2d(4, 8, 3)
    dims = Granularities.get_dim(layer, name)
    reduced = layer.weight[None].abs().mean(dims, keepdim=True) if dims != [0] else layer.weight[None]
    assert reduced.shape == tuple(1 if i in dims and i else n for i, n in enumerate((1, 8, 4, 3, 3)))


@pytest.mark.parametrize(
    ("module", "name", "message"),
    [
        (nn.Linear(4, 8), "filter", "g must be one of column, layer, row, weight, got 'filter'"),
        (nn.Conv2d(4, 8, 3), "filters", "g must be one of .*, got 'filters'; did you mean 'filter'"),
        (nn.ReLU(), "weight", "m must be a module whose weight is known, got ReLU; register_axes"),
        (nn.LSTM(3, 3), "row", "m must be a module whose weight is known, got LSTM"),
    ],
)
def test_a_granularity_that_a_module_has_not_is_refused(module, name, message):
    with pytest.raises(ValueError, match=message):
        Granularities.get_dim(module, name)


def test_what_is_allowed_and_available():
    assert set(Granularities.allowed_granularities(nn.Linear(4, 8))) == set(LINEAR)
    assert set(Granularities.allowed_granularities(nn.Conv2d(4, 8, 3))) == set(CONV2D)
    assert set(Granularities.available_granularities()) == {*CONV2D, "coupled"}
    modules = Granularities.available_modules()
    assert isinstance(modules, tuple)
    for kind in (nn.Conv2d(1, 1, 1), nn.ConvTranspose2d(1, 1, 1), nn.Conv1d(1, 1, 1), nn.Linear(1, 1)):
        assert isinstance(kind, modules)


def test_tables_name_the_granularities_of_a_type():
    assert set(Granularities._granularities_Linear) == set(LINEAR)
    assert set(Granularities._granularities_Conv2d) == set(Granularities._granularities_ConvT2d) == set(CONV2D)
    assert Granularities._granularities_Linear["row"] == ("out",)
    assert Granularities._granularities_Conv2d["vertical_slice"] == ("out", "width")


def of_linear_shape(shape=(8, 4)):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(shape))

    return Own


@pytest.mark.parametrize(
    ("table", "shape", "name", "dims"),
    [
        ("_granularities_Linear", (8, 4), "row", [2]),
        ("_granularities_Conv2d", (8, 4, 3, 3), "filter", [2, 3, 4]),
        ("_granularities_ConvT2d", (4, 8, 3, 3), "filter", [1, 3, 4]),
    ],
)
def test_a_type_of_your_own_takes_a_known_table(table, shape, name, dims):
    own = of_linear_shape(shape)
    Granularities.add_granularity(own, getattr(Granularities, table))
    assert Granularities.get_dim(own(), name) == dims
    found = find_targets(own(), fits=lambda t: None, coarse=len(shape) > 2, layer_type=own)
    assert [t.name for t in found.targets] == ["weight"]
    assert own in Granularities.available_modules()


def test_hugging_faces_conv1d_by_the_familiar_call_and_by_its_axes():
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D

    class Familiar(conv1d): ...

    class ByAxes(conv1d): ...

    Granularities.add_granularity(Familiar, Granularities._granularities_Linear)
    register_axes(ByAxes, weight=("in", "out"))
    assert Granularities.get_dim(Familiar(8, 4), "row") == [2]  # of (in, out) as if it were (out, in)
    assert Granularities.get_dim(ByAxes(8, 4), "row") == [1]  # its outputs
    assert read_module(ByAxes(8, 4)).layouts["weight"].size("out") == 8


def test_a_table_of_your_own_is_refused_with_the_call_to_make():
    own = of_linear_shape()
    with pytest.raises(ValueError, match=r"g must be one of the tables .*call register_axes\(m_type, weight="):
        Granularities.add_granularity(own, {"weight": 0, "row": 2})
    assert read_module(own()) is None


# --- criteria ---


@pytest.mark.parametrize(
    ("criterion", "wanted"),
    [
        (lambda: Criteria(torch.abs), [2.0, 1.0, 0.5]),
        (lambda: Criteria(torch.frac), [0.0, 0.0, 0.5]),
        (lambda: Criteria(partial(torch.pow, exponent=4)), [16.0, 1.0, 0.0625]),
        (lambda: magnitude_criteria(torch.square), [4.0, 1.0, 0.25]),
        (lambda: Criteria(torch.abs, needs_init=True, return_init=True), [1.0, 3.0, 0.25]),
        (lambda: Criteria(torch.abs, needs_init=True, output_fn=torch.minimum), [1.0, 1.0, 0.25]),
        (lambda: Criteria(torch.abs, needs_init=True, output_fn=torch.sub), [1.0, -2.0, 0.25]),
        (lambda: init_based_criteria(torch.abs, output_fn=torch.sub), [1.0, -2.0, 0.25]),
        (lambda: init_based_criteria(torch.square, return_init=True), [1.0, 9.0, 0.0625]),
        (lambda: Criteria(lambda x: x, needs_update=True, output_fn=lambda x, y: (x - y).abs()), [3.0, 2.0, 0.5]),
        (lambda: update_based_criteria(torch.abs, output_fn=lambda x, y: x - y), [1.0, 0.0, -0.5]),
        (lambda: activation_criteria(torch.abs), [2.0, 10.0, 0.0]),
        (lambda: Criteria(torch.abs, needs_data=True), [2.0, 10.0, 0.0]),
    ],
)
def test_criteria_by_hand(criterion, wanted):
    assert scores(criterion()) == wanted


@pytest.mark.parametrize(
    ("criterion", "needs"),
    [
        (Criteria(torch.abs), ()),
        (Criteria(torch.abs, needs_init=True), ("initial",)),
        (Criteria(torch.abs, needs_update=True), ("previous",)),
        (activation_criteria(torch.abs), ("activation",)),
        (Criteria(torch.abs, Reducer.mean, None, True), ("initial",)),  # the fourth position is needs_init
    ],
)
def test_criteria_need_what_they_say(criterion, needs):
    assert criterion.needs == frozenset(needs)
    assert isinstance(criterion, Criterion)


def test_functions_may_write_into_what_they_get():
    given = EVIDENCE.map(torch.clone)
    criterion = Criteria(torch.Tensor.abs_, needs_init=True, output_fn=torch.Tensor.sub_)
    assert criterion(given).tolist() == [1.0, -2.0, 0.25]
    activation_criteria(torch.Tensor.abs_)(given)
    magnitude_criteria(torch.Tensor.abs_)(given)
    for name in ("weight", "initial", "activation"):
        assert torch.equal(getattr(given, name), getattr(EVIDENCE, name))


@pytest.mark.parametrize(
    ("reducer", "normalizer", "wanted"),
    [
        (Reducer.mean, None, ("mean", None)),
        (Reducer.sum, Normalizer.sum, ("sum", "sum")),
        ("sum", "max", ("sum", "max")),
        (Reducer.mean, Normalizer.mean, ("mean", "mean")),
        (Reducer.mean, Normalizer.max, ("mean", "max")),
        (Reducer.mean, Normalizer.standardization, ("mean", Normalizer.standardization)),
        (Reducer.mean, "standardization", ("mean", Normalizer.standardization)),
        (Reducer.mean, Normalizer.gaussian, ("mean", Normalizer.gaussian)),
        (Reducer.mean, "gaussian", ("mean", Normalizer.gaussian)),
    ],
)
def test_reducers_and_normalisers_go_by_function_or_name(reducer, normalizer, wanted):
    for options in ({}, {"needs_data": True}, {"needs_init": True}):
        criterion = Criteria(torch.abs, reducer, normalizer, **options)
        assert (criterion.reducer, criterion.normalizer) == wanted


@pytest.mark.parametrize("dim", [1, [1], (0, 1), [0]])
def test_reducers_reduce_and_keep_the_dimensions(dim):
    x = torch.arange(6.0).view(2, 3)
    axes = (dim,) if isinstance(dim, int) else tuple(dim)
    assert Reducer.mean(x, dim).numpy().tolist() == x.numpy().mean(axis=axes, keepdims=True).tolist()
    assert Reducer.sum(x, dim).numpy().tolist() == x.numpy().sum(axis=axes, keepdims=True).tolist()


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("sum", [1 / 6, 1 / 3, 1 / 2]),
        ("mean", [0.5, 1.0, 1.5]),
        ("max", [1 / 3, 2 / 3, 1.0]),
        ("standardization", [0.0, 0.5, 1.0]),
        ("gaussian", [-1.0, 0.0, 1.0]),
    ],
)
def test_normalisers_mean_what_they_mean_there(name, wanted):
    assert getattr(Normalizer, name)(torch.tensor([1.0, 2.0, 3.0])).tolist() == pytest.approx(wanted, abs=1e-6)
    criterion = Criteria(torch.abs, normalizer=name)
    assert criterion.normalize(torch.tensor([1.0, 2.0, 3.0])).tolist() == pytest.approx(wanted, abs=1e-6)
    assert pickle.loads(pickle.dumps(criterion)) == criterion


@pytest.mark.parametrize("name", ["standardization", "gaussian"])
@pytest.mark.parametrize("values", [[2.0], [3.0, 3.0], [-1.0, -1.0, -1.0]])
def test_equal_scores_stay_equal_and_finite(name, values):
    assert getattr(Normalizer, name)(torch.tensor(values)).tolist() == [0.0] * len(values)


@pytest.mark.parametrize(
    "function", [sched_oneshot, sched_iterative, sched_agp, sched_onecycle, sched_dsd, schedules.sched_cos, schedules.sched_lin]
)
def test_curves_take_arrays_of_positions(function):
    positions = np.linspace(0, 1, 11)
    one_by_one = [function(0.1, 0.9, float(p)) for p in positions]
    np.testing.assert_allclose(np.broadcast_to(function(0.1, 0.9, positions), 11), one_by_one, atol=1e-12)


@pytest.mark.parametrize("call", [lambda c, m: c(m, "filter"), lambda c, m: c(m), lambda c, m: c(m, g="filter", squeeze=True)])
@pytest.mark.parametrize("name", ["large_final", "wanda", "taylor"])
def test_a_criterion_called_on_a_module_names_the_function_that_does_it(call, name):
    with pytest.raises(
        TypeError, match=r"criterion must be called with evidence alone, got Conv2d.*; unit_scores\(m, criterion"
    ):
        call(getattr(criteria, name), nn.Conv2d(3, 4, 3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"needs_init": True, "needs_update": True}, "needs_init and needs_update must not both be True"),
        ({"scale": 2}, "scale must be None, got 2"),
        ({"reducer": "max"}, "reducer must be one of mean, sum, got 'max'"),
        ({"normalizer": "std"}, "normalizer must be one of .*, got 'std'"),
        ({"needs_data": True, "data_fn": "min"}, "data_fn must be one of l2_norm, max, mean, got 'min'"),
    ],
)
def test_what_criteria_cannot_do_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Criteria(torch.abs, **options)


def test_criteria_pickle_and_are_frozen():
    for criterion in (Criteria(torch.abs), init_based_criteria(torch.abs, torch.sub), activation_criteria(torch.abs)):
        copy = pickle.loads(pickle.dumps(criterion))
        assert copy == criterion
        assert scores(copy) == scores(criterion)
        with pytest.raises(FrozenInstanceError):
            criterion.reducer = "sum"


def test_lists_of_names():
    assert set(criterias) == set(available_criterias()) == set(criteria.__all__)
    assert {"random", "large_final", "updating_movmag", "movmag", "wanda"} <= set(available_criterias())
    assert all(isinstance(getattr(criteria, name), Criterion) for name in criterias)
    assert (
        set(available_schedules())
        == set(schedules.__all__)
        == {"one_shot", "iterative", "agp", "one_cycle", "cos", "lin", "dsd", "alternating"}
    )
    available_criterias().clear()
    assert available_criterias()


def test_the_gradient_criterion_and_the_smallest_step():
    assert grad_crit is criteria.taylor
    assert EPS == 2**-23


# --- schedules ---


@pytest.mark.parametrize(
    ("schedule", "shares"),
    [
        # inside the window 0.4 is 1/5, 0.7 is 3/5
        (lambda: Schedule(sched_iterative, start_pct=0.25), {0.2: 0.0, 0.4: 1 / 3, 0.7: 2 / 3, 1.0: 1.0}),
        # inside 0.3 is 1/8, 0.9 is 7/8
        (lambda: Schedule(partial(sched_iterative, n_steps=5), start_pct=0.2), {0.3: 0.2, 0.5: 0.4, 0.9: 1.0}),
        # (1 + e^-6) / (1 + e^(4 - 10 t))
        (lambda: Schedule(partial(sched_onecycle, α=10, β=4)), {0.0: 0.0180308, 0.4: 0.5012394, 1.0: 1.0}),
        (lambda: Schedule(sched_oneshot, 0.5), {0.49: 0.0, 0.5: 1.0}),
        (lambda: Schedule(sched_agp, 0.0, 0.5), {0.25: 0.875, 0.5: 1.0, 0.9: 1.0}),
        (lambda: Schedule(sched_dsd), {0.25: 0.5, 0.5: 1.0, 1.0: 0.0}),
        (lambda: Schedule(lambda start, end, pos: start + (end - start) * pos**2), {0.5: 0.25, 1.0: 1.0}),
        (lambda: Schedule(sched_agp, start_val=0.2, end_val=0.8), {0.0: 0.2, 0.5: 0.725, 1.0: 0.8}),
    ],
)
def test_schedules_by_hand(schedule, shares):
    made = schedule()
    assert [made(p) for p in shares] == pytest.approx(list(shares.values()), abs=1e-7)


@pytest.mark.parametrize(
    ("name", "start"),
    [("one_shot", 0.5), ("iterative", 0.2), ("agp", 0.2), ("one_cycle", 0), ("cos", 0), ("lin", 0), ("dsd", 0)],
)
def test_ready_made_schedules_start_where_they_did(name, start):
    assert (getattr(schedules, name).start_pct, getattr(schedules, name).end_pct) == (start, 1.0)


def test_unit_scores_of_a_module():
    layer = nn.Linear(2, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, -3.0], [0.0, 4.0]]))
    assert unit_scores(layer, criteria.large_final, "row").tolist() == [[2.0], [2.0]]
    assert unit_scores(layer, criteria.large_final.using(reducer="sum"), "column", squeeze=True).tolist() == [1.0, 7.0]
    with pytest.raises(ValueError, match="criterion must read nothing but the weight, got one that needs initial"):
        unit_scores(layer, criteria.movement, "row")
