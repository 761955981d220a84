import copy
import io
import itertools
import warnings
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fasterai.callbacks.plain import Handle, attach
from fasterai.core.criteria import large_final
from fasterai.core.loop import Participant
from fasterai.prune.gradual import GradualPruner
from fasterai.sparse.sparsifier import Sparsifier
from fasterai.sparse.tickets.lottery import LotteryTicket
from tests.networks import perceptron

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
}


small = partial(perceptron, 6, 10, 4)


def batches(n: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(8, 6, generator=g), torch.randint(4, (8,), generator=g)) for _ in range(n)]


def step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    optimizer.step()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, handle: Handle, n: int, error: type | None = None) -> None:
    with handle:
        for batch in batches(n):
            step(model, optimizer, batch)
        if error is not None:
            raise error


def linear(sparsity: float = 0.5, model: nn.Module | None = None, **options: object) -> tuple[nn.Module, Sparsifier]:
    model = small() if model is None else model
    return model, Sparsifier(
        model, "weight", "local", options.pop("criteria", "large_final"), sparsity=sparsity, schedule=lambda p: p, **options
    )


def zeros(model: nn.Module) -> list[int]:
    return [int((p == 0).sum()) for p in model.parameters() if p.dim() > 1]


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_follows_the_optimizer_and_ends_exactly(make):
    model, sparsifier = linear(0.5)
    optimizer = make(model.parameters())
    handle = attach(optimizer, sparsifier, total_steps=10)
    seen = []
    for batch in batches(10):
        step(model, optimizer, batch)
        seen.append(zeros(model))
    # 60 and 40 weights at 0.05, 0.1, ..., 0.5
    assert seen == [[3 * k, 2 * k] for k in range(1, 11)]
    handle.remove()
    assert zeros(model) == [30, 20]


def test_the_position_is_the_one_after_the_step():
    class Notes(Participant):
        def __init__(self):
            self.seen = []

        def before_step(self, position):
            self.seen.append(("before", position))

        def after_step(self, position):
            self.seen.append(("after", position))

    model, notes = small(), Notes()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attach(optimizer, notes, total_steps=4)
    for batch in batches(4):
        step(model, optimizer, batch)
    assert notes.seen == [(when, p) for p in (0.25, 0.5, 0.75, 1.0) for when in ("before", "after")]


@pytest.mark.parametrize(
    ("total", "error", "message"),
    [
        (0, ValueError, "total_steps must be at least 1, got 0"),
        (-3, ValueError, "total_steps must be at least 1, got -3"),
        (2.5, TypeError, "total_steps must be a whole number of at least 1, got 2.5"),
        (True, TypeError, "total_steps must be a whole number of at least 1, got True"),
        (float("inf"), ValueError, "total_steps must be a finite whole number of at least 1, got inf"),
    ],
)
def test_total_steps_out_of_range(total, error, message):
    model, sparsifier = linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(error, match=message):
        attach(optimizer, sparsifier, total_steps=total)
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks


def test_a_step_beyond_total_steps_raises_before_a_weight_changes():
    model, sparsifier = linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    attach(optimizer, sparsifier, total_steps=2)
    data = batches(3)
    step(model, optimizer, data[0])
    step(model, optimizer, data[1])
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        ValueError, match=r"total_steps must be at least the number of steps taken, got 2 and a further step.*remove"
    ):
        step(model, optimizer, data[2])
    assert all(torch.equal(before[n], x) for n, x in model.state_dict().items())


def state_of(half: Callable[[nn.Module], Participant]) -> tuple[nn.Module, Handle, dict]:
    """A run of a model at half its way, and its state."""
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    handle = attach(torch.optim.SGD(model.parameters(), lr=0.1), half(model), total_steps=4)
    return model, handle, handle.state_dict()


def masks_of(sparsity=0.8, criteria="large_final", schedule="one_cycle"):
    return lambda model: Sparsifier(model, "weight", "local", criteria, sparsity=sparsity, schedule=schedule)


def removals_of(ratio=0.5, criteria="large_final", schedule="lin"):
    return lambda model: GradualPruner(model, ratio, "local", criteria, schedule, example_inputs=torch.ones(2, 6))


OTHERS = [
    (masks_of(), masks_of(0.9, schedule="agp"), r"a Sparsifier with .*: sparsity was 0\.8 and is 0\.9; schedule was OneCycle"),
    (masks_of(), masks_of({"0.weight": 0.5}), r"sparsity was 0\.8 and is PerTarget\(.*0\.5"),
    (removals_of(), removals_of(0.3, "random"), r"a GradualPruner with .*: pruning_ratio was 0\.5 and is 0\.3; criteria was"),
]


@pytest.mark.parametrize(("before", "now", "message"), OTHERS)
def test_a_state_of_other_arguments_is_said(before, now, message):
    _, first, state = state_of(before)
    _, second, _ = state_of(now)
    with pytest.warns(UserWarning, match=message):
        second.load_state_dict(state)
    first.remove(completed=False)
    second.remove(completed=False)


def test_nothing_is_said_of_the_same_arguments_in_other_words_nor_outside_of_a_run():
    given = [masks_of(), masks_of(criteria=large_final), removals_of(), removals_of(criteria=large_final)]
    given += [masks_of(criteria=lambda w: w.abs()), masks_of(criteria=lambda w: w.abs())]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for before, now in zip(given[::2], given[1::2], strict=True):
            _, first, state = state_of(before)
            _, second, _ = state_of(now)
            second.load_state_dict(state)
            first.remove(completed=False)
            second.remove(completed=False)
        model, handle, state = state_of(masks_of())
        handle.remove(completed=False)
        Sparsifier(model, "weight", criteria="random").load_state_dict(state["participants"]["Sparsifier"])  # to be held


COUNTS = {"epochs": 2, "steps_per_epoch": 2, "accumulate": 2}  # 2 steps


def test_a_step_too_many_names_the_counts_that_were_given():
    model, sparsifier = linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = attach(optimizer, sparsifier, **COUNTS)
    for _ in range(2):
        step(model, optimizer, batches(1)[0])
    given = "epochs=2, steps_per_epoch=2 and accumulate=2"
    wanted = (
        f"^{given} must make at least the number of steps taken, got 2 and a further step; accumulate is the number of batches"
    )
    with pytest.raises(ValueError, match=wanted):
        step(model, optimizer, batches(1)[0])
    with pytest.raises(ValueError, match=f"^{given} must make at least the 3 steps of the state, got 2"):
        handle.load_state_dict({**handle.state_dict(), "step": 3})
    handle.remove()
    assert repr(handle) == "<Handle: step 2 of 2; Sparsifier>"


def test_a_run_that_ends_short_names_them_too():
    model, sparsifier = linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = attach(optimizer, sparsifier, **COUNTS)
    step(model, optimizer, batches(1)[0])
    with pytest.warns(UserWarning, match="epochs=2, steps_per_epoch=2 and accumulate=2 make 2 steps; total_steps counts"):
        handle.remove()


@pytest.mark.parametrize("optimizer", [None, "sgd", nn.Linear(1, 1)])
def test_optimizer_of_another_type(optimizer):
    with pytest.raises(TypeError, match=r"optimizer must be a torch\.optim\.Optimizer, got"):
        attach(optimizer, linear()[1], total_steps=1)


@pytest.mark.parametrize("participants", [(), ("sparsifier",), (nn.Linear(1, 1),)])
def test_participants_of_another_type(participants):
    optimizer = torch.optim.SGD(small().parameters(), lr=0.1)
    with pytest.raises(TypeError, match="participants must be participants in training"):
        attach(optimizer, *participants, total_steps=1)


def test_remove_leaves_the_optimizer_as_it_was_and_later_steps_free():
    model, sparsifier = linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    handle = attach(optimizer, sparsifier, total_steps=2)
    for batch in batches(2):
        step(model, optimizer, batch)
    handle.remove()
    handle.remove()
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks
    step(model, optimizer, batches(1)[0])
    assert zeros(model) != [30, 20]


@pytest.mark.parametrize(("completed", "expected"), [(None, [12, 8]), (False, [12, 8]), (True, [30, 20])])
def test_remove_before_the_end(completed, expected):
    model, sparsifier = linear(0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = attach(optimizer, sparsifier, total_steps=10)
    for batch in batches(4):
        step(model, optimizer, batch)
    handle.remove(completed)
    assert zeros(model) == expected


def test_context_manager_ends_the_run_after_an_error_too():
    model, sparsifier = linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(KeyboardInterrupt):
        train(model, optimizer, handle := attach(optimizer, sparsifier, total_steps=10), 1, KeyboardInterrupt)
    assert isinstance(handle, Handle)
    assert not handle.loop.running and not optimizer._optimizer_step_post_hooks
    assert zeros(model) == [3, 2]


class Nested(torch.optim.SGD):
    """Calls its base class's step, for which torch runs the hooks as well, and writes into the weights after it."""

    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                p.data += 0.01


def test_a_step_within_a_step_counts_once_and_masks_hold_after_both():
    torch.optim.SGD([nn.Parameter(torch.zeros(1))])  # from now on SGD.step itself runs hooks
    model, sparsifier = linear()
    optimizer = Nested(model.parameters(), lr=0.1)
    with attach(optimizer, sparsifier, total_steps=10):
        for k, batch in enumerate(batches(10), 1):
            step(model, optimizer, batch)
            assert zeros(model) == [3 * k, 2 * k]


class Failing(torch.optim.Optimizer):
    """Fails in its third step, after it has written into the weights."""

    def __init__(self, parameters):
        super().__init__(parameters, {})
        self.steps = 0

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p -= 0.1 * (p.grad + 0.1)
        self.steps += 1
        if self.steps == 3:
            raise KeyboardInterrupt


def test_an_interrupted_step_leaves_masked_weights_zero():
    model, sparsifier = linear()
    optimizer = Failing(model.parameters())
    with pytest.raises(KeyboardInterrupt):
        train(model, optimizer, attach(optimizer, sparsifier, total_steps=10), 10)
    assert zeros(model) == [6, 4]


def test_a_second_run_starts_clean():
    model, sparsifier = linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(RuntimeError):
        train(model, optimizer, attach(optimizer, sparsifier, total_steps=4), 3, RuntimeError)
    assert zeros(model) == [22, 15]  # 0.375 of 60 and of 40; 22.5 rounds to even
    fresh = small(seed=7).state_dict()
    model.load_state_dict(fresh)
    with attach(optimizer, sparsifier, total_steps=10):
        for k, batch in enumerate(batches(10), 1):
            step(model, optimizer, batch)
            assert zeros(model) == [3 * k, 2 * k]


def save(model, optimizer, handle):
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "handle": handle.state_dict()}, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize(
    ("criteria", "granularity"),
    [
        *itertools.product(["large_final", "movement", "updating_movement", "taylor"], ["weight", "row"]),
        ("variety(updating_movement)", "row"),
    ],
)
@pytest.mark.parametrize("stops", [(3,), (2, 5), (1, 4, 7)])
def test_resume_is_bit_for_bit(criteria, granularity, stops):
    def run(stops):
        model = small()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        sparsifier = Sparsifier(model, granularity, "global", criteria, sparsity=0.6, schedule="agp", targets="*weight")
        handle = attach(optimizer, sparsifier, total_steps=10)
        for k, batch in enumerate(batches(10)):
            if k in stops:
                state = save(model, optimizer, handle)
                kept = copy.deepcopy(state["handle"])
                model = small(seed=k)
                model.load_state_dict(state["model"])
                optimizer = torch.optim.Adam(model.parameters(), lr=0.5)
                optimizer.load_state_dict(state["optimizer"])
                sparsifier = Sparsifier(model, granularity, "global", criteria, sparsity=0.6, schedule="agp", targets="*weight")
                handle = attach(optimizer, sparsifier, total_steps=10)
                handle.load_state_dict(state["handle"])
                assert_same_state(kept, state["handle"])
            step(model, optimizer, batch)
        handle.remove()
        return model.state_dict(), sparsifier.masks

    once, again = run(()), run(stops)
    for a, b in zip(once, again, strict=True):
        assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def assert_same_state(a, b):
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same_state(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same_state(x, y)
    else:
        assert a == b


def test_resume_with_a_state_saved_after_an_interrupted_run():
    def run(interrupt):
        model, sparsifier = linear()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        handle = attach(optimizer, sparsifier, total_steps=10)
        for k, batch in enumerate(batches(10)):
            if k == 4 and interrupt:
                handle.remove()
                state = handle.state_dict()
                handle = attach(optimizer, sparsifier, total_steps=10)
                handle.load_state_dict(state)
            step(model, optimizer, batch)
            assert zeros(model) == [3 * (k + 1), 2 * (k + 1)]
        return model.state_dict()

    once, again = run(interrupt=False), run(interrupt=True)
    assert all(torch.equal(once[n], again[n]) for n in once)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, r"state must be what state_dict\(\) returned, got one with nothing"),
        ({"model": 1}, r"state must be what state_dict\(\) returned, got one with model"),
        ([1], r"state must be what state_dict\(\) returned, got \[1\]"),
        ({"step": 1, "participants": []}, "state must hold 1 participants, got 0"),
        ({"step": 11, "participants": [{}]}, "total_steps must be at least the 11 steps of the state, got 10"),
        ({"step": 1, "participants": [{}]}, r"state must be what Sparsifier\.state_dict\(\) returned"),
    ],
)
def test_a_foreign_state_is_refused(state, message):
    model, sparsifier = linear()
    handle = attach(torch.optim.SGD(model.parameters(), lr=0.1), sparsifier, total_steps=10)
    with pytest.raises(ValueError, match=message):
        handle.load_state_dict(state)
    assert handle.loop.step == 0


def test_a_refused_state_changes_no_participant():
    model = small()
    first, second = (Sparsifier(model, sparsity=0.5, targets=f"{i}.weight") for i in (0, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = attach(optimizer, first, second, total_steps=2)
    good = handle.state_dict()
    step(model, optimizer, batches(1)[0])
    before = handle.state_dict()
    with pytest.raises(ValueError, match=r"0\.weight"):
        handle.load_state_dict({**good, "participants": [good["participants"]["Sparsifier"]] * 2})
    assert_same_state(before, handle.state_dict())


def test_two_participants_take_part_in_one_run():
    model = small()
    first = Sparsifier(model, sparsity=0.5, schedule=lambda p: p, targets="0.weight")
    second = Sparsifier(model, "row", sparsity=0.5, schedule="one_shot", targets="2.weight")
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    with attach(optimizer, first, second, total_steps=4):
        for batch in batches(4):
            step(model, optimizer, batch)
    assert zeros(model) == [30, 20]
    assert (model[2].weight == 0).all(1).sum() == 2


def test_a_participant_that_refuses_ends_the_run_of_the_others():
    class Begun(Participant):
        ended = None

        def on_fit_end(self, completed):
            self.ended = completed

    begun = Begun()
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="sparsity must be given"):
        attach(optimizer, begun, Sparsifier(model), total_steps=3)
    assert begun.ended is False
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks


def test_lottery_ticket_rewinds_and_clears_the_optimizer():
    model = small()
    early = copy.deepcopy(model.state_dict())
    sparsifier = Sparsifier(model, sparsity=0.5, schedule="one_shot")  # at half of the run
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    attach(optimizer, sparsifier, LotteryTicket(sparsifier), total_steps=4)
    for batch in batches(2):
        step(model, optimizer, batch)
    assert sparsifier.moves == 1
    masks = sparsifier.masks
    for name, value in model.state_dict().items():
        assert torch.equal(value, early[name] * masks.get(name, 1))
    assert not optimizer.state


def test_nothing_is_left_on_the_model_and_its_keys_stay():
    model, sparsifier = linear()
    keys, attributes = list(model.state_dict()), [set(vars(m)) for m in model.modules()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def check():
        assert list(model.state_dict()) == keys
        assert [set(vars(m)) for m in model.modules()] == attributes
        assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())
        copy.deepcopy(model)

    with attach(optimizer, sparsifier, total_steps=2):
        check()
        for batch in batches(2):
            step(model, optimizer, batch)
            check()
    check()


def test_accumulation_and_a_closure_need_nothing():
    model, sparsifier = linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = batches(8)
    with attach(optimizer, sparsifier, total_steps=4):
        for k, (x, y) in enumerate(data):
            F.cross_entropy(model(x), y).backward()
            if k % 2:
                optimizer.step()
                optimizer.zero_grad()
    assert zeros(model) == [30, 20]

    model, sparsifier = linear()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=2)

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(data[0][0]), data[0][1])
        loss.backward()
        return loss

    with attach(optimizer, sparsifier, total_steps=2):
        optimizer.step(closure)
        optimizer.step(closure)
    assert zeros(model) == [30, 20]


def test_a_run_that_is_still_attached_ends_when_another_begins():
    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    first = attach(optimizer, Sparsifier(model, "weight", sparsity=0.5), total_steps=10)
    optimizer.step()
    with pytest.warns(UserWarning, match="an earlier run was still attached to this optimizer, at step 1 of 10"):
        attach(optimizer, Sparsifier(model, "weight", sparsity=0.5), total_steps=1)
    optimizer.step()
    assert not first.loop.running


# --- compiled steps -----------------------------------------------------------------------------------------------------


def compiled_step(model, optimizer):
    take = torch.compile(optimizer.step, backend="eager")

    def train(batch):
        optimizer.zero_grad()
        F.cross_entropy(model(batch[0]), batch[1]).backward()
        take()

    return train


def compiled_training(model, optimizer):
    return torch.compile(lambda batch: step(model, optimizer, batch), backend="eager")


@pytest.mark.parametrize("compiled", [compiled_step, compiled_training])
def test_a_compiled_step_is_followed_like_any_other(compiled):
    def run(make):
        torch._dynamo.reset()
        model, sparsifier = linear(0.5)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        take = make(model, optimizer)
        take(batches(1)[0])  # what is compiled before the run takes part in it too
        found = []
        with attach(optimizer, sparsifier, total_steps=5):
            for batch in batches(5):
                take(batch)
                found.append(zeros(model))
        take(batches(1)[0])
        return found, zeros(model), model

    found, after, model = run(compiled)
    assert found == [[6, 4], [12, 8], [18, 12], [24, 16], [30, 20]]  # of 60 and 40 weights, a tenth more at each step
    assert sum(after) < 50  # nothing is held once the run is over
    plain = run(lambda model, optimizer: lambda batch: step(model, optimizer, batch))[2]
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-5)


def test_a_model_among_the_participants_is_named_in_a_line():
    model = small()
    with pytest.raises(TypeError, match=r"such as a Sparsifier, got .*Sequential") as found:
        attach(torch.optim.SGD(model.parameters(), lr=0.1), model, total_steps=1)
    assert "\n" not in str(found.value)
