"""Coupled channels that are masked in a training, then taken out, in fastai, in Lightning and in a loop of one's own."""

import copy
import pickle
from functools import partial

import lightning.pytorch as pl
import matplotlib as mpl
import pytest
import torch
import torch.nn.functional as F
from fastai.callback.all import Callback, SaveModelCallback
from fastai.callback.schedule import Learner
from fastai.data.core import DataLoaders, TfmdDL
from fastai.learner import load_learner
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import SGD, Adam, OptimWrapper
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fasterai.callbacks.lightning as for_lightning
from fasterai.analyze.all import cost
from fasterai.callbacks.plain import attach
from fasterai.core.schedules import OneShot
from fasterai.prune.all import (
    Budget,
    HoldCallback,
    PruneCallback,
    Pruner,
    Sparsifier,
    SparsifyCallback,
    agp,
    large_final,
    lin,
    load_small,
    one_cycle,
    remove,
    save_small,
)

mpl.use("agg")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*number of training batches"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec"),
    pytest.mark.filterwarnings("ignore:.*litlogger"),
    pytest.mark.filterwarnings("ignore:without example_inputs"),
]


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


class Block(nn.Module):
    """A residual block."""

    def __init__(self, width: int):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x):
        return F.relu(x + self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))))


def build(width: int = 8) -> nn.Sequential:
    """Two groups of channels: the stream's, and the block's own."""
    stem = nn.Sequential(nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
    return nn.Sequential(stem, Block(width), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


def parameters(stream: int, inner: int) -> int:
    return 9 * stream + 2 * stream + 2 * 9 * stream * inner + 2 * inner + 2 * stream + 10 * stream + 10


def digits(n: int = 128) -> TensorDataset:
    data = load_digits()
    return TensorDataset(torch.tensor(data.images[:n], dtype=torch.float32)[:, None] / 16, torch.tensor(data.target[:n]))


X = digits()[:16][0]


def learner(path, model: nn.Module | None = None, opt_func=Adam, **options) -> Learner:
    loaders = [TfmdDL(digits(), bs=16, shuffle=False, num_workers=0) for _ in range(2)]
    dls = DataLoaders(*loaders, device="cpu")
    learn = Learner(dls, model or build(), loss_func=CrossEntropyLossFlat(), opt_func=opt_func, path=path, **options)
    if hasattr(learn, "progress"):
        learn.remove_cb(learn.progress)
    learn.logger = lambda log: None
    return learn


def coupled(sparsity=0.5, context="local", schedule=one_cycle, **options) -> SparsifyCallback:
    return SparsifyCallback(sparsity, "coupled", context, large_final, schedule, **options)


def widths(model: nn.Sequential) -> tuple[int, int]:
    return model[0][0].out_channels, model[1].conv1.out_channels


def outputs(model: nn.Module, x: torch.Tensor = X) -> torch.Tensor:
    was = model.training
    with torch.no_grad():
        result = model.eval()(x)
    model.train(was)
    return result


def same(after: torch.Tensor, before: torch.Tensor) -> bool:
    return bool((after - before).abs().max() <= 1e-5 * before.abs().max())


def silent(model: nn.Sequential) -> tuple[int, int]:
    """How many channels of the stream and of the block have nothing but zeros."""
    stem, block, head = model[0], model[1], model[4]
    makes = [
        stem[0].weight.flatten(1).T,
        stem[1].weight[None],
        stem[1].bias[None],
        block.norm2.weight[None],
        block.norm2.bias[None],
    ]
    reads = [block.conv2.weight.flatten(1).T, block.conv1.weight.permute(0, 2, 3, 1).flatten(0, 2), head.weight]
    inner = [block.conv1.weight.flatten(1).T, block.norm1.weight[None], block.norm1.bias[None]]
    inner += [block.conv2.weight.permute(0, 2, 3, 1).flatten(0, 2)]
    return tuple(int((torch.cat(slices) == 0).all(0).sum()) for slices in (makes + reads, inner))


# --- masks --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inputs", [None, X[:4]], ids=["the loop's batch", "example_inputs"])
@pytest.mark.parametrize("opt_func", [Adam, SGD])
def test_all_slices_of_a_channel_are_zero_after_every_step(tmp_path, inputs, opt_func):
    learn, seen = learner(tmp_path, opt_func=opt_func), []
    after = Callback(after_step=lambda self: seen.append((silent(self.learn.model), callback.current_sparsity)))
    after.order, after.run_valid = 90, False
    callback = coupled(schedule=lin, example_inputs=inputs)
    learn.fit(1, cbs=[callback, after])
    # A straight line over eight steps: round(8 x 0.5 x k / 8) channels of each group, of equals the even.
    assert [pair for pair, _ in seen] == [(n, n) for n in (0, 1, 2, 2, 2, 3, 4, 4)]
    assert [share for _, share in seen] == [n / 8 for n in (0, 1, 2, 2, 2, 3, 4, 4)]
    assert learn.recorder.metric_names[-2] == "sparsity"
    assert learn.recorder.values[-1][-1] == 0.5


def test_the_context_global_takes_half_of_all(tmp_path):
    learn = learner(tmp_path)
    learn.fit(1, cbs=coupled(context="global", example_inputs=X[:4]))
    assert sum(silent(learn.model)) == 8


@pytest.mark.parametrize("inputs", [None, X[:4]], ids=["the loop's batch", "example_inputs"])
def test_in_lightning(tmp_path, inputs):
    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = build()

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=0.01)

    module = Module()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}

    def fit(callback):
        trainer = pl.Trainer(max_epochs=1, callbacks=[callback], accelerator="cpu", default_root_dir=tmp_path, **quiet)
        trainer.fit(module, DataLoader(digits(), batch_size=16))
        return trainer

    trainer = fit(for_lightning.SparsifyCallback(0.5, "coupled", "local", large_final, one_cycle, example_inputs=inputs))
    assert silent(module.net) == (4, 4)
    before = outputs(module.net)
    state = {id(p): s["exp_avg"].clone() for p, s in trainer.optimizers[0].state.items()}
    remove(module.net, X[:4], measure=False)
    assert widths(module.net) == (4, 4)
    assert same(outputs(module.net), before)
    for p, s in trainer.optimizers[0].state.items():
        assert s["exp_avg"].shape == p.shape
        assert state[id(p)].numel() >= p.numel()
    fit(for_lightning.PruneCallback(0.5, lin, "local", large_final))
    assert widths(module.net) == (2, 2)


@pytest.mark.parametrize("inputs", [None, X[:4]], ids=["no example_inputs", "example_inputs"])
def test_in_a_loop_of_ones_own(inputs):
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=0.01)
    if inputs is None:
        with pytest.raises(ValueError, match="example_inputs must be given for granularity 'coupled'"):
            train(model, optimizer, Sparsifier(model, "coupled", "local", large_final, sparsity=0.5, schedule=lin))
        return
    sparsifier = Sparsifier(model, "coupled", "local", large_final, sparsity=0.5, schedule=lin, example_inputs=inputs)
    train(model, optimizer, sparsifier)
    assert silent(model) == (4, 4)
    before, momentum = outputs(model), {p: optimizer.state[p]["momentum_buffer"].clone() for p in model.parameters()}
    removal = remove(model, X[:4], measure=False)
    assert widths(model) == (4, 4)
    assert same(outputs(model), before)
    holds_what_is_kept(removal, model, momentum, {p: optimizer.state[p]["momentum_buffer"] for p in model.parameters()})
    train(model, optimizer, sparsifier.hold())
    assert not same(outputs(model), before)


def train(model, optimizer, *participants):
    with attach(optimizer, *participants, total_steps=8):
        for x, y in DataLoader(digits(), batch_size=16):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()


def holds_what_is_kept(removal, model, before, after) -> None:
    """Each parameter's state has the slices that the plan keeps, with the values from before."""
    for name, parameter in model.named_parameters():
        expected = before[parameter]
        for (cut, d), kept in removal.plan.keep.items():
            if cut == name:
                expected = expected[(slice(None),) * d + (torch.tensor(kept),)]
        assert torch.equal(after[parameter], expected), name


# --- removal, and on --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "opt_func", [Adam, SGD, lambda p, **k: OptimWrapper(p, torch.optim.AdamW, **k)], ids=["Adam", "SGD", "torch"]
)
@pytest.mark.parametrize("inputs", [None, X[:4]], ids=["the loop's batch", "example_inputs"])
def test_removal_needs_nothing_handed_over_and_training_goes_on(tmp_path, opt_func, inputs):
    learn = learner(tmp_path, opt_func=opt_func, moms=(0.9, 0.9, 0.9))
    learn.fit_one_cycle(1, 0.01, cbs=coupled(example_inputs=inputs))
    before = outputs(learn.model)
    removal = remove(learn.model, X[:4])
    assert removal.removed == {"0.0.weight": (8, 4), "1.conv1.weight": (8, 4)}
    assert removal.parameters == (parameters(8, 8), parameters(4, 4))
    assert same(outputs(learn.model), before)
    states = [p for p, *_ in learn.opt.all_params()]
    assert {id(p) for p in states} == {id(p) for p in learn.model.parameters()}
    for parameter in states:
        for value in learn.opt.state[parameter].values():
            assert not isinstance(value, torch.Tensor) or value.numel() == 1 or value.shape == parameter.shape
    weights = [p.detach().clone() for p in learn.model.parameters()]
    learn.fit_one_cycle(1, 0.01)
    assert not any(torch.equal(a, b) for a, b in zip(weights, learn.model.parameters(), strict=True))
    assert widths(learn.model) == (4, 4)


def test_the_averages_of_adam_are_those_of_the_channels_that_stay(tmp_path):
    learn = learner(tmp_path)
    learn.fit(1, cbs=coupled())
    before = {p: learn.opt.state[p]["grad_avg"].clone() for p in learn.model.parameters()}
    removal = remove(learn.model, X[:4], measure=False)
    holds_what_is_kept(removal, learn.model, before, {p: learn.opt.state[p]["grad_avg"] for p in learn.model.parameters()})


def test_held_then_removed_then_pruned_further(tmp_path):
    learn, callback = learner(tmp_path), coupled()
    learn.fit(1, cbs=callback)
    learn.fit(1, cbs=HoldCallback(callback.sparsifier))
    assert silent(learn.model) == (4, 4)
    before = outputs(learn.model)
    remove(learn.model, X[:4], measure=False)
    assert same(outputs(learn.model), before)
    learn.fit_one_cycle(1, cbs=PruneCallback(0.5, agp, "local", large_final))
    assert widths(learn.model) == (2, 2)
    assert sum(p.numel() for p in learn.model.parameters()) == parameters(2, 2)
    learn.fit(1)


def test_the_same_callback_again_after_a_removal(tmp_path):
    learn, callback = learner(tmp_path), coupled()
    learn.fit(1, cbs=callback)
    remove(learn.model, X[:4], measure=False)
    learn.fit(1, cbs=callback)
    assert silent(learn.model) == (2, 2)
    remove(learn.model, X[:4], measure=False)
    assert widths(learn.model) == (2, 2)


def test_the_small_learner_is_saved_loaded_and_exported(tmp_path):
    learn = learner(tmp_path)
    learn.fit(1, cbs=coupled())
    remove(learn.model, X[:4], measure=False)
    learn.fit(1, cbs=PruneCallback(0.5, lin, "local", large_final))
    learn.save("small", with_opt=True)
    before = outputs(learn.model)
    learn.fit(1)
    learn.load("small", with_opt=True)
    assert torch.equal(outputs(learn.model), before)
    learn.dls.new_empty = lambda: learn.dls  # loaders of plain tensors have no empty copy
    learn.export("learner.pkl")
    again = load_learner(tmp_path / "learner.pkl")
    assert widths(again.model) == (2, 2)
    assert torch.equal(outputs(again.model), before)


def loaded(path, learn: Learner) -> Learner:
    learn.save("sparse", with_opt=True)
    return learner(path).load("sparse", with_opt=True)


COPIES = {"copied": lambda path, learn: copy.deepcopy(learn), "pickled": lambda path, learn: pickle.loads(pickle.dumps(learn))}


@pytest.mark.parametrize("how", ["copied", "pickled", "loaded"])
def test_the_optimizer_of_a_copy_is_handed_over(tmp_path, how):
    learn = learner(tmp_path)
    learn.logger = print
    learn.fit(1, cbs=coupled())
    again = {**COPIES, "loaded": loaded}[how](tmp_path, learn)
    before = outputs(learn.model)
    remove(again.model, X[:4], optimizer=again.opt, measure=False)
    assert same(outputs(again.model), before)
    assert (widths(again.model), widths(learn.model)) == ((4, 4), (8, 8))
    again.fit(1)
    learn.fit(1)
    assert (widths(again.model), widths(learn.model)) == ((4, 4), (8, 8))


@pytest.mark.parametrize("with_opt", [False, True])
def test_the_best_model_of_a_sparse_training_is_put_back_and_can_be_cut(tmp_path, with_opt):
    learn, callback = learner(tmp_path), coupled(schedule=OneShot(0.0))
    keys = list(learn.model.state_dict())
    learn.fit(2, cbs=[callback, SaveModelCallback(with_opt=with_opt)])
    assert list(learn.model.state_dict()) == keys
    assert silent(learn.model) == (4, 4)
    before = outputs(learn.model)
    remove(learn.model, X[:4], measure=False)
    assert widths(learn.model) == (4, 4)
    assert same(outputs(learn.model), before)
    learn.fit(1)


def test_lr_find_masks_nothing(tmp_path):
    learn = learner(tmp_path)
    learn.add_cb(coupled())
    before = copy.deepcopy(learn.model.state_dict())
    learn.lr_find(num_it=6, show_plot=False)
    assert all(torch.equal(before[k], v) for k, v in learn.model.state_dict().items())
    learn.fit(1)
    assert silent(learn.model) == (4, 4)


def body_and_head(model: nn.Sequential) -> list[list[nn.Parameter]]:
    return [list(model[:2].parameters()), list(model[4].parameters())]


@pytest.mark.filterwarnings("ignore:.*frozen")
def test_a_frozen_backbone_waits_until_it_trains(tmp_path):
    learn, callback = learner(tmp_path, splitter=body_and_head), coupled()
    seen = []
    note = Callback(after_fit=lambda self: seen.append(silent(self.learn.model)))
    note.order = 90
    convs = copy.deepcopy(learn.model[1])
    frozen = Callback(before_fit=lambda self: seen.append(learn.model[1].conv1.weight.requires_grad))
    learn.fine_tune(1, freeze_epochs=1, cbs=[callback, note, frozen])
    assert seen == [False, (0, 0), True, (4, 4)]
    assert not torch.equal(convs.conv1.weight, learn.model[1].conv1.weight)
    before = outputs(learn.model)
    remove(learn.model, X[:4], measure=False)
    assert widths(learn.model) == (4, 4)
    assert same(outputs(learn.model), before)
    learn.fit(1)


# --- budgets ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["params", "macs"])
@pytest.mark.parametrize("context", ["local", "global"])
def test_a_budget_in_a_training(tmp_path, kind, context):
    learn = learner(tmp_path)
    dense = copy.deepcopy(learn.model)
    learn.fit(2, cbs=PruneCallback(Budget(**{kind: 0.5}), lin, context, large_final))
    count = parameters if kind == "params" else macs
    if kind == "macs":
        assert cost(dense, X[:1]).macs == macs(8, 8)
    stream, inner = widths(learn.model)
    assert count(stream, inner) <= count(8, 8) / 2 < max(count(stream + 1, inner), count(stream, inner + 1))
    learn.fit(1)


def macs(stream: int, inner: int) -> int:
    """For one image of 8 x 8: three convolutions of 3 x 3, and the head."""
    return 64 * 9 * (stream + 2 * stream * inner) + 10 * stream


# --- the way as it is announced ---------------------------------------------------------------------------------------


def test_the_whole_code_as_it_is_announced(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model, x, build_dense_model = build(16), X, partial(build, 16)
    learn = learner(tmp_path, model)

    result = Pruner(model, 0.5, "global", large_final, example_inputs=x).prune_model()
    assert sum(after for _, after in result.groups.values()) == sum(widths(model)) == 16

    learn.fit_one_cycle(5, cbs=SparsifyCallback(0.5, "coupled", "global", large_final, one_cycle, example_inputs=x))
    before = outputs(model)
    result = remove(learn.model, x)
    assert sum(widths(model)) == 8
    assert same(outputs(model), before)
    learn.fit_one_cycle(2, cbs=PruneCallback(0.5, agp, "global", large_final))
    assert sum(widths(model)) == 4

    print(result)
    assert {"dense", "small"} <= set(capsys.readouterr().out.split())
    assert result.plot().axes
    before = outputs(model)
    save_small("small.safetensors", model)
    model = load_small("small.safetensors", build_dense_model())
    assert same(outputs(model), before)

    model = build_dense_model()
    Pruner(model, Budget(macs=0.5), "global", large_final, example_inputs=x).prune_model()
    stream, inner = widths(model)
    assert macs(stream, inner) <= macs(16, 16) / 2 < max(macs(stream + 1, inner), macs(stream, inner + 1))
