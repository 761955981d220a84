import copy
import pickle
from functools import partial

import matplotlib as mpl
import pandas as pd
import pytest
import torch
from fastai.callback.all import (
    CSVLogger,
    EarlyStoppingCallback,
    GradientAccumulation,
    GradientClip,
    MixedPrecision,
    MixUp,
    SaveModelCallback,
)
from fastai.callback.core import (
    Callback,
    CancelBatchException,
    CancelEpochException,
    CancelFitException,
    CancelStepException,
    CancelTrainException,
)
from fastai.callback.training import ShortEpochCallback
from fastai.data.core import DataLoaders, TfmdDL
from fastai.learner import Learner, load_learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.optimizer import SGD, Adam
from fastai.tabular.all import Normalize, TabularDataLoaders, tabular_learner
from torch import nn
from torch.utils.data import TensorDataset

import fasterai.callbacks.fastai as adapter
from fasterai.callbacks.fastai import HoldCallback, ParticipantCallback, SparsifyCallback
from fasterai.core.loop import Participant
from fasterai.core.schedules import Schedule, agp, iterative, one_cycle, one_shot, sched_iterative, sched_onecycle
from fasterai.sparse.sparsifier import Sparsifier

mpl.use("Agg")


BATCHES = 4  # of 8 items each, in an epoch


def dls(n: int = BATCHES, batch_size: int = 8) -> DataLoaders:
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(batch_size * n, 6, generator=g), torch.randint(4, (batch_size * n,), generator=g)
    train = TfmdDL(TensorDataset(x, y), bs=batch_size, shuffle=False, num_workers=0)
    valid = TfmdDL(TensorDataset(x, y), bs=batch_size, num_workers=0)
    return DataLoaders(train, valid, device="cpu")


def body_and_head(model: nn.Module) -> list[list[nn.Parameter]]:
    return [list(model[0].parameters()), list(model[2].parameters())]


def learner(path, *, seed: int = 0, model: nn.Module | None = None, opt_func=Adam, **options) -> Learner:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 4)) if model is None else model
    data = options.pop("data", None) or dls()
    learn = Learner(data, model, loss_func=CrossEntropyLossFlat(), opt_func=opt_func, path=path, **options)
    if hasattr(learn, "progress"):
        learn.remove_cb(learn.progress)
    learn.logger = lambda log: None
    return learn


def linear(position: float) -> float:
    return position


def sparsify(sparsity=0.5, **options) -> SparsifyCallback:
    return SparsifyCallback(sparsity, "weight", "local", options.pop("criteria", "large_final"), linear, **options)


def zeros(model: nn.Module) -> list[int]:
    return [int((p == 0).sum()) for p in model.parameters() if p.dim() > 1]


class ZerosPerStep(Callback):
    """What is zero after each step."""

    order = 90

    def __init__(self):
        self.seen = []

    def after_step(self):
        self.seen.append(zeros(self.learn.model))


class Raising(Callback):
    """Raises at the n-th call of an event in training."""

    run_valid = False

    def __init__(self, event, error, n=1, order=0):
        self.order, self.left = order, n
        setattr(self, event, partial(self._raise, error))

    def _raise(self, error):
        self.left -= 1
        if self.left == 0:
            raise error


def clean(learn: Learner, keys: list[str]) -> None:
    """Nothing of ours is left on the model, and no callback of ours on the learner."""
    assert list(learn.model.state_dict()) == keys
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in learn.model.modules())
    assert not any(isinstance(cb, ParticipantCallback) for cb in learn.cbs)
    copy.deepcopy(learn.model)
    pickle.loads(pickle.dumps(learn.model))


# --- the run ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attached", ["cbs", "learner"])
@pytest.mark.parametrize("opt_func", [Adam, partial(SGD, mom=0.9)])
def test_follows_the_schedule_and_ends_exactly(tmp_path, attached, opt_func):
    learn, callback, steps = learner(tmp_path, opt_func=opt_func), sparsify(), ZerosPerStep()
    if attached == "learner":
        learn.add_cb(callback)
    learn.fit(2, cbs=[steps] if attached == "learner" else [callback, steps])
    # 60 and 40 weights at 1/16, 2/16, ... of them; halves round to even
    assert steps.seen == [[4, 2], [8, 5], [11, 8], [15, 10], [19, 12], [22, 15], [26, 18], [30, 20]]
    assert callback.current_sparsity == 0.5
    assert {n: int((~m).sum()) for n, m in callback.sparsifier.masks.items()} == {"0.weight": 30, "2.weight": 20}


@pytest.mark.parametrize("attached", ["cbs", "learner"])
def test_the_sparsity_is_a_column_of_the_epoch_table(tmp_path, attached):
    rows = []
    learn = learner(tmp_path, metrics=accuracy, cbs=sparsify() if attached == "learner" else None)
    learn.logger = rows.append
    learn.fit(2, cbs=[sparsify()] if attached == "cbs" else None)
    recorder = learn.recorder
    assert list(recorder.metric_names) == ["epoch", "train_loss", "valid_loss", "accuracy", "sparsity", "time"]
    assert [len(row) for row in rows] == [6, 6]
    assert [row[4] for row in rows] == [0.25, 0.5]
    assert [v[3] for v in recorder.values] == [0.25, 0.5]
    axes = recorder.plot_loss(skip_start=0)
    valid = next(line for line in axes.lines if line.get_label() == "valid")
    assert list(valid.get_ydata()) == [v[1] for v in recorder.values]
    mpl.pyplot.close("all")


def test_without_time_or_with_training_metrics_the_column_is_still_the_last_value(tmp_path):
    learn = learner(tmp_path, metrics=accuracy)
    learn.recorder.add_time, learn.recorder.train_metrics = False, True
    learn.fit(1, cbs=sparsify())
    names = ["epoch", "train_loss", "train_accuracy", "valid_loss", "valid_accuracy", "sparsity"]
    assert list(learn.recorder.metric_names) == names
    assert len(learn.recorder.values[0]) == 5 and learn.recorder.values[0][-1] == 0.5


def test_without_a_recorder(tmp_path):
    learn, callback = learner(tmp_path), sparsify()
    learn.remove_cb(learn.recorder)
    learn.fit(1, cbs=callback)
    assert zeros(learn.model) == [30, 20]


def test_csv_logger(tmp_path):
    learn = learner(tmp_path, metrics=accuracy)
    learn.fit(2, cbs=[sparsify(), CSVLogger()])
    table = pd.read_csv(tmp_path / "history.csv")
    assert list(table.columns) == ["epoch", "train_loss", "valid_loss", "accuracy", "sparsity", "time"]
    assert list(table["sparsity"]) == [0.25, 0.5]


def test_progress_bars_print_the_column(tmp_path, capsys):
    learn = Learner(dls(), nn.Linear(6, 4), loss_func=CrossEntropyLossFlat(), path=tmp_path)
    learn.fit(1, cbs=sparsify())
    assert "sparsity" in capsys.readouterr().out


def test_the_loss_is_shown_to_participants_and_their_answer_is_trained_on(tmp_path):
    class Doubles(Participant):
        def after_loss(self, loss, batch):
            assert batch.inputs[0].shape == (8, 6) and batch.targets[0].shape == (8,)
            return loss * 2

    plain, doubled = learner(tmp_path, opt_func=SGD), learner(tmp_path, opt_func=SGD)
    plain.fit(1, lr=0.2)
    doubled.fit(1, lr=0.1, cbs=ParticipantCallback(Doubles()))
    for a, b in zip(plain.model.parameters(), doubled.model.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    assert float(plain.recorder.losses[0]) == pytest.approx(float(doubled.recorder.losses[0]))  # logged as fastai's own


def test_two_participants_in_one_callback(tmp_path):
    learn = learner(tmp_path)
    first = Sparsifier(learn.model, sparsity=0.5, schedule=linear, targets="0.weight")
    second = Sparsifier(learn.model, "row", sparsity=0.5, schedule=linear, targets="2.weight")
    learn.fit(1, cbs=ParticipantCallback(first, second))
    assert zeros(learn.model) == [30, 20]


# --- what is no training ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trained", [False, True])
def test_lr_find_does_not_prune(tmp_path, trained):
    callback = sparsify()
    learn = learner(tmp_path, cbs=callback)
    if trained:
        learn.fit(1)
    before = copy.deepcopy(learn.model.state_dict())
    masks = callback.sparsifier.masks if trained else {}
    suggested = learn.lr_find(num_it=12, show_plot=False)
    assert suggested.valley > 0
    assert all(torch.equal(before[n], x) for n, x in learn.model.state_dict().items())
    if trained:
        assert all(torch.equal(masks[n], m) for n, m in callback.sparsifier.masks.items())
    else:
        assert callback.sparsifier is None
    learn.fit(1)
    assert zeros(learn.model) == [30, 20]


def test_lr_find_that_fails_does_not_switch_the_next_fit_off(tmp_path):
    callback = sparsify()
    learn = learner(tmp_path, cbs=callback)
    learn.add_cb(raising := Raising("after_loss", ZeroDivisionError("no"), 3))
    with pytest.raises(ZeroDivisionError):
        learn.lr_find(num_it=12, show_plot=False)
    learn.remove_cb(raising)
    assert zeros(learn.model) == [0, 0]
    learn.fit(1)
    assert zeros(learn.model) == [30, 20]


def test_validate_and_predictions_change_nothing(tmp_path):
    callback = sparsify(0.5, lth=True, reset_end=True, save_tickets=True)
    learn = learner(tmp_path, cbs=callback, metrics=accuracy)
    learn.create_opt()
    before = copy.deepcopy(learn.model.state_dict())
    assert len(learn.validate()) == 2 == len(learn.validate())
    assert len(learn.get_preds()) == 2
    assert callback.sparsifier is None and not list(tmp_path.rglob("*ticket*"))
    assert all(torch.equal(before[n], x) for n, x in learn.model.state_dict().items())


def test_validate_with_the_callback_as_cbs_after_a_fit(tmp_path):
    learn, callback = learner(tmp_path, metrics=accuracy), sparsify()
    learn.fit(1, cbs=callback)
    before, values = copy.deepcopy(learn.model.state_dict()), learn.validate()
    assert list(learn.validate(cbs=callback)) == list(values)
    learn.get_preds(cbs=callback)
    assert all(torch.equal(before[n], x) for n, x in learn.model.state_dict().items())
    learn.fit(1, cbs=callback)
    assert zeros(learn.model) == [30, 20]


def test_predictions_within_a_fit_do_not_disturb_it(tmp_path):
    class Fetches(Callback):
        order = 95

        def after_validate(self):
            if not hasattr(self.learn, "gather_preds"):
                with self.learn.removed_cbs([self.learn.recorder]):
                    self.learn.get_preds(inner=True)

    learn, callback, steps = learner(tmp_path), sparsify(), ZerosPerStep()
    learn.fit(2, cbs=[callback, steps, Fetches()])
    assert [v[-1] for v in learn.recorder.values] == [0.25, 0.5]
    assert steps.seen[-1] == [30, 20] and len(steps.seen) == 8


# --- several fits -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attached", ["cbs", "learner"])
def test_fine_tune_leaves_frozen_weights_alone_and_does_not_fall_back(tmp_path, attached):
    callback, steps = sparsify(), ZerosPerStep()
    learn = learner(tmp_path, splitter=body_and_head, cbs=callback if attached == "learner" else None)
    frozen = learn.model[0].weight.clone()

    class Frozen(Callback):
        def after_epoch(self):
            if not self.learn.model[0].weight.requires_grad:
                assert torch.equal(self.learn.model[0].weight, frozen)

    learn.fine_tune(1, cbs=[steps, Frozen()] if attached == "learner" else [callback, steps, Frozen()])
    first, second = steps.seen[:BATCHES], steps.seen[BATCHES:]
    assert first == [[0, 5], [0, 10], [0, 15], [0, 20]]
    assert second == [[8, 20], [15, 20], [22, 20], [30, 20]]


def test_a_second_fit_with_a_rising_schedule_never_falls(tmp_path):
    learn, callback, steps = learner(tmp_path), sparsify(), ZerosPerStep()
    learn.fit(1, cbs=callback)
    learn.fit(1, cbs=[callback, steps])
    assert steps.seen == [[30, 20]] * BATCHES


def test_hold_keeps_the_sparsity_and_without_it_weights_return(tmp_path):
    learn, callback, steps = learner(tmp_path), sparsify(), ZerosPerStep()
    learn.fit(1, cbs=callback)
    learn.fit(1, cbs=[HoldCallback(callback.sparsifier), steps])
    assert steps.seen == [[30, 20]] * BATCHES
    assert learn.recorder.values[-1][-1] == 0.5
    learn.fit(1)
    assert zeros(learn.model) != [30, 20]


def test_start_epoch_goes_on_in_the_schedule(tmp_path):
    learn, steps = learner(tmp_path), ZerosPerStep()
    learn.fit(4, cbs=[sparsify(0.8), steps], start_epoch=2)
    # steps 9 to 16 of 16: 0.8 * k / 16 of 40
    assert [seen[1] for seen in steps.seen] == [18, 20, 22, 24, 26, 28, 30, 32]


def test_fit_of_no_epochs(tmp_path):
    learn, callback = learner(tmp_path), sparsify()
    learn.fit(0, cbs=callback)
    assert callback.sparsifier is None and zeros(learn.model) == [0, 0]


def test_another_model_gets_a_sparsifier_of_its_own(tmp_path):
    callback = sparsify()
    first, second = learner(tmp_path), learner(tmp_path, seed=3)
    first.fit(1, cbs=callback)
    ours = callback.sparsifier
    second.fit(1, cbs=callback)
    assert callback.sparsifier is not ours
    assert zeros(first.model) == zeros(second.model) == [30, 20]


# --- runs that end early ------------------------------------------------------------------------------------------------

EVENTS = [
    "before_fit",
    "before_epoch",
    "before_train",
    "before_batch",
    "after_pred",
    "after_loss",
    "before_backward",
    "after_backward",
    "before_step",
    "after_step",
    "after_batch",
    "after_train",
    "before_validate",
    "after_validate",
    "after_epoch",
    "after_fit",
]


@pytest.mark.parametrize(
    ("event", "error", "order"),
    [(event, KeyboardInterrupt(), 99) for event in EVENTS]
    + [(event, ValueError("no"), -20) for event in ("before_fit", "before_batch", "before_step", "after_step")],
)
@pytest.mark.parametrize("attached", ["cbs", "learner"])
def test_a_failed_fit_leaves_a_usable_model_and_the_next_starts_clean(tmp_path, attached, event, error, order):
    learn, callback = learner(tmp_path, data=dls(2)), sparsify()
    keys = list(learn.model.state_dict())
    if attached == "learner":
        learn.add_cb(callback)
    inner = 2 if event in EVENTS[3:11] else 1
    raising = Raising(event, error, inner, order)
    with pytest.raises(type(error)):
        learn.fit(2, cbs=[raising] if attached == "learner" else [callback, raising])
    if attached == "cbs":
        assert not callback.loop.running
        clean(learn, keys)
        if callback.sparsifier:
            for name, mask in callback.sparsifier.masks.items():
                assert not learn.model.get_parameter(name)[~mask].any()
    learn.validate()
    before = copy.deepcopy(learn.model.state_dict())
    steps = ZerosPerStep()
    learn.fit(1, cbs=[steps] if attached == "learner" else [callback, steps])
    assert steps.seen[-1] == [30, 20]
    assert steps.seen[0][0] >= zeros_of(before)[0]  # nothing pruned came back
    if attached == "learner":
        learn.remove_cb(callback)
    clean(learn, keys)


@pytest.mark.parametrize("attached", ["cbs", "learner"])
def test_every_run_is_ended_for_its_participants_once(tmp_path, attached):
    class Notes(Participant):
        def __init__(self):
            self.seen = []

        def on_fit_start(self, fit):
            self.seen.append(fit.total_steps)

        def on_fit_end(self, completed):
            self.seen.append(completed)

    notes = Notes()
    learn, callback = learner(tmp_path), ParticipantCallback(notes)
    if attached == "learner":
        learn.add_cb(callback)
    ours = [] if attached == "learner" else [callback]
    with pytest.raises(KeyboardInterrupt):
        learn.fit(3, cbs=[*ours, Raising("after_batch", KeyboardInterrupt(), 5)])
    learn.fit(2, cbs=ours)
    learn.fit(1, cbs=[*ours, Raising("after_batch", CancelFitException(), 2)])
    learn.validate(cbs=ours)
    assert notes.seen == [12, False, 8, True, 4, False]


def zeros_of(state: dict[str, torch.Tensor]) -> list[int]:
    return [int((x == 0).sum()) for x in state.values() if x.dim() > 1]


@pytest.mark.parametrize("attached", ["cbs", "learner"])
def test_weights_loaded_after_an_interrupt_are_not_destroyed(tmp_path, attached):
    learn, callback = learner(tmp_path), sparsify(0.9)
    learn.save("dense")
    if attached == "learner":
        learn.add_cb(callback)
    raising = Raising("before_validate", KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        learn.fit(2, cbs=[raising] if attached == "learner" else [callback, raising])
    assert zeros(learn.model) == [27, 18]
    learn.load("dense")
    dense = copy.deepcopy(learn.model.state_dict())
    learn.validate()
    assert all(torch.equal(dense[n], x) for n, x in learn.model.state_dict().items())
    steps = ZerosPerStep()
    learn.fit(1, cbs=[steps] if attached == "learner" else [callback, steps])
    assert [seen[1] for seen in steps.seen] == [9, 18, 27, 36]


@pytest.mark.parametrize(
    ("error", "event", "n", "expected"),
    [
        (CancelFitException(), "before_batch", 4, [11, 8]),  # three steps of eight
        (CancelEpochException(), "before_batch", 8, [30, 20]),  # the run went to its end, and so does the sparsity
        (CancelTrainException(), "before_batch", 7, [30, 20]),
        (CancelBatchException(), "before_batch", 8, [30, 20]),
    ],
)
def test_cancelled_runs(tmp_path, error, event, n, expected):
    learn, callback = learner(tmp_path), sparsify()
    learn.fit(2, cbs=[callback, Raising(event, error, n)])
    assert zeros(learn.model) == expected
    assert not callback.loop.running
    for name, mask in callback.sparsifier.masks.items():
        assert not learn.model.get_parameter(name)[~mask].any()


def test_early_stopping_keeps_what_was_reached(tmp_path):
    learn, callback = learner(tmp_path), sparsify()
    # never better by a thousand: the first epoch is the best, and after the second the fit stops
    learn.fit(4, lr=1e-6, cbs=[callback, EarlyStoppingCallback(min_delta=1000.0, patience=2)])
    epochs = len(learn.recorder.values)
    assert epochs < 4
    assert callback.current_sparsity == pytest.approx(0.125 * epochs, abs=0.01)
    assert learn.recorder.values[-1][-1] == callback.current_sparsity


def test_short_epochs_end_exactly(tmp_path):
    learn, callback = learner(tmp_path), sparsify()
    learn.fit(2, cbs=[callback, ShortEpochCallback(pct=0.3)])
    assert zeros(learn.model) == [30, 20]
    assert learn.recorder.values == [] or learn.recorder.values[-1][-1] == 0.5


# --- saving ---------------------------------------------------------------------------------------------------------------


def test_save_and_load_within_and_after_a_fit(tmp_path):
    class Saves(Callback):
        def after_batch(self):
            self.learn.save("within")

    learn = learner(tmp_path)
    keys = list(learn.model.state_dict())
    learn.fit(1, cbs=[sparsify(), Saves()])
    learn.save("after")
    for name in ("within", "after"):
        fresh = learner(tmp_path, seed=9)
        fresh.load(name)
        assert list(torch.load(tmp_path / "models" / f"{name}.pth", weights_only=False)["model"]) == keys
    assert zeros(fresh.model) == [30, 20]


@pytest.mark.parametrize("options", [{}, {"every_epoch": True}, {"at_end": True}, {"with_opt": True}])
def test_save_model_callback(tmp_path, options):
    learn = learner(tmp_path)
    keys = list(learn.model.state_dict())
    learn.fit(2, cbs=[sparsify(), SaveModelCallback(fname="best", **options)])
    clean(learn, keys)
    saved = sorted(p.stem for p in (tmp_path / "models").glob("*.pth"))
    assert saved == (["best_0", "best_1"] if "every_epoch" in options else ["best"])
    learner(tmp_path, seed=4).load(saved[-1], weights_only=False)


def test_the_model_that_is_saved_in_the_last_epoch_is_as_sparse_as_the_end(tmp_path):
    learn = learner(tmp_path)
    # steps of 3 batches in epochs of 4: the last two batches of the run make none
    callbacks = [sparsify(), GradientAccumulation(24), SaveModelCallback(fname="best", every_epoch=True)]
    learn.fit(2, cbs=callbacks)
    assert learn.recorder.values[-1][-1] == 0.5
    fresh = learner(tmp_path, seed=4).load("best_1", with_opt=False)
    assert zeros(fresh.model) == [30, 20]


def tabular(tmp_path, **options) -> Learner:
    g = torch.Generator().manual_seed(0)
    frame = pd.DataFrame({"a": torch.randn(32, generator=g), "b": torch.randn(32, generator=g)})
    frame["y"] = frame["a"] + frame["b"]
    data = TabularDataLoaders.from_df(frame, procs=[Normalize], cont_names=["a", "b"], y_names="y", bs=8, path=tmp_path)
    learn = tabular_learner(data, layers=[10, 5], n_out=1, path=tmp_path, **options)
    learn.remove_cb(learn.progress)
    learn.logger = lambda log: None
    return learn


@pytest.mark.filterwarnings("ignore:load_learner")
@pytest.mark.parametrize("failed", [False, True])
def test_export_with_the_callback_attached(tmp_path, failed):
    learn = tabular(tmp_path, cbs=sparsify())
    if failed:
        with learn.added_cbs(Raising("after_step", RuntimeError("no"), 2, 99)), pytest.raises(RuntimeError):
            learn.fit(1)
    else:
        learn.fit(1)
    expected = copy.deepcopy(learn.model.state_dict())
    learn.export("model.pkl")
    loaded = load_learner(tmp_path / "model.pkl")
    assert all(torch.equal(expected[n], x) for n, x in loaded.model.state_dict().items())
    row = pd.Series({"a": 0.5, "b": -0.5})
    torch.testing.assert_close(loaded.predict(row)[2], learn.predict(row)[2])
    assert loaded.sparsify.sparsifier.model is loaded.model
    if not failed:
        assert loaded.sparsify.current_sparsity == learn.sparsify.current_sparsity > 0.49


@pytest.mark.parametrize("trained", [False, True])
def test_the_callback_can_be_pickled_and_copied(tmp_path, trained):
    callback = sparsify()
    if trained:
        learner(tmp_path).fit(1, cbs=callback)
    for twin in (pickle.loads(pickle.dumps(callback)), copy.deepcopy(callback)):
        learn = learner(tmp_path)
        learn.fit(1, cbs=twin)
        assert zeros(learn.model) == [30, 20]


# --- other callbacks of fastai --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("items", [16, 24, 80])
def test_gradient_accumulation_ends_exactly(tmp_path, items):
    learn, callback = learner(tmp_path), sparsify()
    learn.fit(2, cbs=[callback, GradientAccumulation(items)])
    assert zeros(learn.model) == [30, 20]
    assert learn.recorder.values[-1][-1] == 0.5


def test_gradient_accumulation_keeps_the_position_of_the_batches(tmp_path):
    learn, steps = learner(tmp_path), ZerosPerStep()
    learn.fit(2, cbs=[sparsify(0.8), steps, GradientAccumulation(24)])
    # steps at the batches 3 and 6 of 8
    assert [seen[1] for seen in steps.seen] == [12, 24]
    assert zeros(learn.model) == [48, 32]


def test_gradient_clip_and_mixup(tmp_path):
    learn = learner(tmp_path)
    learn.fit(2, cbs=[sparsify(criteria="taylor"), GradientClip(0.1), MixUp()])
    assert zeros(learn.model) == [30, 20]
    assert learn.loss_func.__class__ is CrossEntropyLossFlat


class HalfPrecision(MixedPrecision):
    """fastai's callback asks for CUDA by name; this one does the same on the CPU."""

    def before_fit(self):
        super().before_fit()
        self.autocast = torch.autocast("cpu", dtype=torch.bfloat16)
        self.learn.scaler = torch.amp.GradScaler("cpu", enabled=False)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("precision", ["to_fp16", "to_bf16", HalfPrecision(amp_mode="bf16")], ids=["fp16", "bf16", "cpu"])
def test_mixed_precision(tmp_path, precision):
    learn, steps = learner(tmp_path), ZerosPerStep()
    learn = getattr(learn, precision)() if isinstance(precision, str) else learn.add_cb(precision)
    learn.fit(1, cbs=[sparsify(), steps])
    assert steps.seen == [[8, 5], [15, 10], [22, 15], [30, 20]]
    assert next(learn.model.parameters()).dtype is torch.float32


def test_a_model_in_half_precision(tmp_path):
    class ToHalf(Callback):
        def before_batch(self):
            self.learn.xb = tuple(x.bfloat16() for x in self.learn.xb)

        def after_pred(self):
            self.learn.pred = self.learn.pred.float()

    learn = learner(tmp_path, model=nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 4)).bfloat16(), opt_func=SGD)
    learn.fit(1, cbs=[sparsify(), ToHalf()])
    assert zeros(learn.model) == [30, 20]


@pytest.mark.parametrize("order", [10, 99])
def test_steps_that_are_skipped_do_not_score(tmp_path, order):
    class Overflows(Callback):
        """As fastai's mixed precision does: the gradients are infinite and the step is left out."""

        def __init__(self):
            self.order = order

        def before_step(self):
            if self.learn.train_iter in (0, 2):
                for p in self.learn.model.parameters():
                    p.grad.fill_(float("inf"))
                raise CancelStepException

    learn, callback = learner(tmp_path), sparsify(criteria="taylor")
    weights = []

    class Weights(Callback):
        def after_batch(self):
            weights.append(zeros(self.learn.model)[0])

    learn.fit(1, cbs=[callback, Overflows(), Weights()])
    assert weights[:BATCHES] == [0, 15, 15, 30]


def test_a_run_cut_short_does_not_score_by_gradients_that_fastai_has_cleared(tmp_path):
    learn, callback = learner(tmp_path), sparsify(criteria="taylor")
    with pytest.warns(UserWarning, match=r"at sparsity 0\.3700 \(criteria needs gradients, and all of them are zero"):
        learn.fit(1, cbs=[callback, ShortEpochCallback(pct=0.5)])
    assert zeros(learn.model) == [22, 15]  # three of the four steps were taken


def test_criteria_that_read_the_batch(tmp_path):
    learn, callback = learner(tmp_path), sparsify(criteria="wanda")
    learn.fit(1, cbs=callback)
    assert zeros(learn.model) == [30, 20]
    assert callback.sparsifier is not None
    pickle.dumps(callback)


# --- familiar calls -------------------------------------------------------------------------------------------------------


def conv_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 3)),
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )


def test_the_signature_by_position(tmp_path):
    learn = learner(tmp_path, model=conv_net())
    callback = SparsifyCallback(
        0.5, "filter", "local", "large_final", one_cycle, False, 0, False, False, learn.model, 4, False, nn.Conv2d
    )
    learn.fit_one_cycle(2, cbs=callback)
    assert callback.sparsity == 0.5 and callback.current_sparsity == 0.5
    assert [int((m.weight.flatten(1) == 0).all(1).sum()) for m in learn.model if isinstance(m, nn.Conv2d)] == [4, 4]
    assert not learn.model[-1].weight.eq(0).any()


def test_silent_filters_have_silent_norms_without_example_inputs(tmp_path):
    learn = learner(tmp_path, model=conv_net())
    learn.fit(1, cbs=SparsifyCallback(0.5, "filter", "global", "large_final", one_cycle))
    learn.model.eval()
    out = learn.model[:6](torch.randn(5, 6)).abs().amax((0, 2, 3))
    silent = (learn.model[4].weight.flatten(1) == 0).all(1)
    assert silent.any() and torch.equal(out == 0, silent)


def test_keywords_and_a_part_of_the_model(tmp_path):
    learn = learner(tmp_path, model=conv_net())
    part = learn.model[4]
    callback = SparsifyCallback(
        sparsity=0.25, granularity="weight", context="global", criteria="large_final", schedule=agp, model=part
    )
    learn.fit_one_cycle(1, cbs=callback)
    assert [int((m.weight == 0).sum()) for m in learn.model if isinstance(m, nn.Conv2d)] == [0, 144]


@pytest.mark.parametrize("schedule", [one_shot, iterative, agp])
def test_three_families_of_schedules(tmp_path, schedule):
    learn, steps = learner(tmp_path), ZerosPerStep()
    learn.fit_one_cycle(3, cbs=[SparsifyCallback(0.5, "weight", "local", "large_final", schedule), steps])
    first = [seen[0] for seen in steps.seen]
    assert first == sorted(first) and first[0] == 0 and first[-1] == 30
    assert len(set(first)) == 2 if schedule is one_shot else len(set(first)) > 2


def test_a_dict_of_layers(tmp_path):
    learn, callback = learner(tmp_path), sparsify({"0": 0.3})
    learn.fit_one_cycle(1, cbs=callback)
    assert zeros(learn.model) == [18, 0]


@pytest.mark.parametrize(
    "schedule",
    [
        Schedule(sched_iterative, start_pct=0.25),
        Schedule(partial(sched_iterative, n_steps=5), start_pct=0.2),
        Schedule(partial(sched_onecycle, α=10, β=4)),
        Schedule(lambda start, end, pos: start + pos * (end - start)),
    ],
)
def test_schedules_by_hand(tmp_path, schedule):
    learn = learner(tmp_path)
    learn.fit_one_cycle(2, cbs=SparsifyCallback(0.5, "weight", "local", "large_final", schedule))
    assert zeros(learn.model) == [30, 20]


def test_two_fits_with_one_schedule_do_not_share_a_position(tmp_path):
    schedule, counts = Schedule(sched_iterative, start_pct=0.25), []
    for _ in range(2):
        learn, steps = learner(tmp_path), ZerosPerStep()
        learn.fit(1, cbs=[SparsifyCallback(0.5, "weight", "local", "large_final", schedule), steps])
        counts.append(steps.seen)
    assert counts[0] == counts[1]


@pytest.mark.filterwarnings("ignore:lth rewinds")
def test_lottery_ticket_goes_back_to_the_start(tmp_path):
    learn = learner(tmp_path)
    initial = copy.deepcopy(learn.model.state_dict())
    callback = SparsifyCallback(0.5, "weight", "local", "large_final", one_shot, lth=True, reset_end=True)
    learn.fit(2, cbs=callback)
    masks = callback.sparsifier.masks
    for name, value in learn.model.state_dict().items():
        assert torch.equal(value, initial[name] * masks.get(name, 1))
    assert zeros(learn.model) == [30, 20]
    learn.validate()


def test_reset_end_alone_trains_on_and_goes_back_once(tmp_path):
    learn, steps = learner(tmp_path), ZerosPerStep()
    initial = copy.deepcopy(learn.model.state_dict())
    callback = sparsify(reset_end=True)
    trained = {}

    class Noting(Callback):
        order = 90

        def after_step(self):
            trained.update(copy.deepcopy(self.learn.model.state_dict()))

    learn.fit(1, lr=0.1, cbs=[callback, steps, Noting()])
    assert steps.seen[-1] == [30, 20]
    assert not torch.equal(trained["0.bias"], initial["0.bias"])
    masks = callback.sparsifier.masks
    for name, value in learn.model.state_dict().items():
        assert torch.equal(value, initial[name] * masks.get(name, 1))


@pytest.mark.parametrize("accumulate", [False, True])
def test_rewind_epoch_goes_back_to_the_beginning_of_that_epoch(tmp_path, accumulate):
    learn, seen = learner(tmp_path), []

    class Noting(Callback):
        order = 90

        def after_step(self):
            seen.append((self.learn.train_iter + 1, copy.deepcopy(self.learn.model.state_dict())))

    callback = SparsifyCallback(0.5, "weight", "local", "large_final", one_shot, lth=True, rewind_epoch=1)
    others = [GradientAccumulation(24)] if accumulate else []
    learn.fit(
        4, lr=0.1, cbs=[callback, Noting(), *others]
    )  # 16 batches; the masks move at the 8th, or with steps of three at the 9th
    states = dict(seen)
    early, moved = (states[6], states[9]) if accumulate else (states[4], states[8])
    for name, value in moved.items():
        assert torch.equal(value, early[name] * callback.sparsifier.masks.get(name, 1))
    assert zeros(learn.model) == [30, 20]


def test_rewind_epoch_out_of_the_run(tmp_path):
    learn = learner(tmp_path)
    callback = SparsifyCallback(0.5, "weight", "local", "large_final", one_shot, lth=True, rewind_epoch=2)
    with pytest.raises(ValueError, match="rewind_epoch must be below the 2 epochs of the run, got 2"):
        learn.fit(2, cbs=callback)
    assert not callback.loop.running


@pytest.mark.filterwarnings("ignore:lth rewinds")
def test_tickets_are_named_after_what_they_hold(tmp_path):
    learn = learner(tmp_path)
    callback = SparsifyCallback(0.6, "weight", "local", "large_final", Schedule(sched_iterative), lth=True, save_tickets=True)
    learn.fit(3, cbs=callback)
    tickets = sorted((tmp_path / "models").glob("winning_ticket_*.pt"))
    assert [t.stem for t in tickets] == ["winning_ticket_0.2000", "winning_ticket_0.4000", "winning_ticket_0.6000"]
    for ticket, share in zip(tickets, (0.2, 0.4, 0.6), strict=True):
        state = torch.load(ticket, weights_only=True)
        assert zeros_of(state) == [round(60 * share), round(40 * share)]
        learn.model.load_state_dict(state)


def test_the_old_home_and_the_short_import():
    from fasterai.prune import prune_callback
    from fasterai.sparse import sparsify_callback
    from fasterai.sparse.all import SparsifyCallback as Short

    assert Short is SparsifyCallback is sparsify_callback.SparsifyCallback
    assert prune_callback.PruneCallback is adapter.PruneCallback
    ours = {"HoldCallback", "KnowledgeDistillationCallback", "ParticipantCallback", "PruneCallback", "SparsifyCallback"}
    assert ours < set(adapter.__all__) and all(name.endswith("Callback") for name in adapter.__all__)


def test_in_a_trainer_of_lightning_it_names_the_right_import():
    pl = pytest.importorskip("lightning.pytorch")
    right = "got fastai's SparsifyCallback; from fasterai.callbacks.lightning import SparsifyCallback below any `from fasterai"
    with pytest.raises(TypeError, match=right):
        pl.Trainer(callbacks=[SparsifyCallback(0.5, "weight", "local", "large_final", one_cycle)], logger=False)


def test_what_it_has_not_is_missing_as_ever():
    callback = SparsifyCallback(0.5, "weight", "local", "large_final", one_cycle)
    with pytest.raises(AttributeError, match="nothing"):
        callback.nothing  # noqa: B018 - asked for
    assert not hasattr(callback, "on_save_checkpoint")
