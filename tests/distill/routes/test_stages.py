"""Stage by stage: what each stage learns from, and trainings that are interrupted, by a kill as well."""

import signal
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import pytest
import torch

from fasterai.callbacks.plain import attach
from fasterai.core.loop import Participant
from fasterai.distill.distiller import Distiller
from fasterai.distill.losses.logits import SoftTarget
from fasterai.distill.routes.hardness import Greedy
from fasterai.distill.routes.route import Route
from tests.callbacks.test_own_method import FRAMEWORKS
from tests.callbacks.test_own_method import Net as FrameworkNet
from tests.route_nets import Net, X, Y, anchors, distilled, route, student, teacher, train
from tests.ticket_nets import equal, tensors_of

ROOT = Path(__file__).parents[3]
HELD = [(X[:8], Y[:8]), (X[8:12], Y[8:12])]
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def whole():
    return distilled()


# --- what a stage is --------------------------------------------------------------------------------------------------


def test_stages_by_hand(whole):
    """The same trainings written out: an anchor after another, each from the weights of the last."""
    model, network, states, scores = student(), teacher(), anchors(), []
    torch.manual_seed(0)
    for state in states:
        network.load_state_dict(state)
        scores.append(train(model, [Distiller(network, SoftTarget(T=4), weight=0.9)]))
    tensors, result = whole
    assert equal(tensors, tensors_of(model))
    assert [stage.score for stage in result.stages] == scores and result.visited == (0, 1, 2, 3)


def test_a_student_without_its_teacher_ends_elsewhere(whole):
    model = student()
    torch.manual_seed(0)
    for _ in range(4):
        train(model)
    assert not torch.equal(model.first.weight, whole[0]["first.weight"])


def test_loss_weight_and_options_reach_each_distiller():
    seen = []

    def watching(model, participants):
        seen.append(next(one for one in participants if isinstance(one, Distiller)))
        return train(model, participants)

    loss = SoftTarget(T=2)
    route(2).distil(watching, student(), loss, 0.3, schedule="lin")
    assert len(seen) == 2 and all(one.losses == [loss] and one.weight == 0.3 and one.schedule is not None for one in seen)


def test_an_optimizer_that_is_used_again_is_cleared():
    kept, steps = {}, []

    def once(model, participants):
        optimizer = kept.setdefault(0, torch.optim.Adam(model.parameters(), 0.05))
        train(model, participants, optimizer=optimizer)
        steps.append({int(state["step"]) for state in optimizer.state.values()})

    distilled(train=once)
    assert steps == [{4}] * 4


def test_what_is_no_number_is_no_score():
    def once(model, participants):
        train(model, participants)
        return True

    assert [stage.score for stage in distilled(train=once)[1].stages] == [None] * 4


@pytest.mark.parametrize("run", FRAMEWORKS)
def test_every_framework(run, tmp_path):
    model, found = FrameworkNet(), []
    states = [FrameworkNet().state_dict() for _ in range(2)]
    torch.nn.init.normal_(states[1]["body.weight"])
    network = FrameworkNet()

    def once(model, participants):
        found.append(network.body.weight.clone())
        run(model, participants, tmp_path / str(len(found)), stop=False, resume=False)

    result = Route.from_checkpoints(states, network).distil(once, model)
    assert result.visited == (0, 1) and torch.equal(found[1], states[1]["body.weight"])
    assert not torch.equal(model.body.weight, FrameworkNet().body.weight)


# --- greedy -----------------------------------------------------------------------------------------------------------


def test_hardness_after_each_stage_is_that_of_the_student_then():
    models = []

    def once(model, participants):
        models.append(student())
        result = train(model, participants)
        models[-1].load_state_dict(model.state_dict())
        return result

    result = distilled(train=once, choose=Greedy(0.0, HELD))[1]
    for model, stage in zip(models, result.stages, strict=True):
        assert list(stage.hardness) == route().hardness(model, HELD)[stage.anchor :]


@pytest.mark.parametrize(
    ("tables", "delta", "visited"),
    [
        # H_ij of the anchors from the stage's own on, by hand.
        ([[1.0, 1.5, 1.7, 2.0], [1.0, 1.9]], 0.8, (0, 2, 3)),
        ([[1.0, 1.0, 1.0, 1.0]], 0.8, (0, 3)),
        ([[1.0, 2.0, 2.0, 2.0], [1.0, 2.0, 2.0], [1.0, 2.0]], 0.8, (0, 1, 2, 3)),
        ([[1.0, 2.0, 2.0, 2.0], [1.0, 2.0, 1.2]], 0.8, (0, 1, 3)),
        ([[1.0, 1.4, 1.6, 2.0], [1.0, 1.0, 1.0]], 0.5, (0, 1, 3)),
    ],
)
def test_the_way_through_given_tables_by_hand(tables, delta, visited, monkeypatch):
    left = [*tables, [1.0]]  # the last anchor's own
    monkeypatch.setattr(Route, "hardness", lambda *_: left.pop(0))
    result = distilled(choose=Greedy(delta, HELD))[1]
    assert result.visited == visited and left == []
    assert [stage.hardness for stage in result.stages] == [tuple(one) for one in [*tables, [1.0]]]


# --- interrupted ------------------------------------------------------------------------------------------------------


CHOICES = {"all": lambda: None, "greedy": lambda: Greedy(0.0, HELD)}


@pytest.mark.parametrize("stopped", [1, 2, 3])
@pytest.mark.parametrize("choice", CHOICES)
def test_an_interrupted_training_goes_on_bit_for_bit(stopped, choice, tmp_path):
    calls, again, model = [], [], student()
    before = tensors_of(model)

    def breaking(model, participants):
        calls.append(train(model, participants))
        if len(calls) == stopped:
            raise KeyboardInterrupt
        return calls[-1]

    with pytest.raises(KeyboardInterrupt):
        distilled(tmp_path, breaking, model=model, choose=CHOICES[choice]())
    assert equal(tensors_of(model), before), "the student is as it was"
    # A new process draws other numbers, unless no stage was whole.
    tensors, result = distilled(
        tmp_path,
        lambda m, p: again.append(train(m, p)) or again[-1],
        seed=99 if stopped > 1 else 0,
        choose=CHOICES[choice](),
    )
    wanted, stages = distilled(choose=CHOICES[choice]())
    assert equal(tensors, wanted) and result == stages
    assert len(again) == len(stages.stages) - stopped + 1, "whole stages are not trained again"


def test_a_killed_training_goes_on_bit_for_bit(whole, tmp_path):
    script = f"""
        import os, signal, torch
        from fasterai.core.loop import Participant
        from tests.route_nets import distilled, train

        class Killing(Participant):
            def after_step(self, position):
                if len(calls) == 3 and position == 0.5:
                    os.kill(os.getpid(), signal.SIGKILL)

        calls = []
        def killed(model, participants):
            calls.append(1)
            return train(model, [*participants, Killing()])

        torch.set_num_threads(1)
        distilled({str(tmp_path)!r}, killed)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL
    seen = []
    tensors, result = distilled(tmp_path, lambda m, p: seen.append(1) or train(m, p), seed=123)
    assert equal(tensors, whole[0]) and result == whole[1] and len(seen) == 2


def test_a_finished_training_trains_nothing(whole, tmp_path):
    distilled(tmp_path)
    tensors, result = distilled(tmp_path, _never)
    assert equal(tensors, whole[0]) and result == whole[1]


def _never(model, participants):
    raise AssertionError("nothing is left to train")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": 0.5}, "weight was 0.9 and is 0.5"),
        ({"loss": SoftTarget(T=2)}, "loss was .* and is .*T=2"),
        ({"choose": Greedy(0.5, HELD)}, "delta was None and is 0.5"),
        ({"model": Net(7)}, r"first.weight was \(6, 4\) and is \(7, 4\)"),
    ],
)
def test_a_folder_of_another_call_is_refused(options, message, tmp_path):
    distilled(tmp_path)
    with pytest.raises(ValueError, match=f"folder must be of the same call, got .*{message}.*; pass another folder"):
        distilled(tmp_path, _never, **options)


def test_other_anchors_are_another_call(tmp_path):
    distilled(tmp_path)
    with pytest.raises(ValueError, match=r"folder must be of the same call, got .*anchors was"):
        route().every(2).distil(_never, student(), folder=tmp_path)


def test_other_first_weights_are_said(whole, tmp_path):
    distilled(tmp_path)
    with pytest.warns(UserWarning, match="holds stages of a student with other first weights: the training goes on with those"):
        tensors, _ = distilled(tmp_path, _never, model=student(5))
    assert equal(tensors, whole[0])


@pytest.mark.parametrize(
    "content", [b"", b"nothing", b"torn", {"format": "other"}, {"next": "x"}, {"stages": [3]}, {"random": 1}], ids=str
)
def test_a_spoiled_file_is_refused(content, tmp_path):
    path = tmp_path / "stages.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        distilled(tmp_path)
        torch.save({**torch.load(path, weights_only=True), **content}, path)
    with pytest.raises(ValueError, match=r"folder must hold what distil has written, got .*stages.pt, which is none"):
        distilled(tmp_path, _never)


# --- errors -----------------------------------------------------------------------------------------------------------


def _alone(model, participants):
    train(model)


def _nothing(model, participants):
    return 0.5


def _guard_alone(model, participants):
    train(model, participants[-1:])


def _distiller_alone(model, participants):
    train(model, participants[:1])


def _another(model, participants):
    other = student(3)
    optimizer = torch.optim.SGD(other.parameters(), 0.1)
    with attach(optimizer, *participants, total_steps=1, model=other):
        optimizer.step()


def _twice(model, participants):
    train(model, participants)
    train(model, participants)


LEFT_OUT = "train must let the participants take part in its training, got one that took no step with them; pass them on"


@pytest.mark.parametrize(
    ("once", "message"),
    [
        (_alone, LEFT_OUT),
        (_nothing, LEFT_OUT),
        (_distiller_alone, LEFT_OUT),
        (_guard_alone, "participants must hold the Distiller that StageGuard follows, before it, got none"),
        (_another, "optimizer must train the student that train was given, got one that holds none of its parameters"),
        (_twice, "train must train once in a stage, got a second run with its participants"),
    ],
)
def test_a_training_without_the_participants_is_refused(once, message):
    model = student()
    before = tensors_of(model)
    with warnings.catch_warnings(action="ignore"), pytest.raises(ValueError, match=message):
        route().distil(once, model)
    assert equal(tensors_of(model), before), "and the student is as it was"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"train": "train"}, TypeError, r"train must be a function \(student, participants\), got 'train'"),
        ({"student": "net"}, TypeError, "student must be a torch.nn.Module, got 'net'"),
        ({"weight": 90}, ValueError, r"weight must be in \[0, 1\], got 90; pass 0.9"),
        ({"choose": 0.8}, TypeError, r"choose must be Greedy\(delta, data\) or None, got 0.8"),
        ({"layers": ["first"]}, TypeError, "options must be of activations_student, .*, got layers"),
        ({"activations_student": ["frist"], "activations_teacher": ["first"]}, ValueError, "activations_student must be"),
    ],
)
def test_bad_arguments_are_refused_and_nothing_is_changed(arguments, error, message):
    given = {"train": train, "student": student(), **arguments}
    model = given["student"]
    before = tensors_of(model) if isinstance(model, torch.nn.Module) else {}
    with pytest.raises(error, match=message):
        route().distil(**given)
    assert not before or equal(tensors_of(model), before)


class Failing(Participant):
    def after_step(self, position):
        raise RuntimeError("stop")


def test_a_failing_training_leaves_the_student_and_no_hooks():
    model = student()
    before, found = tensors_of(model), route()
    with pytest.raises(RuntimeError, match="stop"):
        found.distil(lambda m, p: train(m, [*p, Failing()]), model)
    assert equal(tensors_of(model), before)
    assert not any(m._forward_hooks for net in (model, found.model) for m in net.modules())
