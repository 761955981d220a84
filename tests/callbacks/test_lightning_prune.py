import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, LearningRateFinder, ModelCheckpoint
from lightning.pytorch.tuner import Tuner
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fasterai.callbacks.lightning import PruneCallback
from fasterai.core.criteria import large_final
from fasterai.core.schedules import OneShot, lin, one_cycle
from fasterai.prune.choice.budget import Budget
from fasterai.prune.small_files import load_small, save_small

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*number of training batches"),
    pytest.mark.filterwarnings("ignore:.*Checkpoint directory"),
    pytest.mark.filterwarnings("ignore:.*ModelCheckpoint"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec"),
    pytest.mark.filterwarnings("ignore:.*litlogger"),
]

BATCHES = 4  # in an epoch
HALF = [(5, 6), (5,), (4, 5), (4,)]


class Net(pl.LightningModule):
    def __init__(self, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.lr = 0.01
        self.net = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 4))
        self.seen = []

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        self.seen.append(self.net[0].out_features)
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("valid_loss", F.cross_entropy(self(batch[0]), batch[1]))

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=self.lr)


class Scripted(Net):
    """Gives the validation losses that a test wants."""

    def __init__(self, *losses):
        super().__init__()
        self.losses = losses

    def validation_step(self, batch, batch_idx):
        self.log("valid_loss", self.losses[min(self.current_epoch, len(self.losses) - 1)])


class Manual(Net):
    """Two optimizers, one for each layer."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.Adam(self.net[i].parameters(), lr=0.01) for i in (0, 2)]


def loader() -> DataLoader:
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(8 * BATCHES, 6, generator=g), torch.randint(4, (8 * BATCHES,), generator=g)
    return DataLoader(TensorDataset(x, y), batch_size=8)


def prune(ratio=0.5, schedule=lin, **options) -> PruneCallback:
    return PruneCallback(ratio, schedule, "local", "large_final", **options)


def trainer(path, *callbacks, epochs: int = 2, **options) -> pl.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    options.setdefault("enable_checkpointing", any(isinstance(c, ModelCheckpoint) for c in callbacks))
    return pl.Trainer(
        max_epochs=epochs, callbacks=list(callbacks), accelerator="cpu", default_root_dir=path, **quiet, **options
    )


def fit(path, *callbacks, module=None, ckpt_path=None, **options) -> tuple[pl.Trainer, Net]:
    module = Net() if module is None else module
    run = trainer(path, *callbacks, **options)
    run.fit(module, loader(), loader(), ckpt_path=ckpt_path)
    return run, module


def shapes(model: nn.Module) -> list[tuple[int, ...]]:
    return [tuple(p.shape) for p in model.parameters()]


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


# --- the run ------------------------------------------------------------------------------------------------------------


def test_follows_the_schedule_and_the_optimizer_goes_on(tmp_path):
    callback = prune()
    run, module = fit(tmp_path, callback)
    # 0.625 channels of 10 more at each step; halves round to even. Seen before the steps.
    assert module.seen == [10, 9, 9, 8, 8, 7, 6, 6]
    assert shapes(module) == HALF
    assert float(run.callback_metrics["sparsity"]) == 0.5
    (optimizer,) = run.optimizers
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in module.parameters()]
    assert all(optimizer.state[p]["exp_avg"].shape == p.shape for p in module.parameters())
    assert "on_load_checkpoint" not in vars(module)


def test_the_familiar_calls():
    familiar = PruneCallback(pruning_ratio=0.4, context="global", criteria=large_final, schedule=one_cycle)
    assert familiar.settings.axes == (0.4, "global", large_final, one_cycle)
    assert PruneCallback(0.4, "one_cycle", "local", "large_final").settings.axes == (0.4, "local", "large_final", "one_cycle")


@pytest.mark.parametrize("options", [{"accumulate_grad_batches": 2}, {"gradient_clip_val": 0.1}, {"precision": "bf16-mixed"}])
def test_with_the_trainers_own_options(tmp_path, options):
    _, module = fit(tmp_path, prune(), **options)
    assert shapes(module) == HALF


def test_several_optimizers_are_all_cut(tmp_path):
    run, module = fit(tmp_path, prune(), module=Manual())
    assert shapes(module) == HALF
    assert all(o.state[p]["exp_avg"].shape == p.shape for o in run.optimizers for p in o.param_groups[0]["params"])


def test_a_part_of_the_module(tmp_path):
    module = Net()
    part = module.net[0] = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 10))
    part.out_features = 10  # for what `seen` holds
    fit(tmp_path, prune(model=part, schedule=OneShot(0.5)), module=module)
    assert [m.out_features for m in module.net.modules() if isinstance(m, nn.Linear)] == [5, 10, 4]


def test_lr_find_removes_nothing(tmp_path):
    module = Net()
    callback = prune()
    run = trainer(tmp_path, callback, enable_checkpointing=True)
    Tuner(run).lr_find(module, loader(), num_training=4)
    assert callback.pruner is None
    assert shapes(module) == shapes(Net())
    run.fit(module, loader())
    assert shapes(module) == HALF


def test_the_learning_rate_finder_as_a_callback_removes_nothing(tmp_path):
    finder = LearningRateFinder(num_training_steps=4)
    _, module = fit(tmp_path, prune(), finder, enable_checkpointing=True)
    assert shapes(module) == HALF
    assert set(module.seen[:4]) == {10}


def test_two_fits_do_not_compound(tmp_path):
    callback = prune()
    _, module = fit(tmp_path, callback)
    fit(tmp_path, callback, module=module)
    assert callback.pruner.channels == {"net.0.weight": (10, 5)}


class Failing(pl.Callback):
    def __init__(self, error):
        self.error = error

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 4:
            raise self.error


@pytest.mark.parametrize("error", [RuntimeError("stop"), KeyboardInterrupt()])
def test_a_run_that_fails_leaves_a_module_that_trains_on(tmp_path, error):
    module, callback = Net(), prune()
    with pytest.raises((RuntimeError, SystemExit, KeyboardInterrupt)):
        fit(tmp_path, callback, Failing(error), module=module)
    assert shapes(module)[0] == (8, 6)  # 2.5 of 10
    assert "on_load_checkpoint" not in vars(module)
    fit(tmp_path, callback, module=module)
    assert shapes(module) == HALF


class Unready(Net):
    def configure_optimizers(self):
        raise RuntimeError("not ready")


def test_a_run_that_fails_before_it_begins_leaves_the_module_as_it_was(tmp_path):
    module = Unready()
    with pytest.raises(RuntimeError, match="not ready"):
        fit(tmp_path, prune(), module=module)
    assert "on_load_checkpoint" not in vars(module)
    assert shapes(module) == shapes(Net())


def test_a_compiled_module_is_refused(tmp_path):
    module = torch.compile(Net())
    with pytest.raises(ValueError, match=r"model must be the bare network, got a Net that torch\.compile"):
        fit(tmp_path, prune(), module=module)


def test_a_module_in_ddp_is_refused(tmp_path):
    module = Net()
    with pytest.raises(ValueError, match="model must be the bare network, got DistributedDataParallel"):
        fit(tmp_path, prune(), module=module, strategy="ddp", devices=1)
    assert shapes(module) == shapes(Net())


# --- checkpoints --------------------------------------------------------------------------------------------------------


def every_epoch(path) -> ModelCheckpoint:
    return ModelCheckpoint(path / "each", filename="{epoch}", save_top_k=-1, every_n_epochs=1)


@pytest.mark.parametrize("schedule", [lin, OneShot(0.4)])
@pytest.mark.parametrize("epoch", [0, 1])
def test_a_resumed_run_is_the_same_bit_for_bit(tmp_path, schedule, epoch):
    _, whole = fit(tmp_path, prune(schedule=schedule), every_epoch(tmp_path), epochs=3)
    callback = prune(schedule=schedule)
    _, resumed = fit(tmp_path, callback, module=Net(9), epochs=3, ckpt_path=tmp_path / "each" / f"epoch={epoch}.ckpt")
    assert shapes(resumed) == HALF
    assert same(resumed, whole)
    assert callback.pruner.channels == {"net.0.weight": (10, 5)}
    assert "on_load_checkpoint" not in vars(resumed)


def test_a_budget_counts_from_the_dense_module_also_when_resumed(tmp_path):
    def budget():
        return PruneCallback(Budget(params=0.5), lin, "global", "large_final")

    _, whole = fit(tmp_path, budget(), every_epoch(tmp_path))
    _, resumed = fit(tmp_path, budget(), module=Net(9), ckpt_path=tmp_path / "each" / "epoch=0.ckpt")
    assert same(resumed, whole)
    # 11 parameters for each of 10 channels and 4 biases: at most 57 of 114 may be left.
    assert shapes(resumed)[0] == (4, 6)


def test_a_run_that_is_resumed_twice_is_the_same_bit_for_bit(tmp_path):
    _, whole = fit(tmp_path, prune(), every_epoch(tmp_path), epochs=3)
    first, again = tmp_path / "each" / "epoch=0.ckpt", tmp_path / "again"
    fit(tmp_path, prune(), every_epoch(again), module=Net(9), epochs=3, ckpt_path=first)
    _, resumed = fit(tmp_path, prune(), module=Net(8), epochs=3, ckpt_path=again / "each" / "epoch=1.ckpt")
    assert same(resumed, whole)


def test_a_checkpoint_of_a_run_without_the_callback_is_loaded_as_ever(tmp_path):
    fit(tmp_path, every_epoch(tmp_path), epochs=1)
    _, module = fit(tmp_path, prune(), module=Net(9), epochs=2, ckpt_path=tmp_path / "each" / "epoch=0.ckpt")
    assert shapes(module) == HALF


@pytest.mark.parametrize("call", ["validate", "test"])
def test_a_small_checkpoint_goes_into_a_fresh_module_also_without_training(tmp_path, call):
    _, small = fit(tmp_path, prune(), every_epoch(tmp_path), epochs=1)
    fresh = Net(9)
    run = trainer(tmp_path, prune())
    getattr(run, call)(fresh, loader(), ckpt_path=tmp_path / "each" / "epoch=0.ckpt", verbose=False)
    assert same(fresh, small)
    assert "on_load_checkpoint" not in vars(fresh)


def test_a_checkpoint_of_before_a_removal_is_refused_by_the_smaller_module(tmp_path):
    run, module = fit(tmp_path, prune(), every_epoch(tmp_path))
    with pytest.raises(ValueError, match=r"state must be of this model as it was before .*; build the model anew"):
        run.validate(module, loader(), ckpt_path=tmp_path / "each" / "epoch=0.ckpt", verbose=False)
    assert shapes(module) == HALF


class Loading(Net):
    def on_load_checkpoint(self, checkpoint):
        self.loaded = shapes(self)


def test_a_modules_own_hook_sees_the_small_module(tmp_path):
    fit(tmp_path, prune(), every_epoch(tmp_path), epochs=1)
    module = Loading(9)
    fit(tmp_path, prune(), module=module, ckpt_path=tmp_path / "each" / "epoch=0.ckpt", epochs=1)
    assert module.loaded == HALF
    own = Net(9)
    own.on_load_checkpoint = mine = lambda checkpoint: None
    fit(tmp_path, prune(), module=own, ckpt_path=tmp_path / "each" / "epoch=0.ckpt", epochs=1)
    assert vars(own)["on_load_checkpoint"] is mine


def test_a_small_module_goes_into_a_file_and_back(tmp_path):
    _, module = fit(tmp_path, prune())
    save_small(tmp_path / "small.safetensors", module)
    assert same(load_small(tmp_path / "small.safetensors", Net(9)), module)


def test_the_best_checkpoint_is_of_the_final_structure(tmp_path):
    best = ModelCheckpoint(tmp_path / "best", monitor="valid_loss", filename="{epoch}")
    # The first epochs are the best, before channels go in the third; of the last two the fourth is better.
    module = Scripted(0.1, 0.2, 0.9, 0.7, 0.8)
    run, _ = fit(tmp_path, prune(schedule=OneShot(0.45)), best, module=module, epochs=5)
    assert best.best_model_path.endswith("epoch=3.ckpt")
    assert float(best.best_model_score) == pytest.approx(0.7)
    run.test(module, loader(), ckpt_path="best", verbose=False)
    assert (tmp_path / "best" / "epoch=0.ckpt").exists()


def test_early_stopping_waits_anew_after_a_removal(tmp_path):
    stop = EarlyStopping("valid_loss", patience=2)
    # Without removal it would stop after epoch 2. Channels go in epoch 2, whose loss is then the one to beat.
    run, _ = fit(tmp_path, prune(schedule=OneShot(0.3)), stop, module=Scripted(0.1, 0.2, 0.3), epochs=8)
    assert run.current_epoch == 5


# --- moving averages ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [1, -1])
def test_lightnings_moving_average_is_cut_alike_and_resumed(tmp_path, order):
    def callbacks():
        return [prune(), EMAWeightAveraging(decay=0.5)][::order]

    _, whole = fit(tmp_path, *callbacks(), every_epoch(tmp_path), epochs=3)
    assert shapes(whole) == HALF
    average = next(c for c in callbacks() if isinstance(c, EMAWeightAveraging))
    others = [c for c in callbacks() if isinstance(c, PruneCallback)]
    _, resumed = fit(
        tmp_path, *[average, *others][::order], module=Net(9), epochs=3, ckpt_path=tmp_path / "each" / "epoch=0.ckpt"
    )
    assert same(resumed, whole)
    assert shapes(average._average_model.module) == HALF
    assert "on_load_checkpoint" not in vars(average._average_model.module)


def test_a_copy_of_ones_own_is_cut_alike(tmp_path):
    copy = Net(5)
    fit(tmp_path, prune(copies=copy))
    assert shapes(copy) == HALF


# --- arguments ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((50, "agp", "local", "large_final"), {}, ValueError, r"pruning_ratio must be in \[0, 1\], got 50; pass 0.5"),
        ((0.5, "dsd", "local", "large_final"), {}, ValueError, "schedule must never fall, .*got DSD"),
        ((0.5, "agp", "local", "large_final"), {"granularity": "filter"}, TypeError, "options must be .*, got 'granularity'"),
    ],
)
def test_bad_arguments_are_refused_at_once(arguments, options, error, message):
    with pytest.raises(error, match=message):
        PruneCallback(*arguments, **options)
