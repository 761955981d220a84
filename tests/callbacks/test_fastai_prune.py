import copy
import pickle
import random
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch
from fastai.callback.all import EarlyStoppingCallback, GradientAccumulation, ReduceLROnPlateau, SaveModelCallback
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.tracker import TrackerCallback
from fastai.data.core import DataLoaders, TfmdDL
from fastai.learner import Learner, load_learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.optimizer import SGD, Adam, OptimWrapper
from fastai.tabular.all import Normalize, TabularDataLoaders, tabular_learner
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset

from fasterai.callbacks.fastai import PruneCallback
from fasterai.core.criteria import large_final
from fasterai.core.schedules import OneShot, lin, one_cycle
from tests.networks import perceptron

BATCHES = 4  # of 8 items each, in an epoch


def dls() -> DataLoaders:
    g = torch.Generator().manual_seed(1)
    data = TensorDataset(torch.randn(8 * BATCHES, 6, generator=g), torch.randint(4, (8 * BATCHES,), generator=g))
    loaders = [TfmdDL(data, bs=8, shuffle=False, num_workers=0) for _ in range(2)]
    return DataLoaders(*loaders, device="cpu")


net = partial(perceptron, 6, 10, 4)


def body_and_head(model: nn.Module) -> list[list[nn.Parameter]]:
    return [list(model[0].parameters()), list(model[2].parameters())]


def silent(log) -> None:
    pass


def learner(path, model: nn.Module | None = None, opt_func=Adam, **options) -> Learner:
    learn = Learner(
        options.pop("data", None) or dls(),
        model or net(),
        loss_func=CrossEntropyLossFlat(),
        opt_func=opt_func,
        path=path,
        **options,
    )
    if hasattr(learn, "progress"):
        learn.remove_cb(learn.progress)
    learn.logger = silent
    return learn


def prune(ratio=0.5, schedule=lin, **options) -> PruneCallback:
    return PruneCallback(ratio, schedule, "local", "large_final", **options)


def shapes(model: nn.Module) -> list[tuple[int, ...]]:
    return [tuple(p.shape) for p in model.parameters()]


def width(model: nn.Module) -> int:
    return model[0].out_features


HALF = [(5, 6), (5,), (4, 5), (4,)]


class Widths(Callback):
    """The hidden width after each step."""

    order = 90
    run_valid = False

    def __init__(self):
        self.seen = []

    def after_step(self):
        self.seen.append(width(self.learn.model))


class Measured(Callback):
    """Gives the validation losses that a test wants, the last one again and again."""

    order = 51  # behind the Recorder

    def __init__(self, *losses):
        self.losses = list(losses)

    def after_validate(self):
        loss = self.losses.pop(0) if len(self.losses) > 1 else self.losses[0]
        self.learn.recorder.log[2] = loss


class Stopping(Callback):
    """Stops the fit after the n-th step."""

    run_valid = False

    def __init__(self, n, error=CancelFitException, order=95):
        self.left, self.error, self.order = n, error, order

    def after_step(self):
        self.left -= 1
        if self.left == 0:
            raise self.error("stop")


# --- the run ------------------------------------------------------------------------------------------------------------


def optimizers(learn) -> list[torch.Tensor]:
    return [p for p, *_ in learn.opt.all_params()]


@pytest.mark.parametrize("attached", ["cbs", "learner"])
@pytest.mark.parametrize("opt_func", [Adam, partial(SGD, mom=0.9), partial(OptimWrapper, opt=torch.optim.AdamW)])
def test_follows_the_schedule_and_the_optimizer_goes_on(tmp_path, attached, opt_func):
    learn, callback, widths = learner(tmp_path, opt_func=opt_func), prune(), Widths()
    if attached == "learner":
        learn.add_cb(callback)
    learn.fit(2, cbs=[widths] if attached == "learner" else [callback, widths])
    # 0.625 channels of 10 more at each step; halves round to even
    assert widths.seen == [9, 9, 8, 8, 7, 6, 6, 5]
    assert shapes(learn.model) == HALF
    assert callback.current_sparsity == 0.5
    assert [id(p) for p in optimizers(learn)] == [id(p) for p in learn.model.parameters()]
    for p in learn.model.parameters():
        assert all(v.shape == p.shape for v in learn.opt.state[p].values() if isinstance(v, torch.Tensor) and v.dim())


def test_the_familiar_calls():
    familiar = PruneCallback(pruning_ratio=0.4, context="global", criteria=large_final, schedule=one_cycle)
    assert familiar.settings.axes == (0.4, "global", large_final, one_cycle)
    ignored, inputs = [nn.ReLU()], torch.zeros(1)
    positional = PruneCallback(0.4, "one_cycle", "local", "large_final", ignored, inputs)
    assert positional.settings.axes == (0.4, "local", "large_final", "one_cycle")
    assert positional.settings.ignored_layers == ignored
    assert positional.settings.example_inputs is inputs


def test_the_sparsity_is_a_column_of_the_epoch_table(tmp_path):
    learn, rows = learner(tmp_path), []
    learn.logger = rows.append
    learn.fit(2, cbs=prune(schedule=OneShot(0.75)))
    assert list(learn.recorder.metric_names) == ["epoch", "train_loss", "valid_loss", "sparsity", "time"]
    assert [row[3] for row in rows] == [0.0, 0.5]
    assert [value[-1] for value in learn.recorder.values] == [0.0, 0.5]
    assert len(learn.validate()) == 1


def test_a_part_of_the_model_and_other_options(tmp_path):
    torch.manual_seed(0)
    head = nn.Sequential(nn.Linear(10, 12), nn.ReLU(), nn.Linear(12, 4))
    learn = learner(tmp_path, nn.Sequential(nn.Linear(6, 10), nn.ReLU(), head))
    learn.fit(1, cbs=prune(model=head, round_to=4, max_updates=2))
    assert [m.out_features for m in learn.model.modules() if isinstance(m, nn.Linear)] == [10, 8, 4]  # 6 of 12, rounded up


def test_gradient_accumulation_moves_channels_only_at_steps(tmp_path):
    learn, widths = learner(tmp_path), Widths()
    learn.fit(1, cbs=[prune(), GradientAccumulation(16), widths])
    assert widths.seen[-1] == 5
    assert shapes(learn.model) == HALF


def digits() -> DataLoaders:
    sets = load_digits()
    order = torch.randperm(len(sets.images), generator=torch.Generator().manual_seed(0))
    x, y = (torch.as_tensor(sets.images, dtype=torch.float32)[order, None] / 16, torch.as_tensor(sets.target)[order])
    train, valid = TensorDataset(x[:1297], y[:1297]), TensorDataset(x[1297:], y[1297:])
    return DataLoaders(TfmdDL(train, bs=64, shuffle=True, num_workers=0), TfmdDL(valid, bs=250, num_workers=0), device="cpu")


def block(inputs: int, outputs: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]


def test_half_of_the_channels_of_a_network_that_reads_digits(tmp_path):
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)]
    model = nn.Sequential(*block(1, 16), *block(16, 32), nn.MaxPool2d(2), *block(32, 64), *head)
    learn = learner(tmp_path, model, data=digits(), metrics=accuracy)
    learn.fit_one_cycle(6, 3e-3, cbs=prune(schedule="agp"))
    # 24058 at first: 9 + 2 for each of 16 channels, 16 x 9 + 2 for 32, 32 x 9 + 2 for 64, and 65 x 10. Now with 8, 16 and 32.
    assert sum(p.numel() for p in model.parameters()) == 11 * 8 + (8 * 9 + 2) * 16 + (16 * 9 + 2) * 32 + 33 * 10
    assert {id(p) for p in optimizers(learn)} == {id(p) for p in model.parameters()}
    train_losses = [values[0] for values in learn.recorder.values]
    assert train_losses == sorted(train_losses, reverse=True)
    assert learn.validate()[1] > 0.9


# --- the life of a callback ---------------------------------------------------------------------------------------------


def test_lr_find_validate_and_predictions_remove_nothing(tmp_path):
    learn = learner(tmp_path, cbs=prune())
    learn.lr_find(num_it=4, show_plot=False)
    learn.validate()
    learn.get_preds()
    assert width(learn.model) == 10
    learn.fit(1)
    assert width(learn.model) == 5
    learn.lr_find(num_it=4, show_plot=False)
    assert shapes(learn.model) == HALF


def test_two_fits_do_not_compound(tmp_path):
    learn, callback = learner(tmp_path, cbs=prune()), None
    learn.fit(1)
    learn.fit(1, reset_opt=True)
    learn.fit_one_cycle(1)
    callback = learn.cbs[-1]
    assert isinstance(callback, PruneCallback)
    assert callback.pruner.channels == {"0.weight": (10, 5)}


def test_another_model_is_counted_from_itself(tmp_path):
    learn, callback = learner(tmp_path), prune()
    learn.fit(1, cbs=callback)
    learn.model = net(seed=1)
    learn.opt = None
    learn.fit(1, cbs=callback)
    assert shapes(learn.model) == HALF


def test_fine_tune_leaves_the_frozen_body_alone_until_it_trains(tmp_path):
    learn, widths = learner(tmp_path, splitter=body_and_head), Widths()
    learn.fine_tune(1, freeze_epochs=1, cbs=[prune(), widths])
    assert widths.seen == [10, 10, 10, 10, 9, 8, 6, 5]
    assert all(p.requires_grad for p in learn.model.parameters())


def test_an_optimizer_that_holds_only_what_trains(tmp_path):
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(6, 10), nn.ReLU()).requires_grad_(False)
    model = nn.Sequential(body, nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 4))
    learn = learner(tmp_path, model, splitter=lambda m: [[p for p in m.parameters() if p.requires_grad]])
    learn.fit(1, cbs=prune())
    assert [m.out_features for m in model.modules() if isinstance(m, nn.Linear)] == [10, 4, 4]


@pytest.mark.parametrize("error", [CancelFitException, KeyboardInterrupt, RuntimeError])
def test_a_run_that_is_stopped_leaves_a_model_that_trains_on(tmp_path, error):
    learn, callback = learner(tmp_path), prune()
    with nullcontext() if error is CancelFitException else pytest.raises(error):
        learn.fit(2, cbs=[callback, Stopping(4, error)])
    assert width(learn.model) == 8  # 2.5 of 10
    assert callback.learn is None
    learn.fit(1)
    learn.fit(1, cbs=callback)
    assert shapes(learn.model) == HALF


@pytest.mark.parametrize("frozen", [False, True])
def test_data_parallel_is_no_hindrance(tmp_path, frozen):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 4))
    model[0].requires_grad_(not frozen)
    learn, callback = learner(tmp_path, nn.DataParallel(model)), prune()
    for _ in range(2):
        learn.fit(1, cbs=callback)
        assert [m.out_features for m in model.modules() if isinstance(m, nn.Linear)] == [10 if frozen else 5, 4, 4]
        learn.model = nn.DataParallel(model)  # as fastai's ParallelTrainer does in each fit


def test_a_compiled_model_is_refused_and_stays(tmp_path):
    model = net()
    learn = learner(tmp_path, torch.compile(model))
    with pytest.raises(ValueError, match=r"model must be the bare network, got torch\.compile"):
        learn.fit(1, cbs=prune())
    assert width(model) == 10


@pytest.mark.parametrize("attached", [False, True])
def test_the_learner_is_copied_and_pickled(tmp_path, attached):
    learn, callback = learner(tmp_path), prune()
    if attached:
        learn.add_cb(callback)
        learn.fit(1)
    else:
        learn.fit(1, cbs=callback)
    for twin in (copy.deepcopy(learn), pickle.loads(pickle.dumps(learn))):
        assert shapes(twin.model) == HALF
        twin.fit(1)
        assert shapes(twin.model) == HALF


def test_export_and_load(tmp_path):
    import pandas as pd

    g = torch.Generator().manual_seed(0)
    frame = pd.DataFrame(torch.randn(32, 3, generator=g).numpy(), columns=["a", "b", "c"])
    frame["y"] = frame["a"] * 2
    data = TabularDataLoaders.from_df(frame, procs=[Normalize], cont_names=["a", "b", "c"], y_names="y", bs=8, num_workers=0)
    learn = tabular_learner(data, layers=[8, 6], path=tmp_path)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, cbs=prune())
        learn.add_cb(prune())
        learn.export("small.pkl")
    again = load_learner(tmp_path / "small.pkl")
    assert shapes(again.model) == shapes(learn.model)
    assert [m.out_features for m in again.model.modules() if isinstance(m, nn.Linear)] == [4, 3, 1]


# --- files --------------------------------------------------------------------------------------------------------------


def test_save_and_load_between_fits(tmp_path):
    learn = learner(tmp_path)
    learn.fit(1, cbs=prune())
    learn.save("small", with_opt=True)
    saved = [p.detach().clone() for p in learn.model.parameters()]
    learn.fit(1)
    learn.load("small", with_opt=True)
    assert all(torch.equal(a, b) for a, b in zip(saved, learn.model.parameters(), strict=True))
    learn.fit(1)


class Restored(Callback):
    """What the tracker has put back."""

    order = 99

    def after_fit(self):
        self.shapes = shapes(self.learn.model)


@pytest.mark.parametrize("with_opt", [False, True])
@pytest.mark.parametrize("order", [1, -1])
def test_what_save_model_puts_back_is_of_the_final_structure(tmp_path, with_opt, order):
    learn, restored = learner(tmp_path), Restored()
    best = SaveModelCallback(monitor="valid_loss", with_opt=with_opt)
    # The first epochs are the best, before channels go in the third; of the last two the fourth is better.
    measured = Measured(0.1, 0.2, 0.9, 0.7, 0.8)
    saved = []
    epoch = Callback(after_epoch=lambda self: saved.append((self.epoch, best.best)))
    epoch.order = 70
    learn.fit(5, cbs=[prune(schedule=OneShot(0.45)), best, measured, restored, epoch][::order])
    assert saved == [(0, 0.1), (1, 0.1), (2, 0.9), (3, 0.7), (4, 0.7)]
    assert restored.shapes == HALF
    assert shapes(learn.model) == HALF
    learn.fit(1)


@pytest.mark.parametrize("stop", [4, 6, 8])
def test_a_fit_that_is_cancelled_right_after_a_removal_puts_back_what_fits(tmp_path, stop):
    learn = learner(tmp_path)
    learn.fit(2, cbs=[prune(), SaveModelCallback(), Stopping(stop)])
    assert width(learn.model) == {4: 8, 6: 6, 8: 5}[stop]
    learn.fit(1)


def test_every_epoch_is_saved_as_it_was(tmp_path):
    learn = learner(tmp_path)
    learn.fit(2, cbs=[prune(), SaveModelCallback(every_epoch=True, fname="each")])
    widths = [torch.load(tmp_path / "models" / f"each_{i}.pth")["0.weight"].shape[0] for i in range(2)]
    assert widths == [8, 5]
    assert sorted(f.name for f in (tmp_path / "models").glob("*.pth")) == ["each_0.pth", "each_1.pth"]


def test_the_last_epoch_is_saved_as_it_was(tmp_path):
    learn = learner(tmp_path)
    learn.fit(2, cbs=[prune(), SaveModelCallback(at_end=True, fname="last")])
    assert torch.load(tmp_path / "models" / "last.pth")["0.weight"].shape[0] == 5


def test_early_stopping_waits_anew_after_a_removal(tmp_path):
    learn, epochs = learner(tmp_path), []
    stop = EarlyStoppingCallback(patience=2)
    count = Callback(after_epoch=lambda self: epochs.append(self.epoch))
    # Without removal it would stop after epoch 2. Channels go in epoch 2, whose loss is then the one to beat.
    learn.fit(8, cbs=[prune(schedule=OneShot(0.3)), stop, Measured(0.1, 0.2, 0.3), count])
    assert epochs == [0, 1, 2, 3, 4]


def test_the_learning_rate_waits_anew_after_a_removal(tmp_path):
    learn = learner(tmp_path)
    reduce = ReduceLROnPlateau(patience=2, factor=10)
    learn.fit(4, lr=0.1, cbs=[prune(schedule=OneShot(0.6)), reduce, Measured(0.1, 0.2, 0.3)])
    assert learn.opt.hypers[-1]["lr"] == 0.1  # it would have gone down in epoch 2; it waits since then


@pytest.mark.parametrize("monitor", ["valid_loss", "accuracy"])
def test_trackers_start_anew_in_either_direction(tmp_path, monitor):
    learn, seen = learner(tmp_path, metrics=accuracy), []
    tracker = TrackerCallback(monitor)
    after = Callback(after_step=lambda self: seen.append(tracker.best))
    after.order, after.run_valid = 90, False
    learn.fit(2, cbs=[prune(schedule=OneShot(0.75)), tracker, after])
    assert abs(seen[4]) < 100  # the second epoch's first step, with the first epoch's value
    assert seen[5] == (float("inf") if monitor == "valid_loss" else -float("inf"))  # channels have gone


# --- arguments ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((50, "agp", "local", "large_final"), {}, ValueError, r"pruning_ratio must be in \[0, 1\], got 50; pass 0.5"),
        ((0.5, "dsd", "local", "large_final"), {}, ValueError, "schedule must never fall, .*got DSD"),
        ((0.5, "local", "agp", "large_final"), {}, ValueError, "context must be .*, got 'agp'"),
        ((0.5, "agp", "local", "large"), {}, ValueError, "criteria must be .*, got 'large'"),
        ((0.5, "agp", "local", "large_final"), {"max_updates": 1.5}, TypeError, "max_updates must be a whole number .*1.5"),
        ((0.5, "agp", "local", "large_final"), {"granularity": "filter"}, TypeError, "options must be .*, got 'granularity'"),
    ],
)
def test_bad_arguments_are_refused_at_once(arguments, options, error, message):
    with pytest.raises(error, match=message):
        PruneCallback(*arguments, **options)
