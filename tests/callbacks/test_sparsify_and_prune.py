"""Masks and removal in one training: both as callbacks in either order, and masks that are held while channels go."""

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from fastai.data.core import DataLoaders, TfmdDL
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import Adam
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fasterai.callbacks.lightning as for_lightning
from fasterai.callbacks.fastai import HoldCallback, PruneCallback, SparsifyCallback
from fasterai.callbacks.plain import attach
from fasterai.core.schedules import OneShot, lin
from fasterai.prune.gradual import GradualPruner
from fasterai.sparse.sparsifier import Sparsifier
from tests.networks import perceptron

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*number of training batches"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec"),
    pytest.mark.filterwarnings("ignore:.*litlogger"),
]


def data() -> TensorDataset:
    g = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(32, 6, generator=g), torch.randint(4, (32,), generator=g))


def net() -> nn.Sequential:
    return perceptron(6, 10, 8, 4)


def conv_net() -> nn.Sequential:
    torch.manual_seed(0)
    first = [nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 10, 3), nn.BatchNorm1d(10), nn.ReLU()]
    return nn.Sequential(*first, nn.Conv1d(10, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 4))


def learner(path, model: nn.Module) -> Learner:
    loaders = [TfmdDL(data(), bs=8, shuffle=False, num_workers=0) for _ in range(2)]
    learn = Learner(DataLoaders(*loaders, device="cpu"), model, loss_func=CrossEntropyLossFlat(), opt_func=Adam, path=path)
    if hasattr(learn, "progress"):
        learn.remove_cb(learn.progress)
    learn.logger = lambda log: None
    return learn


def sparsify(granularity="weight", **options) -> SparsifyCallback:
    return SparsifyCallback(0.5, granularity, options.pop("context", "local"), "large_final", lin, **options)


def prune(schedule=lin, **options) -> PruneCallback:
    return PruneCallback(0.5, schedule, "local", "large_final", **options)


def zero_shares(model: nn.Module) -> list[float]:
    return [float((m.weight == 0).float().mean()) for m in model.modules() if isinstance(m, nn.Linear | nn.Conv1d)]


def agrees(sparsifier: Sparsifier, model: nn.Module) -> None:
    """The masks have the shapes of the weights, are obeyed, and what is reported is what they hold."""
    parameters = dict(model.named_parameters())
    for name, keep in sparsifier.masks.items():
        assert keep.shape == parameters[name].shape
        assert not parameters[name][~keep].any()
        assert sparsifier.sparsity.per_target[name] == pytest.approx(1 - float(keep.float().mean()), abs=1e-6)


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("context", ["local", "global"])
def test_both_in_one_fit(tmp_path, order, context):
    learn = learner(tmp_path, net())
    masks, removal = sparsify(context=context), prune()
    learn.fit(2, cbs=[masks, removal][::order])
    assert [m.out_features for m in learn.model if isinstance(m, nn.Linear)] == [5, 4, 4]
    assert list(learn.recorder.metric_names).count("sparsity") == 1
    assert "removed" in learn.recorder.metric_names
    row = dict(zip(learn.recorder.metric_names[1:], learn.recorder.values[-1], strict=False))
    assert row["removed"] == 0.5
    assert row["sparsity"] == masks.current_sparsity
    agrees(masks.sparsifier, learn.model)
    learn.fit(1, cbs=HoldCallback(masks.sparsifier))
    agrees(masks.sparsifier, learn.model)


def test_masks_reach_their_sparsity_of_what_is_left(tmp_path):
    learn = learner(tmp_path, net())
    masks = sparsify()
    learn.fit(2, cbs=[prune(schedule=OneShot(0.25)), masks])
    # Half of 5 x 6, 4 x 5 and 4 x 4 weights: the masks go on after the removal.
    assert [round(share * n) for share, n in zip(zero_shares(learn.model), (30, 20, 16), strict=True)] == [15, 10, 8]
    assert masks.current_sparsity == 0.5


@pytest.mark.parametrize("order", [1, -1])
def test_filters_with_their_norms_and_removal(tmp_path, order):
    learn = learner(tmp_path, conv_net())
    masks = sparsify("filter", example_inputs=torch.randn(2, 6))
    learn.fit(2, cbs=[masks, prune()][::order])
    agrees(masks.sparsifier, learn.model)
    assert [m.out_channels for m in learn.model if isinstance(m, nn.Conv1d)] == [5, 4]
    dead = ~masks.sparsifier.masks["1.weight"].flatten(1).any(1)
    assert not learn.model[2].weight[dead].any()
    assert not learn.model[2].bias[dead].any()


@pytest.mark.parametrize("order", [1, -1])
def test_held_masks_are_held_while_channels_go(tmp_path, order):
    learn = learner(tmp_path, net())
    masks = sparsify()
    learn.fit(1, cbs=masks)
    assert zero_shares(learn.model) == [0.5, 0.5, 0.5]
    learn.fit(2, cbs=[HoldCallback(masks.sparsifier), prune()][::order])
    agrees(masks.sparsifier, learn.model)
    assert sum(zero_shares(learn.model)) > 0


def test_coupled_channels_are_masked_and_the_same_ones_go(tmp_path):
    learn = learner(tmp_path, net())
    masks = sparsify("coupled", example_inputs=torch.randn(2, 6))
    learn.fit(2, cbs=masks)
    learn.fit(1, cbs=[HoldCallback(masks.sparsifier), prune(schedule=OneShot(0.0))])
    assert [m.out_features for m in learn.model if isinstance(m, nn.Linear)] == [5, 4, 4]
    assert masks.current_sparsity == 0.0  # what was masked is what is gone


@pytest.mark.parametrize("order", [1, -1])
def test_in_a_loop_of_ones_own(order):
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    sparsifier = Sparsifier(model, "weight", "local", "large_final", sparsity=0.5, schedule=lin)
    pruner = GradualPruner(model, 0.5, "local", "large_final", lin, example_inputs=torch.randn(2, 6))
    with attach(optimizer, *[sparsifier, pruner][::order], total_steps=4):
        for x, y in DataLoader(data(), batch_size=8):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    agrees(sparsifier, model)
    assert [m.out_features for m in model if isinstance(m, nn.Linear)] == [5, 4, 4]


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = net()

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


def lightning_fit(path, callbacks, module, epochs=2, ckpt_path=None, save=None) -> pl.Trainer:
    saving = [pl.callbacks.ModelCheckpoint(save, filename="{epoch}", save_top_k=-1)] if save else []
    trainer = pl.Trainer(
        max_epochs=epochs,
        callbacks=[*callbacks, *saving],
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=bool(saving),
        default_root_dir=path,
    )
    trainer.fit(module, DataLoader(data(), batch_size=8), ckpt_path=ckpt_path)
    return trainer


def both(order: int) -> list[pl.Callback]:
    masks = for_lightning.SparsifyCallback(0.5, "weight", "local", "large_final", lin)
    return [masks, for_lightning.PruneCallback(0.5, lin, "local", "large_final")][::order]


@pytest.mark.parametrize("order", [1, -1])
def test_both_in_one_lightning_run_that_is_resumed(tmp_path, order):
    whole, resumed = Module(), Module()
    callbacks = both(order)
    trainer = lightning_fit(tmp_path, callbacks, whole, save=tmp_path / "each")
    masks = next(c for c in callbacks if isinstance(c, for_lightning.SparsifyCallback))
    agrees(masks.sparsifier, whole)
    assert [m.out_features for m in whole.net if isinstance(m, nn.Linear)] == [5, 4, 4]
    assert float(trainer.callback_metrics["removed"]) == 0.5
    assert float(trainer.callback_metrics["sparsity"]) == pytest.approx(masks.current_sparsity)
    lightning_fit(tmp_path, both(order), resumed, ckpt_path=tmp_path / "each" / "epoch=0.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
