"""Routes are recorded in every framework; a kill leaves whole files, and a training that is resumed goes on writing."""

import copy
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import fastai.callback.schedule  # noqa: F401 - gives learners fine_tune
import pytest
import torch
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from torch.utils.data import DataLoader, TensorDataset

from fasterai.callbacks.fastai import ParticipantCallback
from fasterai.callbacks.plain import attach
from fasterai.core.loop import Participant
from fasterai.distill.routes.recorder import RouteRecorder
from fasterai.distill.routes.route import Route
from tests.callbacks.test_own_method import BATCHES, EPOCHS, FRAMEWORKS
from tests.callbacks.test_own_method import Net as FrameworkNet
from tests.route_nets import Net, X, Y, student, train

ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.filterwarnings("ignore")


def names(folder):
    return sorted(path.name for path in Path(folder).iterdir())


class Noting(Participant):
    """Copies of the state dict after each step."""

    def __init__(self, model):
        self.model, self.states = model, []

    def after_step(self, position):
        self.states.append({name: x.clone() for name, x in self.model.state_dict().items()})


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({}, [2, 4, 6, 8]),  # of 4 epochs of 2 steps
        ({"every": 3}, [6, 8]),
        ({"every": 9}, [8]),
        ({"steps": 3}, [3, 6, 8]),
        ({"steps": 1}, [1, 2, 3, 4, 5, 6, 7, 8]),
    ],
)
def test_anchors_are_the_tensors_after_these_steps(options, steps, tmp_path):
    model = student()
    noting = Noting(model)
    recorder = RouteRecorder(tmp_path / "new" / "route", **options)
    train(model, [noting, recorder], steps=8)
    assert [path.name for path in recorder.files] == [f"step_{step:08}.pt" for step in steps]
    route = Route.from_folder(recorder.folder, Net())
    for i, step in enumerate(steps):
        found = route.load(i).state_dict()
        assert all(torch.equal(x, noting.states[step - 1][name]) for name, x in found.items())
    saved = torch.load(recorder.files[0], weights_only=True)
    assert (saved["step"], saved["epochs"], saved["total_steps"]) == (steps[0], steps[0] / 2, 8)


def test_the_training_is_the_same_without_it(tmp_path):
    alone, recorded = student(), student()
    torch.manual_seed(3)
    train(alone)
    torch.manual_seed(3)
    train(recorded, [RouteRecorder(tmp_path)])
    assert all(torch.equal(a, b) for a, b in zip(alone.parameters(), recorded.parameters(), strict=True))


@pytest.mark.parametrize("run", FRAMEWORKS)
def test_every_framework(run, tmp_path):
    model, folder = FrameworkNet(), tmp_path / "route"
    knows_no_epochs = run in FRAMEWORKS[:2]  # which give their steps
    run(model, [RouteRecorder(folder, steps=BATCHES if knows_no_epochs else None)], tmp_path, stop=False, resume=False)
    assert names(folder) == [f"step_{BATCHES * epoch:08}.pt" for epoch in range(1, EPOCHS + 1)]
    route = Route.from_folder(folder, FrameworkNet())
    assert torch.equal(route.load(1).body.weight, model.body.weight), "Lightning's prefix is taken off"
    assert not torch.equal(route.load(0).body.weight, model.body.weight)


def test_a_resumed_training_writes_the_same_route(tmp_path):
    run = FRAMEWORKS[3]  # Lightning
    run(FrameworkNet(), [RouteRecorder(tmp_path / "a", steps=2)], tmp_path / "whole", stop=False, resume=False)
    (tmp_path / "parts").mkdir()
    run(FrameworkNet(), [RouteRecorder(tmp_path / "b", steps=2)], tmp_path / "parts", stop=True, resume=False)
    assert len(names(tmp_path / "b")) == 2
    (tmp_path / "b" / "step_00000007.pt").touch()  # of steps after the checkpoint
    run(FrameworkNet(), [RouteRecorder(tmp_path / "b", steps=2)], tmp_path / "parts", stop=False, resume=True)
    assert names(tmp_path / "a") == names(tmp_path / "b") == [f"step_{step:08}.pt" for step in (2, 4, 6, 8)]
    for name in names(tmp_path / "a"):
        one, other = (torch.load(tmp_path / part / name, weights_only=True)["state_dict"] for part in "ab")
        assert one.keys() == other.keys() and all(torch.equal(x, other[key]) for key, x in one.items())


def test_a_kill_leaves_whole_files_only(tmp_path):
    script = f"""
        import os, signal
        import fasterai.core.files as files
        from fasterai.distill.routes.recorder import RouteRecorder
        from tests.route_nets import student, train

        calls, settle = [], files._settle
        def killing(*arguments):
            calls.append(1)
            if len(calls) == 3:  # the content is written, the name not given yet
                os.kill(os.getpid(), signal.SIGKILL)
            settle(*arguments)
        files._settle = killing
        train(student(), [RouteRecorder({str(tmp_path)!r})], steps=8)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL
    assert len(names(tmp_path)) == 3 and names(tmp_path)[0].endswith(".part")
    assert [one.name for one in Route.from_folder(tmp_path, Net()).anchors] == ["step_00000002.pt", "step_00000004.pt"]


def test_a_new_training_does_not_mix_with_another_route(tmp_path):
    train(student(), [RouteRecorder(tmp_path)])
    before = {name: (tmp_path / name).read_bytes() for name in names(tmp_path)}
    model = student()
    weight = model.first.weight.clone()
    with pytest.raises(
        ValueError, match=r"folder must hold no anchors when a training begins, got 2 in .*; pass another folder"
    ):
        train(model, [RouteRecorder(tmp_path)])
    assert torch.equal(model.first.weight, weight) and {name: (tmp_path / name).read_bytes() for name in before} == before


def test_a_training_that_stops_early_has_the_anchors_until_then(tmp_path):
    model = student()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    handle = attach(optimizer, RouteRecorder(tmp_path), epochs=4, steps_per_epoch=2, model=model)
    for _ in range(5):
        optimizer.step()
    handle.remove(completed=False)
    assert names(tmp_path) == ["step_00000002.pt", "step_00000004.pt"]


def test_a_wrapped_network_is_written_without_its_wrapper(tmp_path):
    model = student()
    wrapped = torch.nn.DataParallel(torch.nn.Sequential(model))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with attach(optimizer, RouteRecorder(tmp_path), epochs=1, steps_per_epoch=1, model=wrapped):
        optimizer.step()
    assert "0.first.weight" in torch.load(tmp_path / "step_00000001.pt", weights_only=True)["state_dict"]


def test_copies_and_states(tmp_path):
    recorder = RouteRecorder(tmp_path, every=2)
    assert repr(copy.deepcopy(recorder)) == repr(recorder)
    assert repr(recorder) == f"<RouteRecorder: every 2 epochs, 0 anchors in {tmp_path.name}/>"
    recorder.load_state_dict({})  # of earlier versions
    assert recorder.state_dict() == {"steps": 0, "epochs": 0.0}
    for state, error, message in [
        ({"steps": -1}, ValueError, "state's steps must be at least 0, got -1"),
        ({"epochs": "2"}, TypeError, "state's epochs must be a number"),
    ]:
        with pytest.raises(error, match=message):
            recorder.load_state_dict(state)
    assert recorder.state_dict() == {"steps": 0, "epochs": 0.0}


def fastai_learner(model, folder):
    data = DataLoader(TensorDataset(X, Y), 8)
    learn = Learner(DataLoaders(data, data), model, loss_func=CrossEntropyLossFlat(), path=folder)
    learn.splitter = lambda m: [[*m.first.parameters()], [*m.norm.parameters(), *m.last.parameters()]]
    return learn


def test_fine_tune_is_one_route(tmp_path):
    model, recorder = student(), RouteRecorder(tmp_path / "route")
    with fastai_learner(model, tmp_path).no_bar() as learn, learn.no_logging():
        learn.fine_tune(2, freeze_epochs=1, cbs=ParticipantCallback(recorder))  # two fits, of 1 and of 2 epochs
    found = [torch.load(path, weights_only=True) for path in recorder.files]
    assert names(recorder.folder) == [f"step_{step:08}.pt" for step in (4, 8, 12)]
    assert [(one["step"], one["epochs"], one["total_steps"]) for one in found] == [(4, 1.0, 4), (8, 2.0, 12), (12, 3.0, 12)]
    assert torch.equal(found[-1]["state_dict"]["first.weight"], model.first.weight)
    assert not torch.equal(found[0]["state_dict"]["first.weight"], found[1]["state_dict"]["first.weight"])
    with pytest.raises(ValueError, match="folder must hold no anchors when a training begins, got 3"):
        train(student(), [recorder])  # of another network
    with pytest.raises(ValueError, match="folder must hold no anchors when a training begins, got 3"):
        train(model, [copy.deepcopy(recorder)])


def test_a_second_fit_that_was_stopped_is_resumed_at_its_place(tmp_path):
    model, recorder = student(), RouteRecorder(tmp_path / "route", steps=2)
    train(model, [recorder])
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    handle = attach(optimizer, recorder, epochs=3, steps_per_epoch=2, model=model)
    for _ in range(3):
        optimizer.step()
    state = handle.state_dict()
    handle.remove(completed=False)
    assert names(recorder.folder) == [f"step_{step:08}.pt" for step in (2, 4, 6)]
    with pytest.raises(ValueError, match="folder must hold no anchors when a training begins, got 1"):
        train(model, [recorder])  # the fit before this one was not completed

    optimizer, other = torch.optim.SGD(model.parameters(), 0.1), RouteRecorder(recorder.folder, steps=2)
    handle = attach(optimizer, other, epochs=3, steps_per_epoch=2, model=model)
    handle.load_state_dict(state)
    for _ in range(3):
        optimizer.step()
    handle.remove()
    assert names(recorder.folder) == [f"step_{step:08}.pt" for step in (2, 4, 6, 8, 10)]
    last = torch.load(other.files[-1], weights_only=True)
    assert (last["step"], last["epochs"], last["total_steps"]) == (10, 5.0, 10)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"every": 0}, ValueError, "every must be at least 1, got 0"),
        ({"every": 1.5}, TypeError, "every must be a whole number"),
        ({"steps": 0}, ValueError, "steps must be at least 1, got 0"),
    ],
)
def test_bad_arguments_are_refused(options, error, message, tmp_path):
    with pytest.raises(error, match=message):
        RouteRecorder(tmp_path, **options)


def test_a_loop_without_epochs_or_model_is_refused(tmp_path):
    model = student()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(ValueError, match="every=1 needs a loop that says its epochs, got one that does not; pass steps="):
        attach(optimizer, RouteRecorder(tmp_path), total_steps=3, model=model)
    with pytest.raises(ValueError, match="model must be given to a loop whose route is recorded, got none"):
        attach(optimizer, RouteRecorder(tmp_path), epochs=3, steps_per_epoch=1)
