import copy
import pickle
import warnings

import lightning.pytorch as pl
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    Checkpoint,
    EarlyStopping,
    LearningRateFinder,
    ModelCheckpoint,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.tuner import Tuner
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from fasterai.callbacks.lightning import HoldCallback, ParticipantCallback, SparsifyCallback
from fasterai.core.loop import Participant
from fasterai.model.cuts import noted_optimizers
from fasterai.sparse.sparsifier import Sparsifier

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*number of training batches"),
    pytest.mark.filterwarnings("ignore:.*Checkpoint directory"),
    pytest.mark.filterwarnings("ignore:.*ModelCheckpoint"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
    pytest.mark.filterwarnings("ignore:.*IterableDataset"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec"),
    pytest.mark.filterwarnings("ignore:.*litlogger"),
]

BATCHES = 4  # in an epoch


class Net(pl.LightningModule):
    def __init__(self, seed: int = 0, lr: float = 0.01):
        super().__init__()
        torch.manual_seed(seed)
        self.lr = lr
        self.batch_size = 2
        self.net = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 4))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self(x), y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("valid_loss", F.cross_entropy(self(x), y))

    test_step = validation_step

    def predict_step(self, batch, batch_idx):
        return self(batch[0])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=self.lr)


class Manual(Net):
    """Two optimizers, one for each layer; in every batch both step, if they take turns with the other's layer frozen."""

    def __init__(self, every: int = 1, turns: bool = False):
        super().__init__()
        self.automatic_optimization = False
        self.every, self.turns = every, turns
        self.seen = []

    def training_step(self, batch, batch_idx):
        x, y = batch
        for optimizer in self.optimizers():
            if self.turns:
                self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(self(x), y))
            if (batch_idx + 1) % self.every == 0:
                optimizer.step()
                self.seen.append(zeros(self))
            if self.turns:
                self.untoggle_optimizer(optimizer)

    def configure_optimizers(self):
        return [torch.optim.Adam(self.net[i].parameters(), lr=0.01) for i in (0, 2)]


def loader(n: int = BATCHES, batch_size: int = 8) -> DataLoader:
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(8 * n, 6, generator=g), torch.randint(4, (8 * n,), generator=g)
    return DataLoader(TensorDataset(x, y), batch_size=batch_size)


def trainer(path, *callbacks, **options) -> pl.Trainer:
    settings = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(c, Checkpoint) for c in callbacks),
        "default_root_dir": path,
        "max_epochs": 2,
    }
    return pl.Trainer(callbacks=list(callbacks), **{**settings, **options})


def linear(position: float) -> float:
    return position


def sparsify(sparsity=0.5, criteria="large_final", context="local", **options) -> SparsifyCallback:
    return SparsifyCallback(sparsity, "weight", context, criteria, linear, **options)


def zeros(model: nn.Module) -> list[int]:
    return [int((p == 0).sum()) for p in model.parameters() if p.dim() > 1]


class ZerosPerBatch(pl.Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append(zeros(pl_module))


class Raising(pl.Callback):
    """Raises at the n-th call of an event."""

    def __init__(self, event, error, n=1):
        self.left = n
        setattr(self, event, lambda *_, **__: self._raise(error))

    def _raise(self, error):
        self.left -= 1
        if self.left == 0:
            raise error


def clean(model: Net, trainer: pl.Trainer, callback: SparsifyCallback) -> None:
    """Nothing of ours is left on the model and on the optimizers, and masked weights are zero."""
    assert list(model.state_dict()) == ["net.0.weight", "net.0.bias", "net.2.weight", "net.2.bias"]
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())
    assert not any(o._optimizer_step_post_hooks or o._optimizer_step_pre_hooks for o in trainer.optimizers)
    assert not callback.loop.running
    if callback.sparsifier is not None:
        for name, mask in callback.sparsifier.masks.items():
            assert not model.get_parameter(name)[~mask].any()


# --- the run ------------------------------------------------------------------------------------------------------------


def test_follows_the_schedule_and_ends_exactly(tmp_path):
    model, callback, steps = Net(), sparsify(), ZerosPerBatch()
    fit = trainer(tmp_path, callback, steps)
    fit.fit(model, loader(), loader())
    # 60 and 40 weights at 1/16, 2/16, ... of them; halves round to even
    assert steps.seen == [[4, 2], [8, 5], [11, 8], [15, 10], [19, 12], [22, 15], [26, 18], [30, 20]]
    assert float(fit.callback_metrics["sparsity"]) == 0.5
    assert callback.current_sparsity == 0.5
    clean(model, fit, callback)


def test_the_sparsity_is_logged(tmp_path):
    logger = CSVLogger(tmp_path, name="run", version=0)
    trainer(tmp_path, sparsify(), logger=logger).fit(Net(), loader())
    table = pd.read_csv(tmp_path / "run" / "version_0" / "metrics.csv")
    assert list(table["sparsity"].dropna()) == [0.25, 0.5]


def test_positional_arguments_and_names_of_the_whole_module(tmp_path):
    model = Net()
    callback = SparsifyCallback(0.9, "weight", "global", "large_final", "one_cycle")
    trainer(tmp_path, callback).fit(model, loader())
    assert sum(zeros(model)) == 90
    assert list(callback.sparsifier.masks) == ["net.0.weight", "net.2.weight"]


def test_a_part_of_the_module(tmp_path):
    model = Net()
    callback = sparsify(model=model.net[2])
    trainer(tmp_path, callback).fit(model, loader())
    assert zeros(model) == [0, 20]


def test_the_position_is_the_one_after_the_step_and_gradients_are_there(tmp_path):
    model = Net()

    class Notes(Participant):
        def __init__(self):
            self.seen = []

        def after_loss(self, loss, batch):
            assert batch.inputs[0].shape == (8, 6) and batch.targets[0].shape == (8,)
            return loss

        def before_step(self, position):
            assert model.net[0].weight.grad.abs().sum() > 0
            self.seen.append(("before", position))

        def after_step(self, position):
            assert model.net[0].weight.grad.abs().sum() > 0
            self.seen.append(("after", position))

    notes = Notes()
    trainer(tmp_path, ParticipantCallback(notes), max_epochs=1).fit(model, loader())
    assert notes.seen == [(when, p) for p in (0.25, 0.5, 0.75, 1.0) for when in ("before", "after")]


class Doubles(Participant):
    def after_loss(self, loss, batch):
        return loss * 2


def test_a_participant_changes_the_loss_and_nothing_is_left_on_the_module(tmp_path):
    class Slow(Net):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.05)

    class Fast(Net):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    doubled, plain = Slow(), Fast()
    trainer(tmp_path, ParticipantCallback(Doubles()), accumulate_grad_batches=2).fit(doubled, loader())
    trainer(tmp_path, accumulate_grad_batches=2).fit(plain, loader())
    for a, b in zip(doubled.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    assert not {"training_step", "configure_gradient_clipping"} & vars(doubled).keys()


def test_manual_optimization_lets_nobody_change_the_loss(tmp_path):
    class Manual(Net):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
            self.optimizers().step()

    with pytest.raises(ValueError, match="automatic_optimization must be True for Doubles, which changes the loss, got False"):
        trainer(tmp_path, ParticipantCallback(Doubles()), max_steps=2).fit(Manual(), loader())


def test_two_participants_in_one_callback(tmp_path):
    model = Net()
    first = Sparsifier(model, sparsity=0.5, schedule=linear, targets="net.0.weight")
    second = Sparsifier(model, "row", sparsity=0.5, schedule=linear, targets="net.2.weight")
    trainer(tmp_path, ParticipantCallback(first, second)).fit(model, loader())
    assert zeros(model) == [30, 20]


def test_hold(tmp_path):
    model, callback, steps = Net(), sparsify(), ZerosPerBatch()
    trainer(tmp_path, callback).fit(model, loader())
    fit = trainer(tmp_path, HoldCallback(callback.sparsifier), steps)
    fit.fit(model, loader())
    assert steps.seen == [[30, 20]] * 8
    assert float(fit.callback_metrics["sparsity"]) == 0.5


# --- options of the trainer ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # 4 batches in pairs: 4 steps in all
        ({"accumulate_grad_batches": 2}, [[0, 0], [8, 5], [8, 5], [15, 10], [15, 10], [22, 15], [22, 15], [30, 20]]),
        # 3 and 1: Lightning steps at the end of an epoch
        ({"accumulate_grad_batches": 3}, [[0, 0], [0, 0], [8, 5], [15, 10], [15, 10], [15, 10], [22, 15], [30, 20]]),
        ({"gradient_clip_val": 0.1}, [[4, 2], [8, 5], [11, 8], [15, 10], [19, 12], [22, 15], [26, 18], [30, 20]]),
        ({"precision": "bf16-mixed"}, [[4, 2], [8, 5], [11, 8], [15, 10], [19, 12], [22, 15], [26, 18], [30, 20]]),
        ({"precision": "bf16-true"}, [[4, 2], [8, 5], [11, 8], [15, 10], [19, 12], [22, 15], [26, 18], [30, 20]]),
        ({"limit_train_batches": 2}, [[8, 5], [15, 10], [22, 15], [30, 20]]),
        ({"max_steps": 5}, [[6, 4], [12, 8], [18, 12], [24, 16], [30, 20]]),
        ({"max_steps": 5, "max_epochs": -1}, [[6, 4], [12, 8], [18, 12], [24, 16], [30, 20]]),
        ({"max_steps": 5, "max_epochs": 1}, [[8, 5], [15, 10], [22, 15], [30, 20]]),
        ({"max_steps": 2, "accumulate_grad_batches": 2}, [[0, 0], [15, 10], [15, 10], [30, 20]]),
    ],
)
def test_options_of_the_trainer(tmp_path, options, expected):
    model, steps = Net(), ZerosPerBatch()
    fit = trainer(tmp_path, sparsify(), steps, **options)
    fit.fit(model, loader())
    assert steps.seen == expected
    assert zeros(model) == [30, 20]
    assert float(fit.callback_metrics["sparsity"]) == 0.5


class Endless(IterableDataset):
    def __iter__(self):
        while True:
            yield torch.ones(6), 1


def test_an_endless_data_set_with_max_steps(tmp_path):
    model, steps = Net(), ZerosPerBatch()
    fit = trainer(tmp_path, sparsify(), steps, max_steps=5, max_epochs=-1)
    fit.fit(model, DataLoader(Endless(), batch_size=2))
    assert steps.seen == [[6, 4], [12, 8], [18, 12], [24, 16], [30, 20]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"max_epochs": -1},
            "max_epochs or max_steps of the Trainer must give the run an end, got max_epochs=-1 and max_steps=-1",
        ),
        ({"max_epochs": 2}, "must give the run an end, got max_epochs=2 and max_steps=-1 with inf batches an epoch"),
    ],
)
def test_a_run_without_an_end_is_an_error_before_a_weight_changes(tmp_path, options, message):
    model = Net()
    before = copy.deepcopy(model.state_dict())
    callback = sparsify()
    fit = trainer(tmp_path, callback, **options)
    with pytest.raises(ValueError, match=message):
        fit.fit(model, DataLoader(Endless(), batch_size=2))
    assert all(torch.equal(before[n], x) for n, x in model.state_dict().items())
    clean(model, fit, callback)


@pytest.mark.parametrize("turns", [False, True])
@pytest.mark.parametrize("options", [{}, {"max_steps": 16}, {"max_steps": 16, "max_epochs": -1}])
def test_manual_optimization_with_two_optimizers(tmp_path, options, turns):
    model, callback = Manual(turns=turns), sparsify()
    fit = trainer(tmp_path, callback, **options)
    fit.fit(model, loader())
    assert len(model.seen) == 16
    assert model.seen[-1] == [30, 20] == zeros(model)
    if not options:  # both steps of a batch have its position
        counts = [[4, 2], [8, 5], [11, 8], [15, 10], [19, 12], [22, 15], [26, 18], [30, 20]]
        assert model.seen == [c for c in counts for _ in range(2)]
    else:  # the trainer counts optimizer steps
        assert model.seen == [[round(60 * k / 32), round(40 * k / 32)] for k in range(1, 17)]
    clean(model, fit, callback)


def test_networks_that_take_turns_wait_until_both_have_gradients(tmp_path):
    model = Manual(turns=True)
    trainer(tmp_path, sparsify(criteria="taylor")).fit(model, loader())
    # At the very first step the second layer has had no gradient yet.
    assert model.seen[:4] == [[0, 0], [4, 2], [8, 5], [8, 5]]
    assert zeros(model) == [30, 20]


def test_channels_between_networks_that_take_turns(tmp_path):
    model = Manual(turns=True)
    callback = SparsifyCallback(0.5, "coupled", "local", "large_final", linear)
    trainer(tmp_path, callback).fit(model, loader())
    assert model.seen[7] == [12, 8]  # 2 of the 10 hidden channels at half of the run: round(2.5)
    assert zeros(model) == [30, 20]


def test_all_optimizers_are_known_to_those_that_take_part(tmp_path):
    class Notes(Participant):
        def on_fit_start(self, fit):
            self.optimizers = fit.optimizers

    for model, n in ((Net(), 1), (Manual(), 2)):
        notes, callback = Notes(), sparsify(lth=True)
        fit = trainer(tmp_path, ParticipantCallback(notes), callback, max_epochs=1)
        fit.fit(model, loader())
        assert notes.optimizers == fit.optimizers
        assert len(notes.optimizers) == n
        assert {id(o) for o in noted_optimizers(model)} == {id(o) for o in fit.optimizers}


class Normed(Net):
    def __init__(self):
        super().__init__()
        self.net.insert(1, nn.BatchNorm1d(10))


def test_the_epoch_that_swa_adds_for_its_norms_is_no_part_of_the_schedule(tmp_path):
    steps, averaging = ZerosPerBatch(), StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)
    trainer(tmp_path, sparsify(), averaging, steps).fit(Normed(), loader())
    assert len(steps.seen) == 3 * BATCHES
    assert steps.seen[: 2 * BATCHES] == [[4, 2], [8, 5], [11, 8], [15, 10], [19, 12], [22, 15], [26, 18], [30, 20]]


def test_manual_optimization_that_steps_in_some_batches_ends_exactly(tmp_path):
    model = Manual(every=3)  # batches 3 and 7 of 8
    trainer(tmp_path, sparsify()).fit(model, loader())
    assert model.seen == [[11, 8]] * 2 + [[26, 18]] * 2
    assert zeros(model) == [30, 20]


# --- what is no training ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trained", [False, True])
def test_lr_find_does_not_prune(tmp_path, trained):
    model, callback = Net(), sparsify()
    fit = trainer(tmp_path, callback)
    if trained:
        fit.fit(model, loader())
        fit = trainer(tmp_path, callback)
    before = copy.deepcopy(model.state_dict())
    masks = callback.sparsifier.masks if trained else {}
    Tuner(fit).lr_find(model, loader(), num_training=5, update_attr=False)
    assert all(torch.equal(before[n], x) for n, x in model.state_dict().items())
    if trained:
        assert all(torch.equal(masks[n], m) for n, m in callback.sparsifier.masks.items())
    else:
        assert callback.sparsifier is None
    steps = ZerosPerBatch()
    fit = trainer(tmp_path, callback, steps)
    fit.fit(model, loader())
    assert steps.seen[-1] == [30, 20]
    assert steps.seen[0] == ([30, 20] if trained else [4, 2])


@pytest.mark.parametrize("finder", [LearningRateFinder(num_training_steps=5), BatchSizeFinder(max_trials=1, init_val=4)])
def test_finders_within_a_fit(tmp_path, finder):
    class Sized(Net):
        def train_dataloader(self):
            return loader(batch_size=self.batch_size)

        def val_dataloader(self):
            return loader()

    model, callback = Sized(), sparsify()
    trainer(tmp_path, callback).fit(model)
    model.load_state_dict(Net(seed=3).state_dict())
    steps = ZerosPerBatch()
    fit = trainer(tmp_path, callback, finder, steps)
    fit.fit(model)
    assert steps.seen[0][0] < 10 and steps.seen[-1] == [30, 20]


def test_validate_test_and_predict_change_nothing(tmp_path):
    model, callback = Net(), sparsify()
    fit = trainer(tmp_path, callback)
    before = copy.deepcopy(model.state_dict())
    fit.validate(model, loader(), verbose=False)
    fit.test(model, loader(), verbose=False)
    fit.predict(model, loader())
    assert callback.sparsifier is None
    assert all(torch.equal(before[n], x) for n, x in model.state_dict().items())
    fit.fit(model, loader())
    after = copy.deepcopy(model.state_dict())
    fit.validate(model, loader(), verbose=False)
    fit.predict(model, loader())
    assert all(torch.equal(after[n], x) for n, x in model.state_dict().items())
    clean(model, fit, callback)


# --- several fits and runs that end early -------------------------------------------------------------------------------


def test_a_second_trainer_goes_on_from_the_masks(tmp_path):
    model, callback, steps = Net(), sparsify(), ZerosPerBatch()
    trainer(tmp_path, callback).fit(model, loader())
    trainer(tmp_path, callback, steps).fit(model, loader())
    assert steps.seen == [[30, 20]] * 8


def test_the_same_trainer_twice(tmp_path):
    model, callback, steps = Net(), sparsify(), ZerosPerBatch()
    fit = trainer(tmp_path, callback, steps)
    fit.fit(model, loader())
    fit.fit(model, loader())  # its epochs are done
    assert len(steps.seen) == 8
    fit.fit_loop.max_epochs = 4
    fit.fit(model, loader())
    assert steps.seen[8:] == [[30, 20]] * len(steps.seen[8:])
    assert len(steps.seen) == 16
    clean(model, fit, callback)


def test_the_same_trainer_with_another_model(tmp_path):
    callback = sparsify()
    first, second = Net(), Net(seed=5)
    trainer(tmp_path, callback).fit(first, loader())
    steps = ZerosPerBatch()
    trainer(tmp_path, callback, steps).fit(second, loader())
    assert steps.seen[0] == [4, 2] and zeros(second) == [30, 20]


EVENTS = [
    "setup",
    "on_fit_start",
    "on_train_start",
    "on_train_epoch_start",
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
    "on_validation_start",
    "on_train_epoch_end",
    "on_train_end",
]


@pytest.mark.parametrize("first", [False, True], ids=["after us", "before us"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), ZeroDivisionError("no")], ids=["interrupt", "error"])
@pytest.mark.parametrize("event", EVENTS)
def test_a_failed_fit_leaves_a_usable_model_and_the_next_starts_clean(tmp_path, event, error, first):
    model, callback = Net(), sparsify()
    raising = Raising(event, error, 2 if event in EVENTS[4:10] else 1)
    fit = trainer(tmp_path, *([raising, callback] if first else [callback, raising]), num_sanity_val_steps=0)
    with pytest.raises(SystemExit if isinstance(error, KeyboardInterrupt) else ZeroDivisionError):
        fit.fit(model, loader(), loader())
    clean(model, fit, callback)
    trainer(tmp_path).validate(model, loader(), verbose=False)
    before, steps = zeros(model), ZerosPerBatch()
    fit = trainer(tmp_path, callback, steps)
    fit.fit(model, loader())
    assert steps.seen[0][0] >= before[0] and steps.seen[-1] == [30, 20]
    clean(model, fit, callback)


class FailsInItsStep(torch.optim.SGD):
    def step(self, closure=None):
        closure()
        for group in self.param_groups:
            for p in group["params"]:
                p.data += 0.1
        self.count = getattr(self, "count", 0) + 1
        if self.count == 3:
            raise ZeroDivisionError


def test_an_interrupted_step_leaves_masked_weights_zero(tmp_path):
    class Failing(Net):
        def configure_optimizers(self):
            return FailsInItsStep(self.parameters(), lr=0.1)

    model, callback = Failing(), sparsify()
    fit = trainer(tmp_path, callback)
    with pytest.raises(ZeroDivisionError):
        fit.fit(model, loader())
    assert zeros(model) == [8, 5]
    clean(model, fit, callback)


def test_weights_loaded_after_an_interrupt_are_not_destroyed(tmp_path):
    model, callback = Net(), sparsify(0.9)
    dense = copy.deepcopy(model.state_dict())
    with pytest.raises(SystemExit):
        trainer(tmp_path, callback, Raising("on_train_end", KeyboardInterrupt())).fit(model, loader())
    assert zeros(model) == [54, 36]
    model.load_state_dict(dense)
    steps = ZerosPerBatch()
    trainer(tmp_path, callback, steps).fit(model, loader())
    assert [seen[1] for seen in steps.seen] == [4, 9, 14, 18, 22, 27, 32, 36]


def test_early_stopping_keeps_what_was_reached(tmp_path):
    model, callback = Net(lr=1e-6), sparsify()
    stopping = EarlyStopping("valid_loss", patience=1, min_delta=1000.0)
    fit = trainer(tmp_path, callback, stopping, max_epochs=4)
    fit.fit(model, loader(), loader())
    assert zeros(model) == [15, 10]  # after two of four epochs
    assert float(fit.callback_metrics["sparsity"]) == 0.25
    clean(model, fit, callback)


def test_epochs_cut_short_by_the_module_end_exactly(tmp_path):
    class Short(Net):
        def on_train_batch_start(self, batch, batch_idx):
            return -1 if batch_idx == 2 else None

    model, steps = Short(), ZerosPerBatch()
    trainer(tmp_path, sparsify(), steps).fit(model, loader())
    assert zeros(model) == [30, 20]


# --- checkpoints --------------------------------------------------------------------------------------------------------


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


class ByIndex(Net):
    """Takes its batches by their number, as a loader would that can go on in the middle of an epoch."""

    def training_step(self, batch, batch_idx):
        return super().training_step(list(loader())[batch_idx], batch_idx)


class ManualByIndex(Manual):
    training_step_of_batch = Manual.training_step

    def training_step(self, batch, batch_idx):
        return self.training_step_of_batch(list(loader())[batch_idx], batch_idx)


def run(path, make, callback, n=BATCHES, ckpt_path=None, raising=None, error=(SystemExit, ZeroDivisionError), **options):
    """The model, and the sparsities after each batch, of a run that may be interrupted."""
    model, steps = make(), ZerosPerBatch()
    checkpoint = ModelCheckpoint(path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    callbacks = [callback, steps, *([raising] if raising else []), checkpoint]
    fit = trainer(path, *callbacks, max_epochs=3, **options)
    if raising is None:
        fit.fit(model, loader(n), ckpt_path=ckpt_path)
    else:
        with pytest.raises(error):
            fit.fit(model, loader(n))
    return model, steps.seen


@pytest.mark.parametrize("step", [1, 3, 4, 6, 8, 11])
@pytest.mark.parametrize(
    ("criteria", "context"),
    [
        ("large_final", "local"),
        ("large_final", "global"),
        ("movement", "global"),
        ("updating_movement", "local"),
        ("taylor", "local"),
    ],
)
def test_resume_is_bit_for_bit(tmp_path, step, criteria, context):
    callback = sparsify(criteria=criteria, context=context)
    whole, seen = run(tmp_path / "whole", ByIndex, callback)
    again = sparsify(criteria=criteria, context=context)
    resumed, rest = run(tmp_path / "rest", lambda: ByIndex(seed=8), again, ckpt_path=tmp_path / "whole" / f"step={step}.ckpt")
    assert rest == seen[step:]
    assert same(whole.state_dict(), resumed.state_dict())
    assert same(callback.sparsifier.masks, again.sparsifier.masks)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ZeroDivisionError()], ids=["interrupt", "error"])
def test_resume_after_an_interruption(tmp_path, error):
    whole, seen = run(tmp_path / "whole", ByIndex, sparsify())
    _, first = run(tmp_path / "first", ByIndex, sparsify(), raising=Raising("on_after_backward", error, 6))
    resumed, rest = run(tmp_path / "rest", lambda: ByIndex(seed=8), sparsify(), ckpt_path=tmp_path / "first" / "step=5.ckpt")
    assert first + rest == seen
    assert same(whole.state_dict(), resumed.state_dict())


def test_resume_from_a_checkpoint_that_was_saved_because_of_the_exception(tmp_path):
    whole, seen = run(tmp_path / "whole", ByIndex, sparsify())
    model, steps = Net(), ZerosPerBatch()
    callbacks = [
        sparsify(),
        steps,
        Raising("on_train_batch_start", ZeroDivisionError(), 6),
        OnExceptionCheckpoint(tmp_path, "failed"),
    ]
    with pytest.raises(ZeroDivisionError):
        trainer(tmp_path, *callbacks, max_epochs=3).fit(model, loader())
    resumed, rest = run(tmp_path / "rest", lambda: ByIndex(seed=8), sparsify(), ckpt_path=tmp_path / "failed.ckpt")
    assert steps.seen + rest == seen
    assert same(whole.state_dict(), resumed.state_dict())


def test_a_checkpoint_that_is_saved_before_a_resumed_run_begins_holds_the_state(tmp_path):
    whole, seen = run(tmp_path / "whole", ByIndex, sparsify(criteria="movement"))
    callbacks = [
        sparsify(criteria="movement"),
        Raising("on_train_start", ZeroDivisionError()),
        OnExceptionCheckpoint(tmp_path, "failed"),
    ]
    with pytest.raises(ZeroDivisionError):
        trainer(tmp_path, *callbacks, max_epochs=3).fit(ByIndex(seed=8), loader(), ckpt_path=tmp_path / "whole" / "step=5.ckpt")
    resumed, rest = run(
        tmp_path / "rest", lambda: ByIndex(seed=8), sparsify(criteria="movement"), ckpt_path=tmp_path / "failed.ckpt"
    )
    assert rest == seen[5:]
    assert same(whole.state_dict(), resumed.state_dict())


@pytest.mark.parametrize("options", [{"accumulate_grad_batches": 2}, {"max_steps": 10}, {"gradient_clip_val": 0.1}])
def test_resume_with_options_of_the_trainer(tmp_path, options):
    whole, seen = run(tmp_path / "whole", ByIndex, sparsify(), **options)
    resumed, rest = run(
        tmp_path / "rest", lambda: ByIndex(seed=8), sparsify(), ckpt_path=tmp_path / "whole" / "step=3.ckpt", **options
    )
    assert rest == seen[len(seen) - len(rest) :] and rest
    assert same(whole.state_dict(), resumed.state_dict())


@pytest.mark.parametrize("options", [{}, {"max_steps": 20}])
def test_resume_of_manual_optimization(tmp_path, options):
    whole, seen = run(tmp_path / "whole", ManualByIndex, sparsify(), **options)
    resumed, rest = run(tmp_path / "rest", ManualByIndex, sparsify(), ckpt_path=tmp_path / "whole" / "step=10.ckpt", **options)
    assert rest == seen[5:] and rest
    assert same(whole.state_dict(), resumed.state_dict())


def test_resume_twice_and_with_the_same_callback_object(tmp_path):
    callback = sparsify()
    whole, seen = run(tmp_path / "whole", ByIndex, callback)
    for step in (2, 7):
        resumed, rest = run(
            tmp_path / f"{step}", lambda: ByIndex(seed=8), callback, ckpt_path=tmp_path / "whole" / f"step={step}.ckpt"
        )
        assert rest == seen[step:]
        assert same(whole.state_dict(), resumed.state_dict())


@pytest.mark.filterwarnings("ignore:lth rewinds")
def test_resume_of_a_lottery_ticket(tmp_path):
    def callback():
        return SparsifyCallback(0.6, "weight", "local", "large_final", "iterative", lth=True, rewind_epoch=1, reset_end=True)

    whole, seen = run(tmp_path / "whole", ByIndex, callback())
    early = torch.load(tmp_path / "whole" / "step=4.ckpt", weights_only=True)["state_dict"]
    resumed, rest = run(tmp_path / "rest", lambda: ByIndex(seed=8), callback(), ckpt_path=tmp_path / "whole" / "step=6.ckpt")
    assert rest == seen[6:] and zeros(resumed) == [36, 24]
    assert same(whole.state_dict(), resumed.state_dict())
    assert torch.equal(resumed.net[0].bias, early["net.0.bias"])


def test_checkpoints_are_plain_and_load_into_a_model_without_the_callback(tmp_path):
    run(tmp_path, ByIndex, sparsify())
    state = torch.load(tmp_path / "step=12.ckpt", weights_only=True)
    assert list(state["state_dict"]) == list(Net().state_dict())
    Net(seed=3).load_state_dict(state["state_dict"])
    assert list(state["callbacks"]["SparsifyCallback"]) == ["step", "total_steps", "steps_per_epoch", "participants"]


def test_a_checkpoint_for_validation_is_not_taken_over_by_the_next_fit(tmp_path):
    run(tmp_path, ByIndex, sparsify(0.9))
    model, callback, steps = Net(seed=3), sparsify(), ZerosPerBatch()
    fit = trainer(tmp_path, callback, steps)
    fit.validate(model, loader(), ckpt_path=tmp_path / "step=12.ckpt", verbose=False)
    model.load_state_dict(Net(seed=3).state_dict())
    fit.fit(model, loader())
    assert steps.seen[0] == [4, 2] and steps.seen[-1] == [30, 20]


def test_a_checkpoint_of_a_run_without_the_callback(tmp_path):
    run(tmp_path / "dense", ByIndex, ParticipantCallback())
    _, rest = run(tmp_path / "rest", ByIndex, sparsify(), ckpt_path=tmp_path / "dense" / "step=6.ckpt")
    # the schedule is where the training is
    assert [r[1] for r in rest] == [12, 13, 15, 17, 18, 20]


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    class Wide(ByIndex):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 4), nn.Linear(4, 4))

    run(tmp_path / "first", ByIndex, sparsify())
    state = torch.load(tmp_path / "first" / "step=2.ckpt", weights_only=True)
    run(tmp_path / "second", Wide, sparsify())
    wide = torch.load(tmp_path / "second" / "step=2.ckpt", weights_only=True)
    wide["callbacks"] = state["callbacks"]
    torch.save(wide, tmp_path / "mixed.ckpt")
    callback = sparsify()
    with pytest.raises(ValueError, match=r"net\.3\.weight"):
        run(tmp_path / "third", Wide, callback, ckpt_path=tmp_path / "mixed.ckpt")
    assert not callback.loop.running


@pytest.mark.parametrize("trained", [False, True])
def test_the_callback_and_the_model_can_be_pickled(tmp_path, trained):
    callback, model = sparsify(), Net()
    if trained:
        trainer(tmp_path, callback).fit(model, loader())
        model.trainer = None
    copy.deepcopy(model)
    for twin in (pickle.loads(pickle.dumps(callback)), copy.deepcopy(callback)):
        fresh = Net()
        trainer(tmp_path, twin).fit(fresh, loader())
        assert zeros(fresh) == [30, 20]


# --- granularities that need the data flow ------------------------------------------------------------------------------


class Conv(Net):
    def __init__(self, example: bool):
        super().__init__()
        self.net = nn.Sequential(
            nn.Unflatten(1, (1, 2, 3)),
            nn.Conv2d(1, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(24, 4),
        )
        if example:
            self.example_input_array = torch.zeros(2, 6)


@pytest.mark.parametrize("example", [False, True])
def test_the_batch_or_the_example_shows_which_norm_belongs_to_a_filter(tmp_path, example):
    model = Conv(example)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*example_inputs")
        trainer(tmp_path, SparsifyCallback(0.5, "filter", "local", "large_final", linear)).fit(model, loader())
    assert int((model.net[2].weight == 0).sum()) == 2


def test_in_a_learner_of_fastai_it_names_the_right_import():
    learner = pytest.importorskip("fastai.learner")
    data = pytest.importorskip("fastai.data.core")
    loader = data.TfmdDL(TensorDataset(torch.randn(4, 6), torch.randn(4, 4)), bs=2, num_workers=0)
    learn = learner.Learner(data.DataLoaders(loader, loader), nn.Linear(6, 4), loss_func=nn.MSELoss())
    callbacks, before = list(learn.cbs), learn.model.weight.detach().clone()
    callback = SparsifyCallback(0.5, "weight", "local", "large_final", "one_cycle")
    expected = (
        r"cbs must be fastai's, got Lightning's SparsifyCallback; from fasterai\.callbacks\.fastai import SparsifyCallback$"
    )
    with pytest.raises(TypeError, match=expected):
        learn.fit(1, cbs=callback)
    assert list(learn.cbs) == callbacks
    assert torch.equal(learn.model.weight, before)
    assert not hasattr(callback, "learn")
