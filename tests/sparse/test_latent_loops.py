"""Latent weights in every loop: no forward pass, validation or checkpoint meets them, whatever happens to a step."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from fastai.callback.core import (
    Callback,
    CancelBatchException,
    CancelEpochException,
    CancelStepException,
    CancelTrainException,
)
from fastai.callback.tracker import SaveModelCallback
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import SGD
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from lightning.pytorch.plugins import MixedPrecision
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import Trainer, TrainerCallback, TrainingArguments

import fasterai.callbacks.fastai as for_fastai
import fasterai.callbacks.huggingface as for_huggingface
import fasterai.callbacks.lightning as for_lightning
from fasterai.callbacks.plain import attach
from fasterai.core.types import Target
from fasterai.model.targets import all_targets
from fasterai.prune.gradual import GradualPruner
from fasterai.sparse.latent import LatentWeights

pytestmark = pytest.mark.filterwarnings("ignore")
STEPS, GRID = 4, 0.25


class Rounded(LatentWeights):
    """Shows weights on a grid of 0.25, and counts how often it is asked for gradients."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.targets, self.pulls = model, tuple(t for t in all_targets(model) if t.parameter.dim() > 1), 0

    def show_(self, target: Target, weight: Tensor, kept: Tensor | None) -> Tensor:
        latent = weight.clone() if kept is None else kept.copy_(weight)
        weight.div_(GRID).round_().mul_(GRID)
        return latent

    def pull_(self, target: Target, gradient: Tensor, kept: Tensor) -> None:
        self.pulls += 1


def on_grid(tensor: Tensor) -> bool:
    return torch.equal(tensor, (tensor / GRID).round() * GRID)


class Net(nn.Module):
    """Notes at each forward pass if its weights are those that are shown, and has factors for its losses."""

    def __init__(self, *factors: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 3)
        self.seen: list[bool] = []
        self.factors = itertools.chain(factors, itertools.repeat(1.0))

    @property
    def is_shown(self) -> bool:
        return on_grid(self.body.weight.detach()) and on_grid(self.head.weight.detach())

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        self.seen.append(self.is_shown)
        logits = self.head(torch.tanh(self.body(x)))
        if labels is None:
            return logits
        return {"loss": F.cross_entropy(logits, labels) * next(self.factors), "logits": logits}


def dataset() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(4 * STEPS, 6, generator=generator), torch.arange(4 * STEPS) % 3)


def loader() -> DataLoader:
    return DataLoader(dataset(), batch_size=4)


def loss_of(model: Net, index: int = 0) -> Tensor:
    x, y = dataset()[4 * index : 4 * index + 4]
    return model(x, y)["loss"]


def right(model: Net, rounded: Rounded) -> None:
    """Every forward pass but those before the first batch met shown weights; so does whoever looks; the latent ones moved."""
    assert model.seen and all(model.seen) and model.is_shown
    assert not any(on_grid(weight) for weight in rounded.latent.values())


def lbfgs(parameters: Any, rate: float = 0.5, search: str | None = None) -> torch.optim.Optimizer:
    return torch.optim.LBFGS(parameters, rate, max_iter=3, line_search_fn=search)


# --- loops of one's own -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True])
def test_a_skipped_step_leaves_the_weights_shown(fused):
    model = Net(1.0, float("inf"), 1.0)
    optimizer, scaler = torch.optim.AdamW(model.parameters(), 0.1, fused=fused), torch.amp.GradScaler("cpu", init_scale=64.0)
    rounded = Rounded(model)
    with attach(optimizer, rounded, total_steps=2):
        for i in range(3):
            scaler.scale(loss_of(model, i)).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            assert model.is_shown
    right(model, rounded)
    assert rounded.pulls == 4  # two targets, two steps


@pytest.mark.parametrize(
    "make",
    [lambda p: torch.optim.SGD(p, 0.5), lbfgs, partial(lbfgs, search="strong_wolfe")],
    ids=["sgd", "lbfgs", "strong_wolfe"],
)
def test_a_closure_computes_with_shown_weights_however_often_it_is_called(make):
    model = Net()
    optimizer, rounded = make(model.parameters()), Rounded(model)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    with attach(optimizer, rounded, total_steps=2):
        for _ in range(2):
            optimizer.step(closure)
            assert model.is_shown
    right(model, rounded)


class Fails(torch.optim.SGD):
    """Fails in the middle of its second step."""

    count = 0

    def step(self, closure: Any = None) -> Any:
        self.count += 1
        result = super().step(closure)
        if self.count == 2:
            raise MemoryError
        return result


def test_a_step_that_fails_is_shown_by_the_end_of_the_run():
    model = Net()
    optimizer, rounded = Fails(model.parameters(), 0.5), Rounded(model)

    def train() -> None:
        with attach(optimizer, rounded, total_steps=3):
            for i in range(3):
                loss_of(model, i).backward()
                optimizer.step()

    with pytest.raises(MemoryError):
        train()
    right(model, rounded)


def test_a_loop_that_goes_on_after_a_failed_step_goes_on_from_its_latent_weights():
    model = Net()
    optimizer, rounded = torch.optim.SGD(model.parameters(), 0.5), Rounded(model)
    with attach(optimizer, rounded, total_steps=2) as handle:
        loss_of(model).backward()
        handle.loop.before_step()  # as by a step that raises before its end
        assert not model.is_shown
        optimizer.step()
        assert model.is_shown
        loss_of(model, 1).backward()
        optimizer.step()
    assert all(model.seen)


@pytest.mark.parametrize("is_first", [False, True])
def test_channels_that_go_in_the_middle_take_their_latent_weights_along(is_first):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    x, y = dataset()[:4]
    optimizer, rounded = torch.optim.SGD(model.parameters(), 0.5, momentum=0.9), Rounded(model)
    pruner = GradualPruner(model, 0.5, "local", "large_final", "lin", example_inputs=x, round_to=1)
    given = [pruner, rounded] if is_first else [rounded, pruner]
    with attach(optimizer, *given, total_steps=4, model=model):
        for _ in range(4):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            assert on_grid(model[0].weight.detach())
            assert [w.shape for w in rounded.latent.values()] == [model[0].weight.shape, model[2].weight.shape]
    assert model[0].out_features == 4
    assert not on_grid(rounded.latent["0.weight"])


# --- fastai -----------------------------------------------------------------------------------------------------------------


class Cancels(Callback):
    """Cancels behind the callback of the participant, when the latent weights are there, in the second step."""

    order = 80

    def __init__(self, error: type[Exception]) -> None:
        self.error = error

    def before_step(self) -> None:
        if self.learn.train_iter == 1:
            raise self.error


def learner(model: Net, folder: Path) -> Learner:
    loaders = DataLoaders(loader(), loader())
    return Learner(loaders, model, loss_func=CrossEntropyLossFlat(), opt_func=SGD, lr=0.5, path=folder)


@pytest.mark.parametrize("error", [CancelStepException, CancelBatchException, CancelEpochException, CancelTrainException])
def test_fastai_s_cancelled_steps_leave_the_weights_shown(error, tmp_path):
    model = Net()
    rounded = Rounded(model)
    callback = for_fastai.ParticipantCallback(rounded)
    learn = learner(model, tmp_path)
    shown: list[bool] = []
    looks = type("Looks", (Callback,), {"order": 61, "after_epoch": lambda self: shown.append(model.is_shown)})
    with learn.no_bar(), learn.no_logging():
        learn.fit(2, cbs=[callback, Cancels(error), looks()])
    right(model, rounded)
    assert shown == [True, True]


def test_fastai_s_files_hold_shown_weights_and_unfrozen_layers_train(tmp_path):
    model = Net()
    rounded = Rounded(model)
    learn = Learner(
        DataLoaders(loader(), loader()),
        model,
        loss_func=CrossEntropyLossFlat(),
        opt_func=SGD,
        path=tmp_path,
        splitter=lambda m: [[*m.body.parameters()], [*m.head.parameters()]],
    )
    callback = for_fastai.ParticipantCallback(rounded)
    before = model.body.weight.detach().clone()
    with learn.no_bar(), learn.no_logging():
        learn.freeze()
        learn.fit(1, lr=0.5, cbs=[callback, SaveModelCallback(every_epoch=True)])
        assert torch.equal(rounded.latent["body.weight"], before)  # frozen: shown, and not trained
        learn.unfreeze()
        learn.fit(1, lr=0.5, cbs=callback)
    right(model, rounded)
    assert not torch.equal(rounded.latent["body.weight"], before)
    saved = torch.load(tmp_path / "models" / "model_0.pth", weights_only=True)
    assert on_grid(saved["body.weight"]) and on_grid(saved["head.weight"])


# --- Lightning --------------------------------------------------------------------------------------------------------------


class Module(pl.LightningModule):
    def __init__(self, net: Net, make: Callable[..., Any] = torch.optim.SGD) -> None:
        super().__init__()
        self.net, self.make = net, make

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net(*batch)["loss"].float()

    def configure_optimizers(self) -> Any:
        return self.make(self.parameters(), 0.5)


class Manual(Module):
    """Trains both layers by optimizers of their own, with the gradients of one backward pass."""

    def __init__(self, net: Net) -> None:
        super().__init__(net)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        first, second = self.optimizers()
        self.manual_backward(self.net(*batch)["loss"])
        first.step()
        assert self.net.is_shown
        second.step()
        assert self.net.is_shown
        for one in (first, second):
            one.zero_grad()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(part.parameters(), 0.5) for part in (self.net.body, self.net.head)]


def trainer(folder: Path, *callbacks: Any, **options: Any) -> pl.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    saves = {"enable_checkpointing": any(isinstance(one, ModelCheckpoint) for one in callbacks)}
    options = {"max_epochs": 1, "accelerator": "cpu", "default_root_dir": folder, **quiet, **saves, **options}
    return pl.Trainer(callbacks=list(callbacks), **options)


class Averages(WeightAveraging):
    """Averages the weights, and looks at them before, when a batch and its step are done."""

    def __init__(self) -> None:
        super().__init__()
        self.shown: list[bool] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.shown.append(pl_module.net.is_shown)
        super().on_train_batch_end(trainer, pl_module, *args)


def test_lightning_s_skipped_steps_leave_the_weights_shown(tmp_path):
    model, averages = Net(1.0, float("inf"), 1.0), Averages()
    rounded = Rounded(model)
    plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=64.0))
    plugin.autocast_context_manager = lambda: torch.autocast("cpu", torch.bfloat16)  # the CPU has no half precision
    saves = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1)
    given = [averages, for_lightning.ParticipantCallback(rounded), saves]
    trainer(tmp_path, *given, plugins=[plugin]).fit(Module(model), loader())
    assert model.seen and all(model.seen) and averages.shown == [True] * STEPS
    assert rounded.pulls == 2 * STEPS
    files = sorted(tmp_path.glob("*.ckpt"))
    assert len(files) >= STEPS - 1
    for file in files:
        weights = torch.load(file, weights_only=True)["current_model_state"]  # besides the averages
        assert on_grid(weights["net.body.weight"]) and on_grid(weights["net.head.weight"])


def test_lightning_s_closures_compute_with_shown_weights(tmp_path):
    model = Net()
    rounded = Rounded(model)
    trainer(tmp_path, for_lightning.ParticipantCallback(rounded)).fit(Module(model, lbfgs), loader())
    right(model, rounded)
    assert len(model.seen) > STEPS


def test_lightning_s_optimizers_adjust_each_gradient_once(tmp_path):
    model = Net()
    rounded = Rounded(model)
    trainer(tmp_path, for_lightning.ParticipantCallback(rounded)).fit(Manual(model), loader())
    right(model, rounded)
    assert rounded.pulls == 2 * STEPS


def test_a_closure_of_manual_optimization_that_is_called_again_is_refused(tmp_path):
    class Closure(Manual):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()

            def closure() -> Tensor:
                optimizer.zero_grad()
                loss = self.net(*batch)["loss"]
                self.manual_backward(loss)
                return loss

            optimizer.step(closure)

        def configure_optimizers(self) -> Any:
            return lbfgs(self.parameters())

    model = Net()
    with pytest.raises(ValueError, match="optimizer must call its closure once in a step of Rounded"):
        trainer(tmp_path, for_lightning.ParticipantCallback(Rounded(model))).fit(Closure(model), loader())
    assert model.is_shown


# --- Hugging Face -----------------------------------------------------------------------------------------------------------


def huggingface(model: Net, folder: Path, *callbacks: TrainerCallback, **options: Any) -> Trainer:
    options = {"max_steps": STEPS, "learning_rate": 0.5, "use_cpu": True, "report_to": [], "disable_tqdm": True, **options}
    arguments = TrainingArguments(str(folder), per_device_train_batch_size=4, optim="sgd", **options)
    return Trainer(model, arguments, train_dataset=[{"x": x, "labels": y} for x, y in dataset()], callbacks=list(callbacks))


def test_hugging_face_s_skipped_steps_leave_the_weights_shown_and_its_files_hold_them(tmp_path):
    class Scales(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
            run.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
            optimizer.__init__(optimizer.optimizer, False, run.accelerator.scaler)
            run.accelerator.native_amp = True
            run.accelerator.state._mixed_precision = "fp16"

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            shown.append(model.is_shown)

    model, shown = Net(1.0, float("inf"), 1.0), []
    rounded = Rounded(model)
    callback = for_huggingface.ParticipantCallback(rounded)
    run = huggingface(model, tmp_path, Scales(), callback, save_strategy="steps", save_steps=STEPS)
    try:
        run.train()
    finally:
        run.accelerator.state._mixed_precision = "no"
    right(model, rounded)
    assert shown == [True] * STEPS
    weights = load_file(tmp_path / f"checkpoint-{STEPS}" / "model.safetensors")
    assert on_grid(weights["body.weight"]) and on_grid(weights["head.weight"])


def test_a_step_of_hugging_face_that_failed_is_over_when_the_model_is_called_next(tmp_path):
    class Interrupts(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 1:
                raise KeyboardInterrupt

    model = Net()
    rounded = Rounded(model)
    run = huggingface(model, tmp_path, for_huggingface.ParticipantCallback(rounded), Interrupts(), save_strategy="no")
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert not model.is_shown
    with torch.no_grad():
        model.eval()(dataset()[:4][0])
    right(model, rounded)
