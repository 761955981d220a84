"""A student, its teacher and two losses, trained by hand and in each framework: what the tests of distillation share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.data.core import DataLoaders, TfmdDL
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import SGD
from torch import Tensor, nn
from torch.utils.data import DataLoader, SequentialSampler, TensorDataset
from transformers import Trainer, TrainingArguments

import fasterai.callbacks.fastai as for_fastai
import fasterai.callbacks.huggingface as for_huggingface
import fasterai.callbacks.lightning as for_lightning
from fasterai.callbacks.plain import attach
from fasterai.distill.distiller import Distiller
from fasterai.distill.losses.loss import Adapter, FeatureLoss, LogitLoss

EPOCHS, BATCHES, RATE = 2, 4, 0.5


@dataclass(frozen=True)
class Squares(LogitLoss):
    """Squared differences of logits."""

    def of_rows(self, student: Tensor, teacher: Tensor, labels: Tensor | None) -> Tensor:
        return (student - teacher).square().mean(1)


class Widen(Adapter):
    """A matrix from the student's width to the teacher's, all 0.1."""

    def __init__(self, narrow: int, wide: int) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.full((wide, narrow), 0.1))

    def keep_(self, index: int, kept: Any) -> dict[nn.Parameter, dict[int, Any]]:
        self.matrix.data = self.matrix.data[:, kept]
        self.matrix.grad = None
        return {self.matrix: {1: kept}}


@dataclass(frozen=True)
class Widened(FeatureLoss):
    """Squared differences of one feature of each network, the student's widened."""

    def of_pairs(self, student: list[Tensor], teacher: list[Tensor], labels: Any, adapter: Any) -> Tensor:
        return (F.linear(student[0].float(), adapter.matrix) - teacher[0].float()).square().mean()

    def adapter(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Adapter | None:
        return Widen(student[0].shape[1], teacher[0].shape[1])


class Net(nn.Module):
    def __init__(self, width: int = 8, dropout: float = 0.0, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body, self.drop, self.head = nn.Linear(6, width), nn.Dropout(dropout), nn.Linear(width, 3)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.head(self.drop(torch.tanh(self.body(x))))
        return logits if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


def teacher() -> Net:
    """A wider network, in training mode and with dropout, which has to be silent while it answers."""
    return Net(12, dropout=0.5, seed=5)


def dataset() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    rows = 8 * BATCHES
    return TensorDataset(torch.randn(rows, 6, generator=generator), torch.randint(3, (rows,), generator=generator))


def loader() -> DataLoader:
    return DataLoader(dataset(), batch_size=8)


@dataclass
class Way:
    """How a run trains."""

    accumulate: int = 1
    clip: float = 0.0
    bf16: bool = False


Run = Callable[[Net, "dict[str, Any]", Way, Path], "list[float]"]


def by_hand(student: Net, given: dict[str, Any], way: Way, features: bool) -> tuple[Tensor | None, list[float]]:
    """Train with the terms written into the loop; return the matrix of the adapter and the distillation losses."""
    other = teacher().eval()
    matrix = nn.Parameter(torch.full((12, 8), 0.1)) if features else None
    optimizer = torch.optim.SGD([*student.parameters(), *([] if matrix is None else [matrix])], RATE)
    total, step, values = EPOCHS * BATCHES // way.accumulate, 0, list[float]()
    for _ in range(EPOCHS):
        for i, (x, y) in enumerate(loader()):
            share = (step + 1) / total if given.get("schedule") == "lin" else 1.0
            with torch.autocast("cpu", torch.bfloat16) if way.bf16 else nullcontext():
                hidden = student.body(x)
                logits = student.head(torch.tanh(hidden))
                with torch.no_grad():
                    wanted = other.body(x)
                    answer = other.head(torch.tanh(wanted))
            task = F.cross_entropy(logits.float(), y)
            value = (logits.float() - answer.float()).square().mean()
            if matrix is not None:
                value = value + (hidden.float() @ matrix.T - wanted.float()).square().mean()
            values.append(float(value))
            w = given["weight"] * share
            (((1 - w) * task + w * value) / way.accumulate).backward()
            if (i + 1) % way.accumulate == 0:
                if way.clip:
                    nn.utils.clip_grad_norm_(student.parameters(), way.clip)
                optimizer.step()
                optimizer.zero_grad()
                step += 1
    return matrix, values


def plain(student: Net, given: dict[str, Any], way: Way, folder: Path) -> Distiller:
    distiller = Distiller(teacher(), **given)
    optimizer = torch.optim.SGD(student.parameters(), RATE)
    steps = {"epochs": EPOCHS, "steps_per_epoch": BATCHES, "accumulate": way.accumulate}
    with attach(optimizer, distiller, model=student, **steps) as handle:
        for _ in range(EPOCHS):
            for i, (x, y) in enumerate(loader()):
                with torch.autocast("cpu", torch.bfloat16) if way.bf16 else nullcontext():
                    outputs = student(x)
                    loss = handle.loss(F.cross_entropy(outputs.float(), y), x, y, outputs)
                (loss / way.accumulate).backward()
                if (i + 1) % way.accumulate == 0:
                    if way.clip:
                        handle.after_backward()
                        nn.utils.clip_grad_norm_(student.parameters(), way.clip)
                    optimizer.step()
                    optimizer.zero_grad()
    return distiller


def accelerate(student: Net, given: dict[str, Any], way: Way, folder: Path) -> Distiller:
    AcceleratorState._reset_state(reset_partial_state=True)  # the tests' kinds of precision are several
    accelerator = Accelerator(
        cpu=True, mixed_precision="bf16" if way.bf16 else "no", gradient_accumulation_steps=way.accumulate
    )
    optimizer = torch.optim.SGD(student.parameters(), RATE)
    model, optimizer, batches = accelerator.prepare(student, optimizer, loader())
    distiller = Distiller(teacher(), **given)
    steps = EPOCHS * BATCHES // way.accumulate
    with attach(optimizer, distiller, model=model, total_steps=steps) as handle:
        for _ in range(EPOCHS):
            for x, y in batches:
                with accelerator.accumulate(model):
                    outputs = model(x)
                    accelerator.backward(handle.loss(F.cross_entropy(outputs, y), x, y, outputs))
                    if way.clip and accelerator.sync_gradients:
                        handle.after_backward()
                        accelerator.clip_grad_norm_(model.parameters(), way.clip)
                    optimizer.step()
                    optimizer.zero_grad()
    return distiller


def learner(student: nn.Module, folder: Path, **options: Any) -> Learner:
    options = {"loss_func": CrossEntropyLossFlat(), "opt_func": SGD, "lr": RATE, **options}
    data = DataLoaders(*(TfmdDL(dataset(), bs=8, shuffle=False, num_workers=0) for _ in range(2)), device="cpu")
    return Learner(data, student, path=folder, **options)


def fastai(student: Net, given: dict[str, Any], way: Way, folder: Path) -> Distiller:
    learn = learner(student, folder)
    callback = for_fastai.KnowledgeDistillationCallback(teacher(), **given)
    accumulates = [GradientAccumulation(8 * way.accumulate)] if way.accumulate > 1 else []
    clips = [GradientClip(way.clip)] if way.clip else []
    with learn.no_bar(), learn.no_logging():
        learn.fit(EPOCHS, cbs=[callback, *accumulates, *clips])
    return callback.distiller


class Module(pl.LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.seen: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]).float(), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("valid_loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), RATE)


def trainer(folder: Path, *callbacks: Any, **options: Any) -> pl.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    options = {"max_epochs": EPOCHS, "accelerator": "cpu", "default_root_dir": folder, **quiet, **options}
    return pl.Trainer(callbacks=list(callbacks), **options)


def lightning(student: Net, given: dict[str, Any], way: Way, folder: Path) -> Distiller:
    callback = for_lightning.KnowledgeDistillationCallback(teacher(), **given)
    options = {"precision": "bf16-mixed"} if way.bf16 else {}
    clip = {"gradient_clip_val": way.clip} if way.clip else {}
    trainer(folder, callback, accumulate_grad_batches=way.accumulate, **options, **clip).fit(Module(student), loader())
    return callback.distiller


class InOrder(Trainer):
    """Takes the samples as they stand."""

    def _get_train_sampler(self, *_: Any) -> Any:
        return SequentialSampler(self.train_dataset)


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    usual = {"optim": "sgd", "lr_scheduler_type": "constant", "save_strategy": "no", "max_grad_norm": 0.0}
    quiet = {"use_cpu": True, "report_to": [], "disable_tqdm": True}
    rates = {"per_device_train_batch_size": 8, "num_train_epochs": EPOCHS, "learning_rate": RATE}
    return TrainingArguments(str(folder), **{**quiet, **rates, **usual, **options})


def items() -> list[dict[str, Tensor]]:
    return [{"x": x, "labels": y} for x, y in dataset()]


def huggingface(student: Net, given: dict[str, Any], way: Way, folder: Path) -> Distiller:
    callback = for_huggingface.KnowledgeDistillationCallback(teacher(), **given)
    options = {"gradient_accumulation_steps": way.accumulate, "max_grad_norm": way.clip, "bf16": way.bf16}
    InOrder(student, arguments(folder, **options), train_dataset=items(), callbacks=[callback]).train()
    return callback.distiller


FRAMEWORKS = {"plain": plain, "accelerate": accelerate, "fastai": fastai, "lightning": lightning, "huggingface": huggingface}
