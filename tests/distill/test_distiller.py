"""The distiller in a plain loop: what is trained on, what is left behind, what goes on."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fasterai.callbacks.plain import attach
from fasterai.core.loop import Fit, Loop, Participant
from fasterai.distill.average import EMATeacher
from fasterai.distill.distiller import Distiller
from fasterai.distill.losses.features import Attention, FitNet, Similarity
from fasterai.prune.gradual import GradualPruner
from fasterai.sparse.sparsifier import Sparsifier
from tests.distill.nets import CLASSES, FIT, Distance, Labelled, Named, Run, X, Y, equal, fitnet, hooks, net


def teacher() -> nn.Sequential:
    return net(6, seed=1)


# --- the loss -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [0.0, 0.25, 1.0])
def test_the_loss_is_the_mixture_by_hand(weight):
    """With pairs as they are given, and several losses added up with their scale."""
    student, other = net(), teacher()
    layers = {"activations_student": ["2", "0"], "activations_teacher": ["0", "2"]}
    d = Distiller(other, [Distance(scale=2.0), Attention(scale=3.0)], **layers, weight=weight)
    run = Run(d, student)
    with torch.no_grad():
        outputs, wanted = student(X[0]), other(X[0])
    mine = [student[0](X[0]), student[2](student[1](student[0](X[0])))]
    theirs = [other[0](X[0]), other[2](other[1](other[0](X[0])))]
    value = 2 * (outputs - wanted).square().sum(1).mean() + 3 * Attention()([mine[1], mine[0]], theirs)
    expected = (1 - weight) * F.cross_entropy(outputs, Y[0]) + weight * value
    loss = run.loss(0)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    run.optimizer.step()
    assert run.handle.metrics()["distill_loss"] == pytest.approx(float(value.detach()), rel=1e-5)
    run.handle.remove(False)


def test_one_layer_of_the_teacher_may_stand_for_two_of_the_student():
    """D-K3: the second pair was dropped."""
    other = teacher()
    both = Distiller(other, Attention(), ["0", "2"], ["2", "2"], weight=1.0)
    first, second = (Distiller(other, Attention(), [name], ["2"], weight=1.0) for name in ("0", "2"))
    a, b, c = (float(Run(d, net()).loss(0).detach()) for d in (both, first, second))
    assert a == pytest.approx(b + c, rel=1e-5)


def test_the_order_of_participants_that_change_the_loss_decides_nothing():
    """D-K6."""

    class Adds(Participant):
        def after_loss(self, loss, batch):
            return loss + 2.0

    values = [
        float(_first(ps)) for ps in ([Adds(), Distiller(teacher(), Distance())], [Distiller(teacher(), Distance()), Adds()])
    ]
    assert values[0] == pytest.approx(values[1])


def _first(participants) -> torch.Tensor:
    student = net()
    optimizer = torch.optim.SGD(student.parameters(), 0.1)
    handle = attach(optimizer, *participants, total_steps=1, model=student)
    outputs = student(X[0])
    loss = handle.loss(F.cross_entropy(outputs, Y[0]), X[0], Y[0], outputs)
    handle.remove(False)
    return loss.detach()


def test_the_schedule_is_at_the_position_of_the_step_under_way_for_all_of_its_batches():
    """Two batches make a step; positions are 1/2 and 1."""
    student, seen = net(), []
    d = Distiller(teacher(), Distance(), weight=0.8, schedule=lambda position: seen.append(position) or position)
    optimizer = torch.optim.SGD(student.parameters(), 0.0)
    with attach(optimizer, d, epochs=1, steps_per_epoch=4, accumulate=2, model=student) as handle:
        for i in range(4):
            outputs = student(X[0])
            task = F.cross_entropy(outputs, Y[0])
            loss = handle.loss(task, X[0], Y[0], outputs)
            value = (outputs - d.teacher.model(X[0])).square().sum(1).mean()
            torch.testing.assert_close(loss, task + 0.8 * (0.5, 0.5, 1.0, 1.0)[i] * (value - task))
            (loss / 2).backward()
            if i % 2:
                optimizer.step()
    assert seen == [0.5, 0.5, 1.0, 1.0]
    with pytest.raises(ValueError, match=r"what the schedule returns must be in \[0, 1\], got 1.5"):
        Run(Distiller(teacher(), Distance(), schedule=lambda position: 1.5)).loss(0)


def test_an_error_of_the_teacher_says_that_it_is_its():
    run = Run(Distiller(nn.Sequential(nn.Flatten(), nn.Linear(5, CLASSES)), Distance()))
    with pytest.raises(RuntimeError, match="mat1 and mat2") as caught:
        run.loss(0)
    assert "raised while the teacher answered, <NetworkTeacher: Sequential>" in caught.value.__notes__


@pytest.mark.parametrize("output", [lambda x: x, lambda x: (x, 1), lambda x: {"logits": x}])
def test_results_of_any_kind_and_several_inputs(output):
    """D-K5; and D-K4: the student has an attribute called `model`."""
    student, other = Named(output), Named(lambda x: x, width=6)
    d = Distiller(other, [Distance(), FitNet()], ["model.1"], ["model.1"])
    optimizer = torch.optim.SGD(student.parameters(), 0.1)
    with attach(optimizer, d, total_steps=1, model=student) as handle:
        outputs = student(X[0], 2.0)
        loss = handle.loss(student.model(X[0]).sum() * 0, (X[0], 2.0), (Y[0],), outputs)
        loss.backward()
        optimizer.step()
    assert student.model[0].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("outside", [False, True])
def test_autocast_inside_and_outside_of_the_forward_pass(outside):
    student, other = net(), teacher()
    d = Distiller(other, [Distance(), FitNet()], **FIT)
    optimizer = torch.optim.SGD(student.parameters(), 0.1)
    with attach(optimizer, d, total_steps=1, model=student) as handle:
        with torch.autocast("cpu", torch.bfloat16):
            outputs = student(X[0])
            loss = handle.loss(F.cross_entropy(outputs, Y[0]), X[0], Y[0], outputs) if outside else None
        if loss is None:
            loss = handle.loss(F.cross_entropy(outputs.float(), Y[0]), X[0], Y[0], outputs)
        assert loss.dtype == torch.float32
        loss.backward()
        (weight, *_) = optimizer.param_groups[0]["params"][-2:]
        assert weight.dtype == torch.float32 and weight.grad.abs().sum() > 0
        optimizer.step()


def test_a_scaler_scales_the_adapters_gradients_with_the_others():
    finals = []
    for scales in (False, True):
        run = Run(fitnet())
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scales)
        for i in (0, 1):
            run.optimizer.zero_grad()
            scaler.scale(run.loss(i)).backward()
            scaler.step(run.optimizer)
            scaler.update()
        finals.append(run.values())
        run.handle.remove(False)
    for a, b in zip(*finals, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_loop_that_clears_the_models_gradients_goes_on_after_a_skipped_step():
    """The adapters' infinite gradients stayed, and every later step was skipped as well."""
    run, scaler = Run(fitnet()), torch.amp.GradScaler("cpu", init_scale=4.0)
    for i, factor in enumerate((1.0, float("inf"), 1.0, 1.0)):
        run.student.zero_grad()
        scaler.scale(run.loss(i) * factor).backward()
        scaler.step(run.optimizer)
        scaler.update()
    assert run.handle.loop.step == 3 and scaler.get_scale() == 2.0
    run.handle.remove(False)


@pytest.mark.parametrize("compiles", ["student", "teacher"])
def test_compiled_networks_train_as_plain_ones(compiles):
    torch._dynamo.reset()  # what other tests have compiled may keep the compiler from looking again
    losses = []
    for wrap in (lambda m: m, lambda m: torch.compile(m, backend="eager")):
        student, other = net(), teacher()
        one = wrap(student if compiles == "student" else other)
        one(X[0])  # compiled before there are hooks
        student[1].reset_running_stats()
        other[1].reset_running_stats()
        run = Run(fitnet(one if compiles == "teacher" else other, Distance()), one if compiles == "student" else student)
        losses.append(run.steps(0, 1).losses)
        run.handle.remove(False)
    torch._dynamo.reset()
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_step_waits_for_no_device(monkeypatch):
    """After the first batch no value of a tensor is asked for until figures are shown."""
    run = Run(fitnet(None, Distance()))
    run.step(0)
    student = run.student
    outputs = student(X[1])
    task = F.cross_entropy(outputs, Y[1])

    def ask(*_):
        raise AssertionError("a value was asked for")

    with monkeypatch.context() as patch:
        for name in ("item", "__bool__", "__float__", "__int__", "tolist", "numpy", "cpu"):
            patch.setattr(torch.Tensor, name, ask)
        loss = run.handle.loss(task, X[1], Y[1], outputs)
        loss.backward()
        run.distiller.after_step(0.5)
    assert run.handle.metrics()["distill_loss"] > 0
    run.handle.remove(False)


# --- what is left -------------------------------------------------------------------------------------------------------


class Stops(Participant):
    def __init__(self, error: BaseException | None) -> None:
        self.error = error

    def after_loss(self, loss, batch):
        if self.error is not None:
            raise self.error
        return loss


@pytest.mark.parametrize("end", ["completed", "stopped", "error", "interrupt", "refused", "dropped", "unknown layer"])
def test_both_networks_are_as_they_were_after_every_end(end):
    """D-K1 and D-K5."""
    student, other = net(), teacher()
    other[1].eval()
    before = copy.deepcopy(other.state_dict())
    modes = [m.training for m in other.modules()]
    layers = {**FIT, "activations_student": ["nine"]} if end == "unknown layer" else FIT
    d = Distiller(other, [Distance(), FitNet()], **layers)
    optimizer = torch.optim.Adam(student.parameters(), 0.01)
    error = {"error": RuntimeError("no"), "interrupt": KeyboardInterrupt()}.get(end)

    class Refuses(Participant):
        def on_fit_start(self, fit):
            raise RuntimeError("no")

    others = [Refuses()] if end == "refused" else [Stops(error)]
    try:
        with attach(optimizer, d, *others, total_steps=1 if end == "completed" else 9, model=student) as handle:
            outputs = student(X[0])
            handle.loss(F.cross_entropy(outputs, Y[0]), X[0], Y[0], outputs).backward()
            optimizer.step()
            assert not other.training and hooks(student) == hooks(other) == 1
            if end == "dropped":
                raise StopIteration
            handle.remove(completed=end == "completed")
    except (RuntimeError, KeyboardInterrupt, ValueError, StopIteration):
        assert end not in ("completed", "stopped")
    if end != "dropped":
        assert len(optimizer.param_groups[0]["params"]) == len(list(student.parameters()))
    assert [m.training for m in other.modules()] == modes and hooks(student) == hooks(other) == 0
    assert all(torch.equal(x, before[n]) for n, x in other.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in other.parameters())
    assert list(student.state_dict()) == list(net().state_dict())


@pytest.mark.filterwarnings("ignore:the run ends")
def test_a_run_whose_handle_and_optimizer_are_gone_leaves_nothing():
    student, other = net(), teacher()
    d = fitnet(other)
    run = Run(d, student).steps(0)
    run.optimizer.zero_grad()
    del run
    gc.collect()
    assert other.training and hooks(student) == hooks(other) == 0
    assert Run(d, student).steps(0, 1).losses  # and the distiller may be used again


def test_nothing_of_a_step_is_held_after_it():
    run = Run(fitnet(None, Distance()))
    run.step(0)
    found = []
    run.student[1].register_forward_hook(lambda layer, inputs, outputs: found.append(weakref.ref(outputs)))
    run.distiller.teacher.model[1].register_forward_hook(lambda layer, inputs, outputs: found.append(weakref.ref(outputs)))
    outputs = run.student(X[1])
    loss = run.handle.loss(F.cross_entropy(outputs, Y[1]), X[1], Y[1], outputs)
    found.append(weakref.ref(outputs))
    run.optimizer.zero_grad()
    loss.backward()
    run.optimizer.step()
    del outputs, loss
    gc.collect()
    assert len(found) == 3 and [one() for one in found] == [None] * 3
    run.handle.remove(False)


def test_what_a_further_pass_of_the_student_leaves_is_forgotten_with_the_step():
    """As one that activation checkpointing runs again in the backward pass."""
    run, found = Run(fitnet()), []
    loss = run.loss(0)
    run.student[1].register_forward_hook(lambda layer, inputs, outputs: found.append(weakref.ref(outputs)))
    run.student(X[1])
    assert found[0]() is not None
    loss.backward()
    run.optimizer.step()
    assert found[0]() is None
    run.handle.remove(False)


def test_random_numbers_of_the_loop_are_those_without_it():
    torch.manual_seed(3)
    run = Run(fitnet(), net())
    torch.manual_seed(3)
    run.loss(0)
    assert torch.equal(torch.rand(2), torch.manual_seed(3) and torch.rand(2))
    run.handle.remove(False)


@pytest.mark.parametrize("running", [False, True])
def test_it_can_be_copied_and_pickled(running):
    run = Run(fitnet(None, Distance(), schedule="cos"))
    run.steps(0)
    if not running:
        run.handle.remove(False)
    want = run.distiller.state_dict()
    for one in (copy.deepcopy(run.distiller), pickle.loads(pickle.dumps(run.distiller))):
        assert equal([*one.state_dict()["adapters"][0].values()], [*want["adapters"][0].values()])
        assert repr(one) == repr(run.distiller)
    copied = copy.deepcopy(run.student)
    assert list(copied.state_dict()) == list(run.student.state_dict())
    torch.save(run.student, io.BytesIO())
    run.handle.remove(False)


# --- going on -----------------------------------------------------------------------------------------------------------

MADE = {
    "adapters": lambda: fitnet(None, Distance(), schedule="cos"),
    "average": lambda: Distiller(EMATeacher(0.9), [Distance(), FitNet()], **FIT),
    "several": lambda: Distiller([teacher(), EMATeacher(0.5)], Distance(), schedule="lin"),
}


@pytest.mark.parametrize("made", MADE.values(), ids=MADE)
@pytest.mark.parametrize("stops", [[2], [1, 2, 3]])
def test_a_resumed_run_is_the_same_bit_for_bit(made, stops):
    whole = Run(made()).steps(0, 1, 2, 3)
    run, first = Run(made()), 0
    for stop in stops:
        run.steps(*range(first, stop))
        state = run.saved()
        run.handle.remove(False)
        run, first = Run(made(), net(seed=8)).load(state), stop
        again = run.saved()["h"]["participants"]["Distiller"]  # before the first batch
        assert str(again) == str(state["h"]["participants"]["Distiller"])
    run.steps(*range(first, 4))
    assert equal(run.values(), whole.values())
    assert run.handle.metrics() == whole.handle.metrics()
    for one in (run, whole):
        one.handle.remove()


def test_a_state_may_come_in_the_middle_of_a_run():
    whole = Run(fitnet(None, Distance())).steps(0, 1)
    state = whole.saved()
    other = Run(fitnet(None, Distance()), net(seed=8)).steps(5, 6, 7).load(state)
    assert equal([x.cpu() for x in other.steps(2, 3).values()], whole.steps(2, 3).values())
    other.handle.remove()
    whole.handle.remove()


@pytest.mark.parametrize("side", ["features", "others", 0, 1])
def test_a_state_of_another_number_of_layers_is_refused_before_a_batch_comes(side):
    first = Run(fitnet()).steps(0)
    run, state = Run(fitnet()), first.distiller.state_dict()
    shapes = state["following"]["first"][side] if isinstance(side, int) else state["following"][side]
    shapes.append(shapes[-1])
    before = run.distiller.state_dict()
    with pytest.raises(ValueError, match="state must be of 1 pairs of layers, got one of 2"):
        run.distiller.load_state_dict(state)
    assert str(run.distiller.state_dict()) == str(before)
    run.steps(0).handle.remove(False)
    first.handle.remove(False)


BAD = {
    "step": (-1, ValueError, "state's step must be at least 0, got -1"),
    "adapters": ([None, None, None], ValueError, "state must be of 1 losses, got 3"),
    "following": ({}, ValueError, "state must be what Distiller.state_dict"),
    "teacher": (3, TypeError, "state's teacher must be a dict, got 3"),
    "sum": (1.0, TypeError, "state's sum must be a tensor, got 1.0"),
    "count": (1.5, TypeError, "state's count must be a whole number"),
}


@pytest.mark.parametrize("key", [*BAD, "missing", "shape"])
def test_bad_states_are_refused_and_change_nothing(key):
    run = Run(fitnet()).steps(0)
    before, state = run.distiller.state_dict(), run.distiller.state_dict()
    value, error, message = BAD.get(key, (None, ValueError, "state must be"))
    if key == "missing":
        del state["step"]
    elif key == "shape":
        state["adapters"] = [{"layers.0.weight": torch.ones(2, 2)}]
    else:
        state[key] = value
    with pytest.raises(error, match=message):
        run.distiller.load_state_dict(state)
    assert str(run.distiller.state_dict()) == str(before)
    run.handle.remove(False)


def test_a_further_run_goes_on_with_the_adapters_and_another_student_begins_afresh():
    d = fitnet()
    run = Run(d).steps(0, 1, 2, 3)
    values = [x.detach().clone() for x in run.adapters]
    run.handle.remove()
    again = Run(d, run.student)
    again.loss(0)
    assert equal(again.adapters, values)
    again.handle.remove(False)
    other = Run(d, net(5)).steps(0)
    assert [tuple(x.shape) for x in other.adapters] == [(6, 5, 1, 1), (6,)]
    other.handle.remove(False)


# --- pruning while distilling -------------------------------------------------------------------------------------------


def test_self_distillation_while_weights_go():
    student = net()
    dense = copy.deepcopy(student)
    sparsifier = Sparsifier(student, "weight", "local", "large_final", sparsity=0.5, schedule="lin")
    run = Run(Distiller(dense, [Distance(), FitNet()], **FIT), student, sparsifier).steps(0, 1, 2, 3)
    run.handle.remove()
    assert sparsifier.sparsity.overall == pytest.approx(0.5, abs=0.02)
    assert all(torch.equal(a, b) for a, b in zip(dense.parameters(), net().parameters(), strict=True))


def pruned(which: str, distiller_first: bool) -> Run:
    student = net(8)
    who = {"dense": copy.deepcopy(student), "average": EMATeacher(0.9), "other": teacher()}[which]
    pruner = GradualPruner(student, 0.5, "local", "large_final", "lin", example_inputs=X[0])
    d = Distiller(who, [FitNet(), Distance(), Similarity()], **FIT)
    run = Run.__new__(Run)
    run.student, run.distiller, run.losses = student, d, []
    run.optimizer = torch.optim.Adam(student.parameters(), 1e-2)
    both = [d, pruner] if distiller_first else [pruner, d]
    run.handle = attach(run.optimizer, *both, total_steps=4, model=student)
    return run


@pytest.mark.parametrize("distiller_first", [False, True])
@pytest.mark.parametrize("which", ["dense", "average", "other"])
def test_channels_go_while_it_trains_and_a_resumed_run_is_the_same(which, distiller_first):
    whole = pruned(which, distiller_first).steps(0, 1, 2, 3)
    part = pruned(which, distiller_first).steps(0, 1)
    state = part.saved()
    part.handle.remove(False)
    again = pruned(which, distiller_first).load(state)
    before, now = (one["h"]["participants"]["Distiller"]["teacher"] for one in (state, again.saved()))
    assert str(now) == str(before)  # saved again before a batch, when the pruner has cut the student
    again.steps(2, 3)
    assert whole.student[0].weight.shape[0] == 4 and again.losses == whole.losses[2:]
    assert equal(again.values(), whole.values())
    for run in (again, whole):
        run.handle.remove()


def test_after_a_cut_the_adapter_is_what_it_was_on_the_channels_that_are_left():
    run = pruned("other", distiller_first=True)
    run.step(0)
    weight = run.adapters[0]
    before, states = weight.detach().clone(), {n: x.clone() for n, x in run.optimizer.state[weight].items()}
    kept = torch.as_tensor(run.distiller._following.cuts[0]["1.weight", 0])
    assert 4 <= len(kept) < 8 and before.shape[1] == 8
    run.loss(1)
    assert torch.equal(weight, before[:, kept])
    assert torch.equal(run.optimizer.state[weight]["exp_avg_sq"], states["exp_avg_sq"][:, kept])
    run.handle.remove(False)


def test_a_feature_whose_channels_cannot_be_told_lets_its_adapter_begin_afresh():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.mix, self.head = nn.Linear(3, 8), nn.Identity(), nn.Linear(8, CLASSES)

        def forward(self, x):
            y = self.body(x.mean((2, 3)))
            self.mix(y.cumsum(1))
            return self.head(y.relu())

    student = Mixed()
    pruner = GradualPruner(student, 0.5, "local", "large_final", "lin", example_inputs=X[0])
    d = Distiller(Named(lambda x: x, 6), FitNet(), ["mix"], ["model.5"])
    run = Run(d, student, pruner, total=2).steps(0)
    with pytest.warns(
        UserWarning, match="the adapter of FitNet begins afresh: it cannot be told which channels .* of mix, which"
    ):
        run.step(1)
    run.handle.remove()


# --- bad input ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "given", "error", "message"),
    [
        (
            FitNet,
            {},
            ValueError,
            "activations_student must name the layers whose outputs FitNet compares, got none; pass activ",
        ),
        (
            FitNet,
            {"activations_student": ["0"]},
            ValueError,
            "activations_teacher must be as many layers as .*, got 0 and 1; one",
        ),
        (
            Distance,
            FIT,
            ValueError,
            r"activations_student must be left out for losses that read no features, Distance, got \['1'\]",
        ),
        (
            FitNet,
            {"activations_student": "0"},
            TypeError,
            r"activations_student must be a list of layers, got '0'; pass \['0'\]",
        ),
        (
            FitNet,
            {"activations_student": 0.9},
            TypeError,
            r"activations_student must be a list of layers, got 0.9; the weight of the loss is weight=0.9",
        ),
        (Distance, {"weight": 1.5}, ValueError, r"weight must be in \[0, 1\], got 1.5"),
        (Distance, {"weight": "0.5"}, TypeError, r"weight must be a number in \[0, 1\], got '0.5'"),
        (Distance, {"schedule": "coz"}, ValueError, "schedule must be one of .*got 'coz'"),
    ],
)
def test_bad_settings_are_refused(loss, given, error, message):
    with pytest.raises(error, match=message):
        Distiller(teacher(), loss(), **given)


def test_no_loss_at_all_is_refused():
    with pytest.raises(ValueError, match="loss must be a distillation loss or several, got none"):
        Distiller(teacher(), [])


def refused(d: Distiller, student: nn.Module | None = None, error: type[Exception] = ValueError) -> str:
    """Return the message of the first batch, which has changed nothing."""
    student = net() if student is None else student
    before = copy.deepcopy(student.state_dict())
    run = Run(d, student)
    outputs = student.eval()(X[0])
    with pytest.raises(error) as caught:
        run.handle.loss(F.cross_entropy(outputs, Y[0]), X[0], (), outputs)
    run.handle.remove(False)
    assert all(torch.equal(x, before[n]) for n, x in student.state_dict().items())
    assert len(run.optimizer.param_groups[0]["params"]) == len(list(student.parameters()))
    return str(caught.value)


@pytest.mark.filterwarnings("ignore:the run ends without a step")
def test_a_first_batch_that_does_not_fit_is_refused():
    assert "teacher must have the student's 4 classes, got 9" in refused(Distiller(net(classes=9), Distance()))
    assert refused(Distiller(teacher(), Labelled())).startswith("labels must be there for Labelled, got None; ")
    none = refused(Distiller(Named(lambda x: {"hidden": x}), Distance()))
    assert none.startswith(
        "teacher must return logits, as a tensor, the first one of a tuple or the `logits` of a dict, for Distance"
    )
    other = teacher()
    with torch.no_grad():
        other[0].weight[0, 0, 0, 0] = float("nan")
    spoiled = refused(Distiller(other, Distance()))
    assert spoiled.startswith(
        "teacher must give finite numbers, got NaN or infinity for the first batch; check its weights, and"
    )
    assert "got numbers from -" in spoiled


@pytest.mark.filterwarnings("ignore:the run ends without a step")
def test_a_loss_that_is_not_finite_is_refused_with_the_first_batch():
    spoiled = refused(Distiller(teacher(), lambda student, other: (student - 1e9).log().mean()))
    assert spoiled.startswith("loss must be finite for finite answers, got nan from ")
    assert "functions get logits, not probabilities" in spoiled

    network = net()
    with torch.no_grad():
        network[0].weight.fill_(float("inf"))  # the student's own trouble, which a GradScaler may get over
    run = Run(Distiller(teacher(), Distance()), network)
    run.loss(0)
    run.handle.remove(False)


def test_a_teacher_that_masks_classes_by_the_lowest_number_is_finite():
    lowest = torch.finfo(torch.float32).min
    masked = Named(lambda x: torch.cat([x[:, :2], torch.full_like(x[:, 2:], lowest)], 1))
    run = Run(Distiller(masked, "SoftTarget")).steps(0)
    assert 0 < run.handle.metrics()["distill_loss"] < 100
    run.handle.remove(False)


def test_a_teacher_that_says_nan_later_is_told_with_the_figures():
    for ends in (False, True):
        other = teacher()
        run = Run(Distiller(other, Distance()), total=2).steps(0)
        with torch.no_grad():
            other[5].bias[0] = float("inf")
        run.step(1)
        with pytest.raises(
            ValueError, match="teacher must give finite numbers, got NaN or infinity in the steps up to 2; check"
        ):
            run.handle.remove() if ends else run.handle.metrics()
        run.handle.remove()
        assert other.training


def test_a_run_without_a_model_is_refused():
    with pytest.raises(ValueError, match="model must be given for a Distiller, whose student it is, got None; pass model="):
        Loop([Distiller(teacher(), Distance())]).start(Fit(1))


def test_a_teacher_of_two_distillers_of_a_training_is_refused_and_of_two_runs_is_not():
    """The average moved twice in each step, and answered the first for the layers of the second."""
    average, student = EMATeacher(0.5), net()
    both = [Distiller(average, [loss]) for loss in (Distance(), "SoftTarget")]
    optimizer = torch.optim.SGD(student.parameters(), 0.1)
    with pytest.raises(ValueError, match="teacher must be asked by one Distiller of a training, got <EMATeacher"):
        attach(optimizer, *both, total_steps=2, model=student)
    assert hooks(student) == 0 and average.model is None
    for one in both:
        Run(one, student).steps(0).handle.remove(False)


def test_features_alone_need_no_logits():
    d = Distiller(Named(lambda x: {"hidden": x}), FitNet(), ["1"], ["model.1"])
    run = Run(d).steps(0)
    run.handle.remove(False)


def test_what_it_shows():
    d = fitnet(None, Distance(), schedule="cos")
    assert repr(d) == "<Distiller: FitNet + Distance of <NetworkTeacher: Sequential>, weight 0.5>"
    assert "1 - 1" in str(d) and "Cosine" in d._repr_html_()
