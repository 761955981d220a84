"""The sparsifier's contracts: what it reaches, what it leaves alone, how it goes on."""

import copy
import io
import itertools
import pickle
import random as dice
import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

from fasterai.callbacks.plain import attach
from fasterai.core import contexts, criteria, granularities, schedules
from fasterai.core.criteria import Criterion
from fasterai.core.granularities import Keep
from fasterai.core.loop import Batch, Fit
from fasterai.core.schedules import OneShot, Piecewise
from fasterai.model.names import unwrap
from fasterai.sparse.hold import Hold
from fasterai.sparse.sparsifier import Sparsifier
from fasterai.units.rules import DropAndGrow
from tests.networks import Crossed

pytestmark = pytest.mark.filterwarnings("ignore:all scores of", "ignore:without example_inputs")

X, Y = torch.randn(8, 4, 6, 6, generator=torch.Generator().manual_seed(1)), torch.arange(8) % 4
BATCH = (X, Y)


@pytest.fixture(autouse=True)
def _same_numbers():
    torch.manual_seed(0)


def cnn():
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )


def step(model, optimizer, x=X, y=Y):
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


def train(model, sparsifier, steps, optimizer=None, after=lambda: None):
    optimizer = optimizer or torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    with attach(optimizer, sparsifier, total_steps=steps):
        for _ in range(steps):
            step(model, optimizer)
            after()


def zeros(model, names):
    parameters = dict(model.named_parameters())
    return {n: int((parameters[n] == 0).sum()) for n in names}


def pruned(sparsifier):
    return {n: int((~m).sum()) for n, m in sparsifier.masks.items()}


def assert_masked_are_zero(model, sparsifier):
    parameters = dict(model.named_parameters())
    for name, mask in sparsifier.masks.items():
        assert torch.equal(parameters[name].detach()[~mask], torch.zeros(int((~mask).sum()), dtype=parameters[name].dtype))


def with_gradients(**options):
    return {"data": [BATCH], "loss": F.cross_entropy, "example_inputs": X, **options}


# --- any value of one axis with any of the others ----------------------------------------------------------------------

# Granularity -> units of the two convolutions, (8, 4, 3, 3) and (8, 8, 3, 3), and of the linear weight (4, 8) at `weight`.
UNITS = {
    "weight": (288, 576, 32),
    "shared_weight": (36, 72),
    "channel": (72, 72),
    "column": (96, 192),
    "row": (96, 192),
    "kernel": (32, 64),
    "filter": (8, 8),
    "shared_channel": (9, 9),
    "shared_column": (12, 24),
    "shared_row": (12, 24),
    "vertical_slice": (24, 24),
    "horizontal_slice": (24, 24),
    "shared_vertical_slice": (3, 3),
    "shared_horizontal_slice": (3, 3),
    "shared_kernel": (4, 8),
    "layer": (1, 1),
    "coupled": (8, 8),
}
CONTEXTS = ("local", "global", "erk", "lamp")


def seen(granularity):
    """Coupled channels are found by following example inputs."""
    return {"example_inputs": X} if granularity == "coupled" else {}


def expected(granularity, context, share):
    """How many units go, in all: round(share * n) of each target or of all together."""
    counts = UNITS[granularity]
    return sum(round(share * n) for n in counts) if context == "local" else round(share * sum(counts))


def units_pruned(sparsifier):
    return sum(r.pruned for r in sparsifier.report().rows)


def test_every_granularity_and_context_has_a_case():
    assert set(UNITS) == set(granularities.__all__)
    assert {*CONTEXTS, "two_four"} == {name.rstrip("_") for name in contexts.__all__}


@pytest.mark.parametrize("granularity", UNITS)
@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("share", [0.0, 0.3, 0.5])
def test_exactly_the_asked_units_go_at_every_granularity_and_context(granularity, context, share):
    sparsifier = Sparsifier(cnn(), granularity, context, **seen(granularity))
    sparsifier.sparsify_model(share)
    assert tuple(r.units for r in sparsifier.report().rows) == UNITS[granularity]
    assert units_pruned(sparsifier) == expected(granularity, context, share)
    assert_masked_are_zero(sparsifier.model, sparsifier)


@pytest.mark.parametrize("granularity", UNITS)
def test_a_dict_prunes_what_it_names_at_every_granularity(granularity):
    sparsifier = Sparsifier(cnn(), granularity, {"3": 0.5}, **seen(granularity))
    sparsifier.sparsify_model()
    rows = {r.name: r.pruned for r in sparsifier.report().rows}
    assert rows.pop("3.weight") == round(0.5 * UNITS[granularity][1])
    assert not any(rows.values())


@pytest.mark.parametrize("name", criteria.__all__)
@pytest.mark.parametrize("granularity", ["weight", "kernel", "filter", "coupled"])
@pytest.mark.parametrize("context", ["local", "global"])
def test_every_criterion_reaches_the_asked_units(name, granularity, context):
    sparsifier = Sparsifier(cnn(), granularity, context, name, **with_gradients())
    with torch.no_grad():
        for p in sparsifier.model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    before = {n: x.clone() for n, x in sparsifier.model.state_dict().items()}
    sparsifier.sparsify_model(0.25)
    assert units_pruned(sparsifier) == expected(granularity, context, 0.25)
    masks = sparsifier.masks
    after = sparsifier.model.state_dict()
    for n, mask in masks.items():
        assert torch.equal(after[n], before[n] * mask), "a kept weight is not changed by scoring"


ANY = sorted(
    dice.Random(0).sample(
        list(itertools.product(UNITS, (*CONTEXTS, "dict"), criteria.__all__, schedules.__all__)),
        40,
    )
)


@pytest.mark.parametrize(("granularity", "context", "criterion", "schedule"), ANY)
def test_any_combination_trains_sparse(granularity, context, criterion, schedule):
    model = cnn()
    sparsity = {"*": 0.5} if context == "dict" else 0.5
    context = "local" if context == "dict" else context
    sparsifier = Sparsifier(model, granularity, context, criterion, sparsity=sparsity, schedule=schedule, **with_gradients())
    train(model, sparsifier, 6, after=lambda: assert_masked_are_zero(model, sparsifier))
    assert units_pruned(sparsifier) == (0 if schedule == "dsd" else expected(granularity, context, 0.5))


# --- nothing is added to the model -------------------------------------------------------------------------------------


def assert_untouched(model, keys):
    assert list(model.state_dict()) == keys
    for module in model.modules():
        hooks = [getattr(module, a) for a in vars(module) if a.endswith("_hooks")]
        assert not any(hooks)
        assert not [a for a in vars(module) if "mask" in a or "init_w" in a]
    twin = copy.deepcopy(model)
    twin = pickle.loads(pickle.dumps(twin))
    for (n, a), b in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        assert torch.equal(a, b), n


@pytest.mark.parametrize("criterion", ["large_final", "movement", "updating_movement", "wanda", "taylor"])
@pytest.mark.parametrize("granularity", ["weight", "filter"])
def test_nothing_is_added_to_the_model_before_during_and_after(granularity, criterion):
    model = cnn()
    keys, classes = list(model.state_dict()), [type(m) for m in model.modules()]
    sparsifier = Sparsifier(model, granularity, "local", criterion, sparsity=0.5, schedule="lin", **with_gradients())
    assert_untouched(model, keys)
    train(model, sparsifier, 4, after=lambda: assert_untouched(model, keys))
    assert_untouched(model, keys)
    sparsifier.hold(torch.optim.SGD(model.parameters(), 0.1))
    assert_untouched(model, keys)
    sparsifier.finalize()
    assert_untouched(model, keys)
    assert [type(m) for m in model.modules()] == classes
    assert model.training


def test_parameters_keep_their_identity():
    model = cnn()
    before = [id(p) for p in model.parameters()]
    sparsifier = Sparsifier(model, "filter", sparsity=0.5, example_inputs=X)
    train(model, sparsifier, 3)
    assert [id(p) for p in model.parameters()] == before
    assert all(p.requires_grad and p.is_leaf for p in model.parameters())


@pytest.mark.parametrize("criterion", ["large_final", "movement", "updating_movement"])
def test_the_sparsifier_is_deepcopied_and_pickled(criterion):
    sparsifier = Sparsifier(cnn(), "filter", "global", criterion, sparsity=0.5, example_inputs=X)
    sparsifier.sparsify_model()
    for twin in (copy.deepcopy(sparsifier), pickle.loads(pickle.dumps(sparsifier))):
        assert twin.model is not sparsifier.model
        assert all(torch.equal(twin.masks[n], m) for n, m in sparsifier.masks.items())
        twin.sparsify_model(0.75)
        assert units_pruned(twin) == 12
    assert units_pruned(sparsifier) == 8


def test_the_model_compiles_between_and_after_runs():
    model = cnn()
    sparsifier = Sparsifier(model, "weight", sparsity=0.5)
    compiled = torch.compile(model, backend="eager")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with attach(optimizer, sparsifier, total_steps=3):
        for _ in range(3):
            step(compiled, optimizer)
            assert_masked_are_zero(model, sparsifier)
    assert sum(pruned(sparsifier).values()) == 144 + 288 + 16


# --- masked weights are exactly zero -----------------------------------------------------------------------------------

OPTIMIZERS = {
    "sgd, momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": lambda p: torch.optim.Adam(p, 0.01),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.5),
    "adam, l2": lambda p: torch.optim.Adam(p, 0.01, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.9),
    "foreach": lambda p: torch.optim.AdamW(p, 0.01, foreach=True),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("granularity", ["weight", "filter"])
def test_masked_weights_are_zero_after_every_step_of_any_optimizer(granularity, make):
    model = cnn()
    optimizer = make(model.parameters())
    for _ in range(3):
        step(model, optimizer)  # so that there is momentum before anything is pruned
    sparsifier = Sparsifier(model, granularity, sparsity=0.5, schedule=OneShot(0.3), example_inputs=X)
    seen = []

    def after():
        assert_masked_are_zero(model, sparsifier)
        seen.append(sparsifier.sparsity.overall)

    train(model, sparsifier, 6, optimizer, after)
    # Positions are those after each step: 1/6, 2/6, ...; the second is past 0.3.
    assert seen == [0.0, 0.5, 0.5, 0.5, 0.5, 0.5]


def test_masked_weights_are_zero_with_accumulation_and_clipping():
    model = cnn()
    optimizer = torch.optim.SGD(model.parameters(), 0.5, momentum=0.9)
    sparsifier = Sparsifier(model, "kernel", sparsity=0.5, schedule="lin")
    with attach(optimizer, sparsifier, total_steps=4) as handle:
        for _ in range(4):
            optimizer.zero_grad()
            for x, y in zip(X.split(4), Y.split(4), strict=True):
                F.cross_entropy(model(x), y).backward()
                assert_masked_are_zero(model, sparsifier)
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            assert_masked_are_zero(model, sparsifier)
        assert handle.loop.step == 4
    assert units_pruned(sparsifier) == 16 + 32


def test_masked_weights_are_zero_with_bf16_autocast_and_a_gradient_scaler():
    model = cnn()
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
    sparsifier = Sparsifier(model, "weight", "global", sparsity=0.9, schedule="lin")
    with attach(optimizer, sparsifier, total_steps=4):
        for _ in range(4):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = F.cross_entropy(model(X), Y)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            assert_masked_are_zero(model, sparsifier)
    assert sum(pruned(sparsifier).values()) == round(0.9 * 896)


def test_a_step_that_the_gradient_scaler_skips_does_not_count():
    model = cnn()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
    with attach(optimizer, Sparsifier(model, "weight", sparsity=0.5), total_steps=4) as handle:
        scaler.scale(F.cross_entropy(model(X), Y) * torch.inf).backward()
        scaler.step(optimizer)
        scaler.update()
        assert handle.loop.step == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_masked_weights_are_zero_in_any_precision(dtype):
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4)).to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    sparsifier = Sparsifier(model, "weight", sparsity=0.75, schedule="lin")
    with attach(optimizer, sparsifier, total_steps=3):
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.ones(2, 16, dtype=dtype)).sum().backward()
            optimizer.step()
            assert_masked_are_zero(model, sparsifier)
    assert pruned(sparsifier) == {"0.weight": 192, "1.weight": 48}
    assert {p.dtype for p in model.parameters()} == {dtype}


@pytest.mark.parametrize(
    "granularity", ["row", "column", "channel", "vertical_slice", "shared_kernel", "shared_weight", "filter"]
)
@pytest.mark.parametrize("context", ["local", "global", "lamp"])
def test_equal_units_tie_in_every_memory_format(granularity, context):
    """All filters of a layer are one filter, so their scores tie, and the first go: not a bit may depend on where they lie."""
    found = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(5, 40, 3), nn.Conv2d(40, 70, 3)).to(memory_format=memory_format)
        with torch.no_grad():
            for layer in model:
                layer.weight.copy_(layer.weight[:1].expand_as(layer.weight))
        sparsifier = Sparsifier(model, granularity, context)
        sparsifier.sparsify_model(0.5)
        assert_masked_are_zero(model, sparsifier)
        found.append(sparsifier.masks)
    assert all(torch.equal(found[0][n], found[1][n]) for n in found[0])
    if granularity == "filter" and context == "local":
        assert found[0]["1.weight"][:, 0, 0, 0].tolist() == [False] * 35 + [True] * 35


@pytest.mark.parametrize("granularity", ["weight", "kernel", "row", "filter", "shared_weight"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name_while_masks_move(granularity, bad):
    model = cnn()
    sparsifier = Sparsifier(model, granularity, "global")
    sparsifier.sparsify_model(0.25)
    name = sparsifier.targets[1].name
    kept = sparsifier.masks[name].nonzero()[0]
    with torch.no_grad():
        sparsifier.targets[1].parameter[tuple(kept)] = bad
    before = sparsifier.masks
    with pytest.raises(ValueError, match=f"scores must be finite, got NaN or infinity for {name}"):
        sparsifier.sparsify_model(0.5)
    assert all(torch.equal(before[n], mask) for n, mask in sparsifier.masks.items())


@pytest.mark.parametrize("granularity", ["weight", "filter", "kernel"])
def test_channels_last_weights_are_masked_alike(granularity):
    plain, other = cnn(), cnn()
    other.load_state_dict(plain.state_dict())
    other = other.to(memory_format=torch.channels_last)
    found = []
    for model in (plain, other):
        sparsifier = Sparsifier(model, granularity, "global")
        sparsifier.sparsify_model(0.5)
        assert_masked_are_zero(model, sparsifier)
        found.append(sparsifier.masks)
    assert all(torch.equal(found[0][n], found[1][n]) for n in found[0])
    assert other[0].weight.is_contiguous(memory_format=torch.channels_last)


# --- rising, falling ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [n for n in schedules.__all__ if n not in {"dsd", "alternating"}])  # those fall
@pytest.mark.parametrize("criterion", ["large_final", "random", "updating_movement", "taylor", "small_final"])
def test_once_pruned_stays_pruned_while_the_sparsity_rises(schedule, criterion):
    model = cnn()
    sparsifier = Sparsifier(model, "weight", "global", criterion, sparsity=0.8, schedule=schedule)
    history = [{n: torch.ones_like(m) for n, m in sparsifier.masks.items()}]
    train(model, sparsifier, 10, after=lambda: history.append(sparsifier.masks))
    for before, after in itertools.pairwise(history):
        assert all(bool((before[n] | ~after[n]).all()) for n in before)
    assert sum(pruned(sparsifier).values()) == round(0.8 * 896)


def test_where_the_schedule_falls_the_asked_number_returns_and_the_others_stay():
    model = cnn()
    sparsifier = Sparsifier(model, "weight", sparsity=0.5, schedule="dsd", targets="3")
    masks = []
    train(model, sparsifier, 8, after=lambda: masks.append(sparsifier.masks["3.weight"]))
    # dsd: (1 + cos(pi (1 - 2 p))) / 2 of 288 weights at p = 1/8 ... 1
    assert [int((~m).sum()) for m in masks] == [42, 144, 246, 288, 246, 144, 42, 0]
    for before, after in itertools.pairwise(masks[3:]):
        assert bool((after | ~before).all())
    assert int((model[3].weight == 0).sum()) == 42, "what returned last is zero, the others have learned again"


def test_where_the_schedule_falls_norms_come_back():
    model = cnn()
    with torch.no_grad():
        model[1].weight.copy_(torch.arange(1.0, 9.0))
        model[1].bias.fill_(3.0)
    sparsifier = Sparsifier(model, "filter", sparsity=0.5, schedule="dsd", example_inputs=X, targets="0")
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    silent = []
    train(model, sparsifier, 4, optimizer, after=lambda: silent.append(int((model[1].weight == 0).sum())))
    assert silent == [2, 4, 2, 0]
    assert model[1].weight.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert model[1].bias.tolist() == [3.0] * 8


def test_returned_filters_learn_again():
    model = cnn()
    model[2], model[5] = nn.SiLU(), nn.SiLU()
    sparsifier = Sparsifier(model, "filter", sparsity=0.5, schedule="dsd", example_inputs=X)
    train(model, sparsifier, 8, torch.optim.SGD(model.parameters(), 0.1))
    assert units_pruned(sparsifier) == 0
    step(model, torch.optim.SGD(model.parameters(), 0.1))
    assert int((model[0].weight.flatten(1).abs().sum(1) == 0).sum()) == 0


def test_sparsify_model_goes_up_and_down_exactly():
    sparsifier = Sparsifier(cnn(), "weight", "global")
    reached = []
    for share in (0.3, 0.5, 0.49, 0.2, 0.0, 0.9):
        sparsifier.sparsify_model(share)
        reached.append(sum(pruned(sparsifier).values()))
    assert reached == [269, 448, 439, 179, 0, 806]


# --- how often, and what is reached ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "granularity", "steps", "most", "moves"),
    [
        ("one_shot", "weight", 10, 1000, 1),
        ("iterative", "weight", 20, 1000, 3),
        ("lin", "weight", 20, 1000, 20),
        ("lin", "weight", 20, 5, 4),  # survivors 0.85, 0.725, 0.625, and the half when it is near: each step goes a bit beyond
        ("lin", "weight", 20, 1, 1),
        ("lin", "weight", 40, 20, 16),
        ("lin", "filter", 64, 1000, 4),  # 4 of 8 filters: 1, 2, 3, 4
        ("dsd", "filter", 64, 1000, 8),  # and back
    ],
)
def test_masks_move_only_when_the_count_changes_and_never_too_often(schedule, granularity, steps, most, moves):
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Flatten(), nn.Linear(128, 4))
    sparsifier = Sparsifier(
        model, granularity, sparsity=0.5, schedule=schedule, max_updates=most, targets="0", example_inputs=X
    )
    train(model, sparsifier, steps)
    assert sparsifier.moves == moves
    assert float(sparsifier.sparsity) == (0.0 if schedule == "dsd" else 0.5)


def test_masks_move_fifty_times_a_run_at_most_by_default():
    layer = nn.Linear(64, 64)
    optimizer = torch.optim.SGD(layer.parameters(), 0.0)
    sparsifier = Sparsifier(layer, "weight", sparsity=0.9, schedule="lin")
    with attach(optimizer, sparsifier, total_steps=1500):
        for _ in range(1500):
            optimizer.step()
    assert 40 < sparsifier.moves <= 50
    assert pruned(sparsifier) == {"weight": 3686}  # round(0.9 * 4096)


@pytest.mark.parametrize("steps", [1, 2, 3, 7])
@pytest.mark.parametrize("schedule", [n for n in schedules.__all__ if n != "dsd"])
def test_the_last_step_reaches_the_target_exactly(schedule, steps):
    model = cnn()
    sparsifier = Sparsifier(model, "weight", sparsity=0.9, schedule=schedule)
    train(model, sparsifier, steps)
    assert pruned(sparsifier) == {"0.weight": 259, "3.weight": 518, "8.weight": 29}
    assert zeros(model, sparsifier.masks) == {"0.weight": 259, "3.weight": 518, "8.weight": 29}


def test_a_completed_run_that_stops_short_reaches_the_end_and_a_stopped_one_does_not():
    for completed, reached in ((True, 0.5), (False, 0.125)):
        model = cnn()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        sparsifier = Sparsifier(model, "filter", sparsity=0.5, schedule="lin", example_inputs=X)
        handle = attach(optimizer, sparsifier, total_steps=4)
        step(model, optimizer)
        handle.remove(completed=completed)
        assert sparsifier.sparsity.overall == reached


def test_what_is_reported_is_counted_from_the_masks():
    model = cnn()
    # Two of 8 filters: of conv 0 they have 36 weights each, of conv 3 72 each.
    sparsifier = Sparsifier(model, "filter", {"0": 0.25, "3": 0.5})
    sparsifier.sparsify_model()
    reached = sparsifier.sparsity
    assert dict(reached) == {"0.weight": 0.25, "3.weight": 0.5}
    assert reached.overall == float(reached) == 6 / 16
    assert reached.weights == (2 * 36 + 4 * 72) / (8 * 36 + 8 * 72)
    # A schedule that was not followed is not what is reported: min_keep stops it.
    held = Sparsifier(cnn(), "filter", min_keep=3)
    with pytest.warns(UserWarning, match="min_keep=3"):
        held.sparsify_model(1.0)
    assert held.sparsity.overall == 10 / 16


def test_masks_are_copies():
    sparsifier = Sparsifier(cnn(), "weight")
    sparsifier.sparsify_model(0.5)
    for mask in sparsifier.masks.values():
        mask.fill_(False)
    assert sparsifier.sparsity.overall == 0.5
    assert all(m.dtype is torch.bool for m in sparsifier.masks.values())


@pytest.mark.parametrize("min_keep", [0, 1, 2])
@pytest.mark.parametrize("context", CONTEXTS)
def test_min_keep_units_of_every_target_stay(context, min_keep):
    model = cnn()
    with torch.no_grad():
        model[0].weight.mul_(1e-3)
    sparsifier = Sparsifier(model, "filter", context, min_keep=min_keep)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sparsifier.sparsify_model(1.0)
    assert [r.units - r.pruned for r in sparsifier.report().rows] == [min_keep, min_keep]
    sparsifier.sparsify_model(0.75)
    assert units_pruned(sparsifier) == 12
    assert all(r.units - r.pruned >= min_keep for r in sparsifier.report().rows)


# --- scoring -----------------------------------------------------------------------------------------------------------


def test_half_precision_scores_do_not_tie():
    weight = torch.randn(128, 32, 3, 3)
    layer = nn.Conv2d(32, 128, 3).to(torch.bfloat16)
    with torch.no_grad():
        layer.weight.copy_(weight)
    sparsifier = Sparsifier(layer, "filter")
    sparsifier.sparsify_model(0.5)
    means = layer_means = weight.bfloat16().double().abs().mean((1, 2, 3))
    assert len(set(means.bfloat16().tolist())) < 128 == len(set(layer_means.tolist())), "in bfloat16 they would tie"
    lowest = set(means.argsort()[:64].tolist())
    assert set((~sparsifier.masks["weight"][:, 0, 0, 0]).nonzero().flatten().tolist()) == lowest


def test_scoring_never_writes_into_a_weight():
    def clear(x):
        return x.zero_().add_(torch.arange(float(x.numel())).view_as(x))

    for criterion in (lambda w: w, clear, Criterion(lambda e: e.weight), Criterion(lambda e: e.weight, normalizer="max")):
        layer = nn.Linear(4, 4)
        before = layer.weight.detach().clone()
        sparsifier = Sparsifier(layer, "weight", "local", criterion)
        sparsifier.sparsify_model(0.0)
        assert torch.equal(layer.weight, before)
        sparsifier.sparsify_model(0.5)
        assert torch.equal(layer.weight, before * sparsifier.masks["weight"])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("criterion", ["large_final", "small_final", "squared_final", "movement"])
@pytest.mark.parametrize("granularity", ["weight", "filter"])
def test_nan_and_infinite_weights_are_named_and_nothing_is_changed(bad, criterion, granularity):
    model = cnn()
    sparsifier = Sparsifier(model, granularity, "global", criterion)
    with torch.no_grad():
        model[3].weight[1, 2, 0, 0] = bad
    before = {n: x.clone() for n, x in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"NaN or infinity for 3\.weight"):
        sparsifier.sparsify_model(0.5)
    assert all(torch.equal(before[n].nan_to_num(), x.nan_to_num()) for n, x in model.state_dict().items())
    assert sparsifier.sparsity.overall == 0.0
    assert sparsifier.moves == 0


# --- frozen parameters, runs one after the other -------------------------------------------------------------------------


def test_frozen_parameters_are_left_alone_until_they_train():
    model = cnn()
    model[0].weight.requires_grad_(False)
    before = model[0].weight.clone()
    sparsifier = Sparsifier(model, "weight", sparsity=0.5, schedule="lin")
    train(model, sparsifier, 3)
    assert torch.equal(model[0].weight, before)
    assert pruned(sparsifier) == {"0.weight": 0, "3.weight": 288, "8.weight": 16}
    assert sparsifier.report().left_out["0.weight"] == "frozen"
    model[0].weight.requires_grad_(True)
    seen = []
    train(model, sparsifier, 3, after=lambda: seen.append(pruned(sparsifier)))
    assert [s["3.weight"] for s in seen] == [288, 288, 288]
    assert [s["0.weight"] for s in seen] == [48, 96, 144]
    assert "0.weight" not in sparsifier.report().left_out


def test_what_has_trained_in_a_run_counts_until_its_end_also_when_resumed():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))

    def sparsifier():
        return Sparsifier(model, "weight", sparsity=0.5, schedule="lin")

    model[0].requires_grad_(False)
    first = sparsifier()
    first.on_fit_start(Fit(4))
    model[0].requires_grad_(True)
    first.after_step(0.25)
    model[0].requires_grad_(False)
    first.after_step(0.5)
    assert pruned(first) == {"0.weight": 4, "1.weight": 4}
    first.on_fit_end(completed=False)
    resumed = sparsifier()
    resumed.on_fit_start(Fit(4))
    resumed.load_state_dict(first.state_dict())
    resumed.after_step(0.75)
    assert pruned(resumed) == {"0.weight": 6, "1.weight": 6}
    resumed.on_fit_end(completed=True)
    assert pruned(resumed) == {"0.weight": 8, "1.weight": 8}
    assert resumed.report().left_out == {"0.weight": "frozen"}
    first.on_fit_start(Fit(4))
    assert first.report().left_out == {"0.weight": "frozen"}


def snipped(gradients):
    """Weights 1, 2, 3, 4 after a step for each of the gradients, half of them to prune by the last; None is none at all."""
    model = nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    sparsifier = Sparsifier(model, "weight", "local", "snip", sparsity=0.5, schedule="lin")
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    seen = []
    with attach(optimizer, sparsifier, total_steps=len(gradients)):
        for g in gradients:
            model.weight.grad = torch.tensor([g])
            optimizer.step()
            seen.append(model.weight.tolist()[0])
    return seen


def test_a_move_waits_while_all_gradients_are_zero():
    # |g w| = 8, 6, 4, 2
    seen = snipped([[0.0] * 4, [8.0, 3.0, 4 / 3, 0.5]])
    assert seen == [[1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 0.0, 0.0]]


def test_a_run_whose_last_gradients_are_zero_stays_where_it_is_and_says_so():
    with pytest.warns(UserWarning, match=r"at sparsity 0\.2500 \(criteria needs gradients, and all of them are zero"):
        seen = snipped([[8.0, 3.0, 4 / 3, 0.5], [0.0] * 4])
    assert seen == [[1.0, 2.0, 3.0, 0.0]] * 2


def test_a_frozen_parameter_that_was_named_is_pruned():
    model = cnn().requires_grad_(False)
    with pytest.raises(ValueError, match="targets must train, and all are frozen: name them with targets="):
        Sparsifier(model, "weight").sparsify_model(0.5)
    sparsifier = Sparsifier(model, "weight", targets="0")
    sparsifier.sparsify_model(0.5)
    assert pruned(sparsifier) == {"0.weight": 144}


@pytest.mark.parametrize("schedule", schedules.__all__)
def test_a_second_run_does_not_fall_back_to_dense(schedule):
    model = cnn()
    sparsifier = Sparsifier(model, "weight", sparsity=0.5, schedule="one_shot")
    train(model, sparsifier, 4)
    first, state = sparsifier.masks, sparsifier.state_dict()
    sparsifier = Sparsifier(model, "weight", sparsity=0.5, schedule=schedule)
    sparsifier.load_state_dict(state)
    seen = []
    train(model, sparsifier, 6, after=lambda: seen.append(sparsifier.sparsity.overall))
    if schedule == "dsd":
        assert seen[:3] == [0.5, 0.5, 0.5]
        assert seen[-1] == 0.0
    elif schedule == "alternating":  # its last phase is compressed
        assert seen[:3] == [0.5, 0.5, 0.5]
        assert seen[-1] == 0.5
    else:
        assert seen == [0.5] * 6
        assert all(torch.equal(m, first[n]) for n, m in sparsifier.masks.items())


def test_masks_that_stay_the_same_are_no_move():
    model = cnn()
    sparsifier = Sparsifier(model, "weight", sparsity=0.5, schedule="lin")
    train(model, sparsifier, 4)
    moves = sparsifier.moves
    train(model, sparsifier, 4)
    assert sparsifier.moves == moves


def test_a_second_run_starts_clean_when_other_weights_were_loaded():
    model, other = cnn(), cnn()
    sparsifier = Sparsifier(model, "weight", sparsity=0.5, schedule="lin")
    train(model, sparsifier, 4)
    model.load_state_dict(other.state_dict())
    seen = []
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    train(model, sparsifier, 4, optimizer, after=lambda: seen.append(sum(zeros(model, ["0.weight"]).values())))
    assert seen == [36, 72, 108, 144]
    kept = sparsifier.masks["0.weight"]
    assert torch.equal(model[0].weight[kept], other[0].weight[kept])
    magnitudes = other[0].weight.detach().abs()
    assert float(magnitudes[kept].min()) >= float(magnitudes[~kept].max())


def test_masks_that_are_dropped_within_a_run_come_back_at_the_next_update():
    """It asks for as many units as the last one: 1 of 4 at shares 0.4 and 0.5, which else would mean that nothing moves."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    other = {name: torch.ones_like(x) for name, x in model.state_dict().items()}
    sparsifier = Sparsifier(model, "weight", "local", sparsity=0.5, schedule="lin", targets=["0", "1"])
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    batch = torch.ones(1, 2), torch.zeros(1, dtype=torch.long)
    with attach(optimizer, sparsifier, total_steps=10):
        for _ in range(4):
            step(model, optimizer, *batch)
        assert pruned(sparsifier) == {"0.weight": 1, "1.weight": 1}
        model.load_state_dict(other)
        sparsifier.sparsify_layer(model[1], 0.25)
        assert pruned(sparsifier) == {"0.weight": 0, "1.weight": 1}
        step(model, optimizer, *batch)
        assert pruned(sparsifier) == {"0.weight": 1, "1.weight": 1}


def test_a_run_that_fails_leaves_a_usable_model_and_the_next_starts_clean():
    model = cnn()
    keys = list(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sparsifier = Sparsifier(model, "weight", sparsity=0.5, schedule="lin")

    def fail():
        with attach(optimizer, sparsifier, total_steps=4):
            step(model, optimizer)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert_untouched(model, keys)
    assert sparsifier.sparsity["0.weight"] == 36 / 288
    step(model, optimizer)  # no hook is left: a plain step, weights come back
    assert zeros(model, ["0.weight"])["0.weight"] < 36
    seen = []
    train(model, sparsifier, 4, after=lambda: seen.append(pruned(sparsifier)["0.weight"]))
    assert seen == [36, 72, 108, 144]


# --- hold, finalize ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["weight", "kernel"])
def test_hold_keeps_the_masks_in_later_training_until_it_ends(granularity):
    model = cnn()
    sparsifier = Sparsifier(model, granularity)
    sparsifier.sparsify_model(0.5)
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    handle = sparsifier.hold(optimizer)
    for _ in range(3):
        step(model, optimizer)
        assert_masked_are_zero(model, sparsifier)
    handle.remove()
    step(model, optimizer)
    assert zeros(model, ["0.weight"])["0.weight"] < 144


def test_hold_keeps_biases_and_norms_silent_too():
    model = cnn()
    model[2] = nn.SiLU()  # behind a ReLU a silent norm has no gradient
    sparsifier = Sparsifier(model, "filter", example_inputs=X)
    sparsifier.sparsify_model(0.5)
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    sparsifier.hold(optimizer)
    for _ in range(3):
        step(model, optimizer)
        assert int((model[1].bias == 0).sum()) == int((model[1].weight == 0).sum()) == 4


def test_hold_without_an_optimizer_is_a_participant():
    model = cnn()
    sparsifier = Sparsifier(model, "weight")
    sparsifier.sparsify_model(0.5)
    hold = sparsifier.hold()
    assert isinstance(hold, Hold)
    train(model, hold, 3, after=lambda: assert_masked_are_zero(model, sparsifier))
    assert sparsifier.sparsity.overall == 0.5
    with pytest.raises(TypeError, match=r"optimizer must be a torch\.optim\.Optimizer, got Linear"):
        sparsifier.hold(nn.Linear(1, 1))


def test_finalize_bakes_the_zeros_in_and_ends_holds():
    model = cnn()
    sparsifier = Sparsifier(model, "weight", "local", "movement")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    step(model, optimizer)
    sparsifier.sparsify_model(0.5)
    sparsifier.hold(optimizer)
    with torch.no_grad():
        model[0].weight.add_(1.0)
    sparsifier.finalize()
    assert zeros(model, ["0.weight"]) == {"0.weight": 144}
    assert sparsifier.state_dict()["initial"] == {}
    step(model, optimizer)
    assert zeros(model, ["0.weight"])["0.weight"] < 144
    with pytest.raises(ValueError, match="finalize"):
        sparsifier.sparsify_model(0.75)


def test_reset_forgets_the_masks_and_leaves_the_weights():
    sparsifier = Sparsifier(cnn(), "weight")
    sparsifier.sparsify_model(0.5)
    before = {n: x.clone() for n, x in sparsifier.model.state_dict().items()}
    sparsifier.reset()
    assert sparsifier.sparsity.overall == 0.0
    sparsifier.apply_masks()
    assert all(torch.equal(before[n], x) for n, x in sparsifier.model.state_dict().items())


def test_save_model_writes_masked_weights_as_a_plain_state_dict(tmp_path):
    sparsifier = Sparsifier(cnn(), "weight")
    sparsifier.sparsify_model(0.5)
    with torch.no_grad():
        sparsifier.model[0].weight.add_(1.0)
    sparsifier.save_model(tmp_path / "weights.pt")
    loaded = torch.load(tmp_path / "weights.pt", weights_only=True)
    assert list(loaded) == list(cnn().state_dict())
    assert int((loaded["0.weight"] == 0).sum()) == 144


def wrapped(model):
    return nn.DataParallel(model)


@pytest.mark.parametrize("make", [copy.deepcopy, lambda model: wrapped(copy.deepcopy(model)), wrapped])
def test_save_model_masks_the_copy_that_it_saves(tmp_path, make):
    sparsifier = Sparsifier(cnn(), "filter", example_inputs=X)
    sparsifier.sparsify_model(0.5)
    other = make(sparsifier.model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.fill_(1.0)
    own = {name: x.clone() for name, x in sparsifier.model.state_dict().items()}
    sparsifier.save_model(tmp_path / "weights.pt", model=other)
    loaded = torch.load(tmp_path / "weights.pt", weights_only=True)
    wanted = {name: mask.float() for name, mask in sparsifier.masks.items()}
    assert all(torch.equal(loaded[name], values) for name, values in wanted.items())
    assert [int((loaded[name] == 0).sum()) for name in ("1.weight", "1.bias", "3.bias", "4.bias")] == [4] * 4
    if unwrap(other) is not sparsifier.model:
        assert all(torch.equal(own[name], x) for name, x in sparsifier.model.state_dict().items())


def test_save_model_writes_no_copy_of_another_shape(tmp_path):
    sparsifier = Sparsifier(cnn(), "weight")
    sparsifier.sparsify_model(0.5)
    with pytest.raises(ValueError, match=r"model must be a copy of the sparsifier's, got one where 0\.weight is"):
        sparsifier.save_model(tmp_path / "weights.pt", model=nn.Sequential(nn.Linear(2, 2)))
    assert list(tmp_path.iterdir()) == []


# --- parametrised weights ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrap", "named", "way"),
    [
        (nn.utils.parametrizations.weight_norm, "WeightNorm on weight", "parametrize.remove_parametrizations"),
        (nn.utils.parametrizations.spectral_norm, "SpectralNorm on weight", "parametrize.remove_parametrizations"),
        (nn.utils.weight_norm, "WeightNorm", "remove_weight_norm"),
        (nn.utils.spectral_norm, "SpectralNorm", "remove_spectral_norm"),
        (lambda m: prune.l1_unstructured(m, "weight", 0.3), "L1Unstructured", "prune.remove"),
    ],
)
def test_a_parametrised_weight_is_refused_by_name(wrap, named, way):
    model = nn.Sequential(nn.Linear(4, 4), wrap(nn.Linear(4, 4)))
    told = f"targets must not be parametrised, got 1 ({named}): the forward pass uses a weight that is worked out anew; "
    told += f'take it away first with torch.nn.utils.{way}(model.1, "weight"), or leave the layer out with targets='
    with pytest.raises(ValueError, match=re.escape(told)):
        Sparsifier(model, "weight", targets=["0", "1"])
    sparsifier = Sparsifier(model, "weight", targets="0")
    sparsifier.sparsify_model(0.5)
    assert pruned(sparsifier) == {"0.weight": 8}


# --- partners by data flow ---------------------------------------------------------------------------------------------


def test_norms_are_found_by_data_flow_and_not_by_registration():
    model = Crossed(width=6)
    with torch.no_grad():
        for norm in (model.norm1, model.norm2):
            norm.bias.fill_(1.0)
    sparsifier = Sparsifier(model, "filter", {"conv1": 0.5, "conv2": 0.5}, example_inputs=X)
    sparsifier.sparsify_model()
    for conv, norm in ((model.conv1, model.norm2), (model.conv2, model.norm1)):
        gone = conv.weight.detach().flatten(1).abs().sum(1) == 0
        assert int(gone.sum()) == conv.out_channels // 2
        assert torch.equal(norm.weight == 0, gone)
        assert torch.equal(norm.bias == 0, gone)


LAYERS = {
    "Conv1d": (nn.Conv1d(4, 8, 3), nn.BatchNorm1d(8), (2, 4, 7)),
    "Conv2d": (nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), (2, 4, 7, 7)),
    "Conv3d": (nn.Conv3d(4, 8, 3), nn.BatchNorm3d(8), (2, 4, 5, 5, 5)),
    "ConvTranspose1d": (nn.ConvTranspose1d(4, 8, 3), nn.BatchNorm1d(8), (2, 4, 7)),
    "ConvTranspose2d": (nn.ConvTranspose2d(4, 8, 3), nn.BatchNorm2d(8), (2, 4, 7, 7)),
    "ConvTranspose3d": (nn.ConvTranspose3d(4, 8, 3), nn.BatchNorm3d(8), (2, 4, 5, 5, 5)),
    "grouped": (nn.Conv2d(4, 8, 3, groups=2), nn.BatchNorm2d(8), (2, 4, 7, 7)),
    "grouped, transposed": (nn.ConvTranspose2d(4, 8, 3, groups=2), nn.BatchNorm2d(8), (2, 4, 7, 7)),
    "depthwise": (nn.Conv2d(4, 8, 3, groups=4), nn.BatchNorm2d(8), (2, 4, 7, 7)),
    "Linear": (nn.Linear(4, 8), nn.BatchNorm1d(8), (5, 4)),
}


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_a_pruned_output_is_exactly_zero(name, normed):
    layer, norm, shape = (copy.deepcopy(x) for x in LAYERS[name])
    model = nn.Sequential(layer, norm) if normed else nn.Sequential(layer)
    x = torch.randn(shape)
    nn.init.uniform_(norm.bias, 1, 2)
    nn.init.uniform_(layer.bias, 1, 2)
    granularity = Keep("out") if name == "Linear" else "filter"
    sparsifier = Sparsifier(model, granularity, sparsity=0.5, schedule="lin", targets="0", example_inputs=x)
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    for training in (True, False):
        model.train(training)
        with attach(optimizer, sparsifier, total_steps=3):
            for _ in range(3):
                optimizer.zero_grad()
                model(x).square().mean().backward()
                optimizer.step()
        per_output = model(x).transpose(0, 1).flatten(1).abs().sum(1)
        assert int((per_output == 0).sum()) == 4
    masked = sparsifier.masks["0.weight"]
    assert masked.shape == layer.weight.shape
    assert int((~masked).sum()) == layer.weight.numel() // 2


@pytest.mark.parametrize("granularity", ["row", Keep("out")])
def test_rows_of_a_linear_layer_are_its_outputs(granularity):
    layer = nn.Linear(4, 8)
    nn.init.ones_(layer.bias)
    Sparsifier(layer, granularity, targets="weight").sparsify_model(0.5)
    assert int((layer(torch.randn(3, 4)).abs().sum(0) == 0).sum()) == 4


def test_by_default_no_output_of_the_network_is_silenced():
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 3))
    sparsifier = Sparsifier(model, "filter", example_inputs=X)
    sparsifier.sparsify_model(0.5)
    assert pruned(sparsifier) == {"0.weight": 144}
    assert sparsifier.report().left_out == {"2.weight": "it makes the model's output"}
    named = Sparsifier(model, "filter", targets=["0", "2"], example_inputs=X)
    assert [t.name for t in named.targets] == ["0.weight", "2.weight"]
    by_dict = Sparsifier(model, "filter", {"2": 0.4}, example_inputs=X)
    by_dict.sparsify_model()
    assert pruned(by_dict) == {"0.weight": 0, "2.weight": 2 * 72}


def test_a_dict_that_names_the_output_counts_in_a_loop_with_a_batch_too():
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 3))
    sparsifier = Sparsifier(model, "filter", {"2": 0.4}, schedule="lin")
    sparsifier.on_fit_start(Fit(1, model, batch=Batch((X,))))
    sparsifier.after_step(1.0)
    assert pruned(sparsifier)["2.weight"] == 2 * 72


def test_the_loops_batch_shows_the_data_flow():
    model = cnn()
    sparsifier = Sparsifier(model, "filter", sparsity=0.5, schedule="lin")
    sparsifier.on_fit_start(Fit(2, model, batch=Batch((X,), (Y,))))
    sparsifier.after_step(1.0)
    assert int((model[1].weight == 0).sum()) == int((model[4].weight == 0).sum()) == 4


@pytest.mark.filterwarnings("default:without example_inputs")
def test_without_example_inputs_it_says_what_to_pass():
    with pytest.warns(UserWarning, match=r"without example_inputs .* pass example_inputs=, or name the targets"):
        Sparsifier(cnn(), "filter").sparsify_model(0.5)


@pytest.mark.filterwarnings("error")
def test_there_is_no_warning_where_there_is_nothing_to_say():
    Sparsifier(cnn(), "weight").sparsify_model(0.5)
    Sparsifier(cnn(), "filter", example_inputs=X).sparsify_model(0.5)
    model = cnn()
    train(model, Sparsifier(model, "kernel", "global", sparsity=0.5), 3)


# --- resume ------------------------------------------------------------------------------------------------------------

RESUMED = {
    "flat": ("large_final", Piecewise(((0.0, 0.5), (1.0, 0.5)))),
    "one_shot": ("large_final", "one_shot"),
    "one_cycle": ("large_final", "one_cycle"),
    "dsd": ("large_final", "dsd"),
    "movement": ("movement", "lin"),
    "updating_movement": ("updating_movement", "lin"),
    "updating_movement, iterative": ("updating_movement", "iterative"),
    "taylor": ("taylor", "agp"),
}
STEPS = 12


def run(criterion, schedule, granularity, stops, stored):
    """Train for STEPS steps, starting anew from files at every stop; what was reached."""
    torch.manual_seed(3)
    bounds = [0, *stops, STEPS]
    files = None
    for begin, end in itertools.pairwise(bounds):
        torch.manual_seed(0 if files is None else 99)  # a resumed process builds its model anew, with other numbers
        model = cnn()
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        if files is not None:
            model.load_state_dict(files["model"])
            optimizer.load_state_dict(files["optimizer"])
        sparsifier = Sparsifier(
            model, granularity, "global", criterion, sparsity=0.75, schedule=schedule, max_updates=5, example_inputs=X
        )
        handle = attach(optimizer, sparsifier, total_steps=STEPS)
        if files is not None:
            before = copy.deepcopy(files["handle"])
            handle.load_state_dict(files["handle"])
            assert_same(before, files["handle"])
        for i in range(begin, end):
            step(model, optimizer, X + i, Y)
        files = stored({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "handle": handle.state_dict()})
        if end == STEPS:
            handle.remove()
    return model.state_dict(), sparsifier.masks, sparsifier.state_dict()


def assert_same(a, b):
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("granularity", ["weight", "filter"])
@pytest.mark.parametrize(("criterion", "schedule"), RESUMED.values(), ids=RESUMED)
def test_stop_save_load_equals_one_run_bit_for_bit(criterion, schedule, granularity):
    whole = run(criterion, schedule, granularity, [], lambda x: x)
    for stops in ([5], [3, 8], [1, 6, 11]):
        assert_same(run(criterion, schedule, granularity, stops, through_a_file), whole)


def test_the_state_is_plain_tensors_by_parameter_name_and_a_copy():
    model = cnn()
    sparsifier = Sparsifier(model, "weight", "local", "movement", sparsity=0.5)
    sparsifier.sparsify_model()
    state = sparsifier.state_dict()
    assert set(state["keep"]) == set(state["initial"]) == {"0.weight", "3.weight", "8.weight"}
    assert_same(through_a_file(state), state)
    for tensor in (*state["keep"].values(), *state["initial"].values()):
        tensor.zero_()
    assert sparsifier.sparsity.overall == 0.5
    assert float(sparsifier.state_dict()["initial"]["0.weight"].abs().sum()) > 0


def test_loading_copies_and_leaves_the_weights_and_the_callers_dict_alone():
    source = Sparsifier(cnn(), "weight", "local", "updating_movement")
    source.sparsify_model(0.5)
    state = source.state_dict()
    before = copy.deepcopy(state)
    model = cnn()
    weights = {n: x.clone() for n, x in model.state_dict().items()}
    sparsifier = Sparsifier(model, "weight", "local", "updating_movement")
    sparsifier.load_state_dict(state)
    assert_same(dict(model.state_dict()), weights)
    for keep in state["keep"].values():
        keep.logical_not_()
    assert_same(sparsifier.masks, source.masks)
    for keep in state["keep"].values():
        keep.logical_not_()
    sparsifier.sparsify_model(0.9)
    train_with = torch.optim.SGD(model.parameters(), 0.1)
    step(model, train_with)
    assert_same(state, before)


def test_memory_only_where_the_criterion_needs_it():
    for criterion, held in (("large_final", set()), ("movement", {"initial"}), ("updating_movement", {"previous"})):
        state = Sparsifier(cnn(), "weight", "local", criterion).state_dict()
        assert {n for n in ("initial", "previous") if state[n]} == held


def tampered(**changes):
    sparsifier = Sparsifier(cnn(), "weight")
    sparsifier.sparsify_model(0.5)
    return {**sparsifier.state_dict(), **changes}


def without(key):
    state = tampered()
    del state[key]
    return state


BAD_STATES = {
    "no dict": (lambda: 3, "state must be what Sparsifier.state_dict"),
    "a model's": (lambda: cnn().state_dict(), "state must be what Sparsifier.state_dict.*without format, granularity"),
    "truncated": (lambda: without("keep"), "without keep"),
    "another format": (lambda: tampered(format=99), "format must be 1, got 99"),
    "another granularity": (lambda: tampered(granularity="kernel"), "granularity weight, got 'kernel'"),
    "another model": (
        lambda: Sparsifier(nn.Sequential(nn.Linear(3, 2)), "weight").state_dict(),
        r"0\.weight is \(2, 3\), here \(8, 4, 3, 3\)",
    ),
    "fewer targets": (lambda: Sparsifier(cnn(), "weight", targets=["0", "3"]).state_dict(), r"8\.weight is missing"),
    "a mask of another shape": (
        lambda: tampered(keep={"0.weight": torch.ones(3, dtype=torch.bool)}),
        r"keep.*0\.weight.*\(3,\)",
    ),
    "a mask of another type": (lambda: tampered(keep={"0.weight": torch.ones(8, 4, 3, 3)}), r"keep.*0\.weight.*float32"),
    "earlier weights of another shape": (
        lambda: tampered(initial={"0.weight": torch.ones(3)}),
        r"initial weights must be .*, got \(3,\) for 0\.weight",
    ),
    "an unknown mask": (lambda: tampered(keep={"9.weight": torch.ones(3, dtype=torch.bool)}), r"keep.*9\.weight"),
}


@pytest.mark.parametrize(("make", "message"), BAD_STATES.values(), ids=BAD_STATES)
def test_a_foreign_truncated_or_tampered_state_is_refused_and_nothing_is_changed(make, message):
    sparsifier = Sparsifier(cnn(), "weight")
    sparsifier.sparsify_model(0.25)
    before = sparsifier.state_dict()
    with pytest.raises(ValueError, match=message):
        sparsifier.load_state_dict(make())
    assert_same(sparsifier.state_dict(), before)


def test_a_state_without_the_weights_that_the_criterion_needs_is_named_when_they_are_needed():
    sparsifier = Sparsifier(cnn(), "weight", "local", "movement")
    sparsifier.load_state_dict(Sparsifier(cnn(), "weight").state_dict())
    with pytest.raises(ValueError, match=r"criteria needs the initial weights of 0\.weight, which are not held any more"):
        sparsifier.sparsify_model(0.5)


# --- wrappers ----------------------------------------------------------------------------------------------------------


def wrapped_part():
    model = cnn()
    model[3] = torch.compile(model[3], backend="eager")
    return model


@pytest.mark.parametrize(
    "wrap",
    [
        lambda: torch.compile(cnn(), backend="eager"),
        lambda: nn.DataParallel(cnn()),
        lambda: nn.DataParallel(torch.compile(cnn(), backend="eager")),
        wrapped_part,
    ],
    ids=["compile", "parallel", "both", "a compiled part"],
)
def test_names_survive_wrappers(wrap):
    plain = Sparsifier(cnn(), "filter", {"3": 0.5})
    plain.sparsify_model()
    wrapped = Sparsifier(wrap(), "filter", {"3": 0.5, "0.weight": 0.25}, example_inputs=X)
    wrapped.sparsify_model()
    assert {r.name: r.pruned for r in wrapped.report().rows} == {"0.weight": 2, "3.weight": 4}
    wrapped.load_state_dict(plain.state_dict())
    plain.load_state_dict(wrapped.state_dict())
    assert {r.name: r.pruned for r in wrapped.report().rows} == {"0.weight": 0, "3.weight": 4}


# --- bad input ---------------------------------------------------------------------------------------------------------

SHARES = [
    (50, ValueError, r"sparsity must be in \[0, 1\], got 50; pass 0\.5"),
    (-0.1, ValueError, r"sparsity must be in \[0, 1\], got -0\.1"),
    (float("nan"), ValueError, r"sparsity must be in \[0, 1\], got nan"),
    ("0.5", TypeError, r"sparsity must be a number in \[0, 1\], got '0\.5' \(str\)"),
    (True, TypeError, r"sparsity must be a number in \[0, 1\], got True \(bool\)"),
    ({"0": 50}, ValueError, r"sparsity of '0' must be in \[0, 1\], got 50; pass 0\.5"),
    ({"stem": 0.5}, ValueError, r"got 'stem'"),
    ({0: 0.5}, TypeError, r"sparsity's keys must be names or modules of the model, got 0 \(int\)"),
    (None, ValueError, "sparsity must be given"),
]


@pytest.mark.parametrize(("value", "error", "message"), SHARES, ids=[str(s[0]) for s in SHARES])
def test_a_bad_sparsity_is_refused_and_nothing_is_changed(value, error, message):
    model = cnn()
    before = {n: x.clone() for n, x in model.state_dict().items()}
    sparsifier = Sparsifier(model, "weight")
    with pytest.raises(error, match=message):
        sparsifier.sparsify_model(value)
    assert_same(dict(model.state_dict()), before)
    if value is not None:
        with pytest.raises(error, match=message):
            Sparsifier(model, "weight", sparsity=value)
    else:
        with pytest.raises(error, match=message):
            attach(torch.optim.SGD(model.parameters(), 0.1), sparsifier, total_steps=2)


def test_an_unknown_layer_in_a_dict_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"0\.weight, 3\.weight, 8\.weight, got 'conv1'"):
        Sparsifier(cnn(), "weight").sparsify_model({"conv1": 0.5})


BAD_ARGUMENTS = [
    ({"model": 3}, TypeError, r"model must be a torch\.nn\.Module, got 3 \(int\)"),
    ({"granularity": "filters"}, ValueError, r"granularity must be one of .*, got 'filters'; did you mean 'filter'"),
    ({"granularity": 3}, TypeError, r"granularity must be a granularity or its name, got 3 \(int\)"),
    ({"context": "locall"}, ValueError, r"context must be one of .*, got 'locall'; did you mean 'local'"),
    ({"context": 3}, TypeError, r"context must be a context, its name or a dict, got 3 \(int\)"),
    ({"criteria": "large"}, ValueError, r"criteria must be one of .*, got 'large'"),
    ({"criteria": 3}, TypeError, r"criteria must be a criterion, its name, or a function of the weight, got 3"),
    ({"schedule": "cosinus"}, ValueError, r"schedule must be one of .*, got 'cosinus'"),
    ({"schedule": 3}, TypeError, r"schedule must be .*, got 3"),
    ({"min_keep": -1}, ValueError, r"min_keep must be at least 0, got -1"),
    ({"round_to": 0}, ValueError, r"round_to must be at least 1, got 0"),
    ({"round_to": 8.0}, TypeError, r"round_to must be a whole number of at least 1, got 8\.0"),
    ({"max_updates": 0}, ValueError, r"max_updates must be at least 1, got 0"),
    ({"targets": "stem"}, ValueError, r"targets must be .*, got 'stem'"),
    ({"targets": lambda n, p: False}, ValueError, r"no targets found in Sequential"),
    ({"layer_type": nn.Conv3d}, ValueError, r"layer_type must match a layer of the model, got Conv3d; it has .*Conv2d"),
    ({"layer_type": "Conv2d"}, TypeError, r"layer_type must be module classes, got 'Conv2d'"),
    ({"example_inputs": torch.ones(3)}, ValueError, r"example_inputs must be arguments that the model runs on"),
    ({"context": {"0": 0.5}, "sparsity": 0.5}, ValueError, r"sparsity must be given once"),
    (
        {"context": "global", "sparsity": {"0": 0.5}},
        ValueError,
        r"sparsity must be one number for context Global\(\), got a dict",
    ),
    ({"granularity": "filter", "targets": "8"}, ValueError, r"granularity must be one of .*, got filter.* for 8\.weight"),
    ({"granularity": "filter", "nm": True}, ValueError, r"2:4 needs granularity 'weight', for 0\.weight"),
    ({"nm": True, "round_to": 8}, ValueError, r"round_to must be None for N:M"),
    ({"nm": True, "sparsity": 0.9}, ValueError, r"sparsity must be at most 0\.5 for 2:4, got 0\.9"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD_ARGUMENTS)
def test_bad_arguments_are_named_and_the_known_ones_listed(arguments, error, message):
    with pytest.raises(error, match=message):
        Sparsifier(**{"model": cnn(), **arguments})


def test_a_model_without_targets_is_an_error():
    with pytest.raises(ValueError, match=r"no targets found in Sequential \(.*raw parameters only when named in targets="):
        Sparsifier(nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()), "weight")
    with pytest.raises(ValueError, match=r"no targets found in ReLU \(it has no parameters\)"):
        Sparsifier(nn.ReLU(), "weight")


@pytest.mark.parametrize(
    ("criterion", "message"),
    [
        ("taylor", r"criteria needs gradients, and 0\.weight has none: they exist after loss\.backward\(\)"),
        ("snip", r"criteria needs gradients, and 0\.weight has none"),
        ("wanda", r"data must be given for a criterion that needs activations"),
        ("synflow", r"example_inputs must be given for synflow"),
        ("grasp", r"(data|loss) must be given"),
    ],
)
def test_missing_evidence_says_where_it_comes_from(criterion, message):
    sparsifier = Sparsifier(cnn(), "weight", "local", criterion)
    with pytest.raises(ValueError, match=message):
        sparsifier.sparsify_model(0.5)
    assert sparsifier.sparsity.overall == 0.0
    assert sparsifier.moves == 0


def test_gradients_of_the_last_backward_pass_are_used():
    model = nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    model(torch.tensor([[4.0, 1.0, 2.0, 0.1]])).sum().backward()  # |g w| = 4, 2, 6, 0.4
    sparsifier = Sparsifier(model, "weight", "local", "snip")
    sparsifier.sparsify_model(0.5)
    assert model.weight.tolist() == [[1.0, 0.0, 3.0, 0.0]]


def test_a_module_that_holds_no_target_is_refused_by_sparsify_layer():
    model = cnn()
    with pytest.raises(ValueError, match=r"m must hold a target, got BatchNorm2d; the targets are 0\.weight, 3\.weight"):
        Sparsifier(model, "filter", example_inputs=X).sparsify_layer(model[1], 0.5)


def test_a_step_beyond_total_steps_is_refused_before_it_changes_a_weight():
    model = cnn()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    attach(optimizer, Sparsifier(model, "weight", sparsity=0.5), total_steps=1)
    step(model, optimizer)
    before = {n: x.clone() for n, x in model.named_parameters()}
    with pytest.raises(ValueError, match="total_steps must be at least the number of steps taken, got 1"):
        step(model, optimizer)
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())


# --- calls that users know ---------------------------------------------------------------------------------------------


def test_one_shot_of_a_layer_and_of_the_model_then_the_report(capsys):
    model = cnn()
    sparsifier = Sparsifier(model, "filter", "local", criteria.large_final)
    sparsifier.sparsify_layer(model[0], 0.7)  # round(0.7 * 8) = 6
    assert pruned(sparsifier) == {"0.weight": 6 * 36, "3.weight": 0}
    sparsifier.sparsify_model(0.7)
    assert pruned(sparsifier) == {"0.weight": 6 * 36, "3.weight": 6 * 72}
    sparsifier.print_sparsity()
    assert "75.00%" in capsys.readouterr().out


def test_round_to_keeps_multiples():
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.Conv2d(64, 20, 3), nn.Conv2d(20, 6, 3))
    sparsifier = Sparsifier(model, "filter", "local", criteria.large_final)
    sparsifier.sparsify_model(0.7, round_to=8)
    # 64 - round(44.8) = 19 -> 24; 20 - round(14) = 6 -> 8; 6 - round(4.2) = 2 -> 8, of which there are 6
    assert [r.units - r.pruned for r in sparsifier.report().rows] == [24, 8, 6]


@pytest.mark.parametrize("keys", ["names", "modules", "globs"])
def test_a_dict_gives_each_target_its_own_and_the_others_stay_dense(keys):
    model = cnn()
    sparsity = {"names": {"0": 0.25}, "modules": {model[0]: 0.25}, "globs": {"0*": 0.25}}[keys]
    sparsifier = Sparsifier(model, "weight", "local", criteria.large_final)
    sparsifier.sparsify_model(sparsity)
    assert pruned(sparsifier) == {"0.weight": 72, "3.weight": 0, "8.weight": 0}


def test_two_four_reaches_the_pattern_and_follows_the_schedule():
    model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sparsifier = Sparsifier(model, "weight", "local", "large_final", nm=True, sparsity=0.5, schedule="lin")
    seen = []
    with attach(optimizer, sparsifier, total_steps=4):
        for _ in range(4):
            optimizer.zero_grad()
            model(torch.ones(3, 16)).sum().backward()
            optimizer.step()
            seen.append(pruned(sparsifier)["0.weight"])
    assert seen == [16, 32, 48, 64]
    for weight in (model[0].weight, model[2].weight):
        assert bool((weight.view(-1, 4).ne(0).sum(1) == 2).all())


def test_a_part_of_a_model_is_watched_in_the_whole_of_it():
    body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3))
    model = nn.Sequential(body, nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(6 * 4 * 4, 2))
    sparsifier = Sparsifier(body, "filter", sparsity=0.5)
    sparsifier.on_fit_start(Fit(total_steps=1, model=model, batch=Batch((torch.randn(2, 3, 8, 8),))))
    assert [t.name for t in sparsifier.targets] == ["0.weight", "3.weight"]


def test_it_can_be_pickled_while_it_holds():
    model = cnn()
    sparsifier = Sparsifier(model, "weight")
    sparsifier.sparsify_model(0.5)
    sparsifier.hold(torch.optim.SGD(model.parameters(), 0.1))
    assert pickle.loads(pickle.dumps(sparsifier)).sparsity.overall == 0.5


# --- what a newcomer met -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", sorted(schedules.__all__))
def test_a_lower_sparsity_than_before_is_reached_exactly_at_the_end(schedule):
    model = cnn()
    sparsifier = Sparsifier(model, "weight", "global", sparsity=0.5, schedule=schedule)
    sparsifier.sparsify_model(0.9)
    train(model, sparsifier, 20, torch.optim.SGD(model.parameters(), 0.01))
    units = sum(t.parameter.numel() for t in sparsifier.targets)
    wanted = 0 if schedule == "dsd" else round(0.5 * units)
    assert sum(pruned(sparsifier).values()) == wanted


def test_the_report_says_when_the_weights_no_longer_obey():
    model = nn.Linear(4, 2)
    sparsifier = Sparsifier(model, "weight")
    sparsifier.sparsify_model(0.5)
    assert "are not zero" not in str(sparsifier.report())
    with torch.no_grad():
        model.weight.fill_(1.0)
    (row,) = sparsifier.report().rows
    assert (row.masked, row.disobeying) == (4, 4)
    assert "4 of 4 masked weights are not zero" in str(sparsifier.report())


def test_an_optimizer_of_another_model_is_refused():
    sparsifier = Sparsifier(cnn(), "weight", sparsity=0.5)
    other = torch.optim.SGD(cnn().parameters(), 0.1)
    with pytest.raises(
        ValueError, match=r"optimizer must train the sparsifier's model, got one that holds none of its targets"
    ):
        attach(other, sparsifier, total_steps=3)
    with pytest.raises(ValueError, match="optimizer must train the sparsifier's model"):
        sparsifier.on_fit_start(Fit(3, optimizer=[other, other]))
    sparsifier.on_fit_start(Fit(3, optimizer=[other, torch.optim.SGD(sparsifier.model.parameters(), 0.1)]))
    with pytest.raises(ValueError, match="optimizer must train the sparsifier's model"):
        attach(other, sparsifier.hold(), total_steps=3)


def test_it_warns_where_every_target_makes_the_output():
    with pytest.warns(UserWarning, match=r"every target makes the model's output \(weight\)"):
        Sparsifier(nn.Linear(4, 3), "row", example_inputs=torch.randn(2, 4))


def test_it_warns_where_only_min_keep_saves_a_layer():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    with torch.no_grad():
        model[0].weight.mul_(1e-3)
    with pytest.warns(UserWarning, match=r"only min_keep keeps units of 0\.weight, which score lowest"):
        Sparsifier(model, "weight", "global").sparsify_model(0.6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": nn.Linear}, "targets must be names, globs or a predicate, got the class Linear; pass layer_type="),
        ({"data": (X, X)}, r"data must be a list or loader of batches, got a tuple; pass data=\[\(x, y\)\]"),
        ({"loss": nn.CrossEntropyLoss}, r"loss must be a function \(output, target\), got the class CrossEntropyLoss"),
    ],
)
def test_the_kind_of_an_argument_is_checked(options, message):
    with pytest.raises(TypeError, match=message):
        Sparsifier(cnn(), **options)


def test_an_unknown_target_of_the_reached_sparsity_is_answered_with_the_known():
    with pytest.raises(KeyError, match=r"'foo' is no target; the targets are weight"):
        Sparsifier(nn.Linear(4, 3)).sparsity["foo"]


def test_a_module_is_asked_for_where_one_layer_is_pruned():
    with pytest.raises(TypeError, match="m must be a module of the model, got '0'"):
        Sparsifier(cnn()).sparsify_layer("0", 0.5)


@pytest.mark.parametrize(
    ("context", "criterion"),
    [
        ("lamp", criteria.large_final),
        ("global", criteria.large_final.using(normalizer="max")),
        ("global", criteria.large_final),
    ],
)
def test_what_the_optimizer_did_to_pruned_weights_has_no_say_in_the_next_choice(context, criterion):
    def masks(moved: float):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False))
        sparsifier = Sparsifier(model, "weight", context, criterion, sparsity=0.8, schedule="lin")
        sparsifier.sparsify_model(0.3)
        sparsifier.on_fit_start(Fit(total_steps=4))
        with torch.no_grad():
            model[0].weight[~sparsifier.masks["0.weight"]] = moved
        sparsifier.after_step(0.5)
        assert sum(pruned(sparsifier).values()) == round(0.4 * 72)
        return sparsifier.masks

    assert all(torch.equal(a, b) for a, b in zip(masks(0.0).values(), masks(100.0).values(), strict=True))


# --- compiled steps -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("whole", [False, True])
def test_a_hold_follows_a_compiled_step(whole):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 4))
    sparsifier = Sparsifier(model, "weight")
    sparsifier.sparsify_model(0.5)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    handle = sparsifier.hold(optimizer)
    take = optimizer.step if whole else torch.compile(optimizer.step, backend="eager")

    def train():
        optimizer.zero_grad()
        model(torch.ones(3, 6)).square().mean().backward()
        take()

    before = model[0].bias.detach().clone()
    train = torch.compile(train, backend="eager") if whole else train
    for _ in range(3):
        train()
        assert sparsifier.report().together.disobeying == 0
        assert int((model[0].weight == 0).sum()) == 30
    assert not torch.equal(model[0].bias, before)
    handle.remove()
    train()
    assert sparsifier.report().together.disobeying > 0


# --- earlier versions --------------------------------------------------------------------------------------------------


def test_a_pickle_of_an_earlier_version_goes_on():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    sparsifier = Sparsifier(model, "weight", "local", "large_final")
    del vars(sparsifier)["_parallel"], vars(sparsifier._record)["trained"]
    again = pickle.loads(pickle.dumps(sparsifier))
    again.sparsify_model(0.5)
    again.load_state_dict(again.state_dict())
    assert again.report().together.pruned == 12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"granularity": Keep}, r"granularity must be a granularity or its name, got <class .*pass one of its values: Keep\("),
        ({"context": contexts.NM}, r"context must be a context, its name or a dict, .*pass one of its values: NM\("),
        ({"criteria": Criterion}, r"criteria must be a criterion, got the class Criterion; .*Criterion\("),
        ({"schedule": schedules.AGP}, r"schedule must be a schedule, got the class AGP; pass one of its values: AGP\("),
        (
            {"rule": DropAndGrow},
            r"rule must be a rule or its name, .*DropAndGrow\(\.\.\.\); one of your own is a frozen subclass",
        ),
        ({"rule": 3}, r"rule must be a rule or its name, got 3 \(int\); one of your own is a frozen subclass of .*Rule"),
    ],
)
def test_a_class_in_place_of_its_value_is_told_apart(options, message):
    with pytest.raises(TypeError, match=message):
        Sparsifier(cnn(), **options)


def with_a_recomputed_weight(how):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    how(model[2])
    return model


@pytest.mark.parametrize(
    ("granularity", "how", "name", "by"),
    [
        ("weight", nn.utils.parametrizations.weight_norm, "original1", "WeightNorm"),
        ("row", nn.utils.parametrizations.weight_norm, "original1", "WeightNorm"),
        ("coupled", nn.utils.parametrizations.orthogonal, "original", "Orthogonal"),
    ],
    ids=["weight", "row", "coupled"],
)
def test_a_parametrised_layer_is_left_out_with_a_note(granularity, how, name, by):
    model = with_a_recomputed_weight(how).eval()
    before = getattr(model[2].parametrizations.weight, name).detach().clone()
    sparsifier = Sparsifier(model, granularity, "local", sparsity=0.5, example_inputs=torch.randn(2, 3))
    sparsifier.sparsify_model()
    assert sparsifier.report().left_out[f"2.parametrizations.weight.{name}"] == (
        f"2 ({by} on weight) works its weight out anew in each forward pass"
    )
    assert torch.equal(getattr(model[2].parametrizations.weight, name), before)
    assert (model[4].weight == 0).any()


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("how", [nn.utils.parametrizations.weight_norm, nn.utils.weight_norm], ids=["new", "old"])
@pytest.mark.parametrize("key", ["2", "2.weight"])
def test_a_layer_with_a_weight_norm_is_known_by_its_own_name(how, key):
    model = with_a_recomputed_weight(how).eval()
    sparsifier = Sparsifier(model, "coupled", "local", sparsity={key: 0.5, "0": 0.25}, example_inputs=torch.randn(2, 3))
    sparsifier.sparsify_model()
    model(torch.randn(2, 3))
    assert int((model[2].weight == 0).all(1).sum()) == 4 and int((model[0].weight == 0).all(1).sum()) == 2


def test_coupled_channels_of_a_weight_norm_are_masked_by_their_lengths():
    model = with_a_recomputed_weight(nn.utils.parametrizations.weight_norm).eval()
    sparsifier = Sparsifier(model, "coupled", "local", sparsity=0.5, example_inputs=torch.randn(2, 3))
    sparsifier.sparsify_model()
    assert sparsifier.report().left_out == {}
    held = model[2].parametrizations.weight
    gone = (held.original0 == 0).flatten()
    assert int(gone.sum()) == 4
    assert not (held.original1 == 0).all(1).any()  # a row that is all zero has no direction
    assert torch.equal((model[:3](torch.randn(5, 3)) == 0).all(0), gone)


@pytest.mark.parametrize("granularity", ["weight", "row", "coupled"])
@pytest.mark.parametrize("how", [nn.utils.parametrizations.weight_norm, nn.utils.spectral_norm], ids=["new", "old"])
def test_a_parametrisation_added_afterwards_is_named(granularity, how):
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    sparsifier = Sparsifier(model, granularity, "local", sparsity=0.5, example_inputs=torch.randn(2, 3))
    how(model[2])
    for call in (sparsifier.sparsify_model, sparsifier.report, lambda: sparsifier.masks):
        with pytest.raises(
            ValueError, match=r"model must keep .*, got 2 \(\w+\) without its weight; remove what recomputes it"
        ):
            call()
