"""The method that docs/callbacks.md shows how to write: in every framework it trains, is saved, and goes on where it was."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import Trainer, TrainingArguments

import fasterai.callbacks.fastai as for_fastai
import fasterai.callbacks.huggingface as for_huggingface
import fasterai.callbacks.lightning as for_lightning
from fasterai.callbacks.plain import attach
from fasterai.sparse.sparsifier import Sparsifier

pytestmark = pytest.mark.filterwarnings("ignore")
PAGE = Path(__file__).parents[2] / "docs" / "callbacks.md"
EPOCHS, BATCHES = 2, 4


def class_centres() -> Any:
    """The class as the page has it."""
    code = re.search(r"```python\n(import torch\n.*?class ClassCentres.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert code is not None and len(code[1].splitlines()) <= 32
    names: dict[str, Any] = {}
    exec(compile(code[1], str(PAGE), "exec"), names)
    return names["ClassCentres"](3)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.head(torch.tanh(self.body(x)))
        return logits if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


def dataset() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(
        torch.randn(8 * BATCHES, 6, generator=generator), torch.randint(3, (8 * BATCHES,), generator=generator)
    )


def loader() -> DataLoader:
    return DataLoader(dataset(), batch_size=8)


def both(model: Net, **axes: str) -> list[Any]:
    """The method of the page, and a sparsifier beside it."""
    return [class_centres(), Sparsifier(model, sparsity=0.5, schedule="lin", **axes)]


def plain(model: Net, given: list[Any], folder: Path, stop: bool, resume: bool) -> None:
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    handle = attach(optimizer, *given, total_steps=EPOCHS * BATCHES, model=model)
    if resume:
        saved = torch.load(folder / "saved.pt", weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        handle.load_state_dict(saved["handle"])
    for _ in range(int(resume), 1 if stop else EPOCHS):
        for x, y in loader():
            outputs = model(x)
            handle.loss(F.cross_entropy(outputs, y), x, y, outputs).backward()
            optimizer.step()
            optimizer.zero_grad()
    if stop:
        saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "handle": handle.state_dict()}
        assert len(saved["optimizer"]["state"]) == 4  # the file is that of an optimizer of the model alone
        torch.save(saved, folder / "saved.pt")
    handle.remove()


def accelerate(model: Net, given: list[Any], folder: Path, stop: bool, resume: bool) -> None:
    accelerator = Accelerator(cpu=True)
    model, optimizer, batches = accelerator.prepare(model, torch.optim.Adam(model.parameters(), 0.01), loader())
    handle = attach(optimizer, *given, total_steps=EPOCHS * BATCHES, model=model)
    accelerator.register_for_checkpointing(handle)
    if resume:
        accelerator.load_state(folder / "state")
    for _ in range(int(resume), 1 if stop else EPOCHS):
        for x, y in batches:
            outputs = model(x)
            accelerator.backward(handle.loss(F.cross_entropy(outputs, y), x, y, outputs))
            optimizer.step()
            optimizer.zero_grad()
    if stop:
        accelerator.save_state(folder / "state")
    handle.remove()


class Saves(Callback):
    """Saves after the first epoch, and stops."""

    order = 90

    def __init__(self, callback: Any, folder: Path) -> None:
        self.callback, self.folder = callback, folder

    def after_epoch(self) -> None:
        if self.epoch == 0:
            self.learn.save(self.folder / "saved", with_opt=True)
            torch.save(self.callback.state_dict(), self.folder / "callback.pt")
            raise KeyboardInterrupt


def fastai(model: Net, given: list[Any], folder: Path, stop: bool, resume: bool) -> None:
    learn = Learner(DataLoaders(loader(), loader()), model, loss_func=CrossEntropyLossFlat(), lr=0.01, path=folder)
    callback = for_fastai.ParticipantCallback(*given)
    with learn.no_bar(), learn.no_logging():
        if resume:
            learn.create_opt()
            learn.load(folder / "saved", with_opt=True)
            callback.load_state_dict(torch.load(folder / "callback.pt", weights_only=True))
            learn.fit(EPOCHS, start_epoch=1, cbs=callback)
        elif stop:
            with pytest.raises(KeyboardInterrupt):
                learn.fit(EPOCHS, cbs=[callback, Saves(callback, folder)])
        else:
            learn.fit(EPOCHS, cbs=callback)


class Module(pl.LightningModule):
    def __init__(self, net: Net) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), 0.01)


class Stops(pl.Callback):
    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 1:
            raise KeyboardInterrupt


def lightning(model: Net, given: list[Any], folder: Path, stop: bool, resume: bool) -> None:
    saves = pl.callbacks.ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    trainer = pl.Trainer(
        max_epochs=EPOCHS,
        callbacks=[for_lightning.ParticipantCallback(*given), saves, *([Stops()] if stop else [])],
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    try:
        trainer.fit(Module(model), loader(), ckpt_path=folder / "epoch=0.ckpt" if resume else None)
    except (KeyboardInterrupt, SystemExit):
        assert stop


def huggingface(model: Net, given: list[Any], folder: Path, stop: bool, resume: bool) -> None:
    arguments = TrainingArguments(
        str(folder),
        per_device_train_batch_size=8,
        num_train_epochs=EPOCHS,
        learning_rate=0.01,
        use_cpu=True,
        report_to=[],
        save_strategy="epoch",
        disable_tqdm=True,
    )
    items = [{"x": x, "labels": y} for x, y in dataset()]
    trainer = Trainer(model, arguments, train_dataset=items, callbacks=[for_huggingface.ParticipantCallback(*given)])
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{BATCHES}") if resume else None)


FRAMEWORKS = [plain, accelerate, fastai, lightning, huggingface]


VARIETY = {"granularity": "row", "targets": "body", "criteria": "variety(movement)"}


@pytest.mark.parametrize("axes", [{}, VARIETY], ids=["magnitude", "variety"])
@pytest.mark.parametrize("run", FRAMEWORKS)
def test_a_resumed_run_is_the_same_bit_for_bit(run, axes, tmp_path):
    whole, stopped, resumed = Net(), Net(), Net()
    ours, first, second = both(whole, **axes), both(stopped, **axes), both(resumed, **axes)
    run(whole, ours, tmp_path / "whole", stop=False, resume=False)
    (tmp_path / "parts").mkdir()
    run(stopped, first, tmp_path / "parts", stop=True, resume=False)
    run(resumed, second, tmp_path / "parts", stop=False, resume=True)
    centres = ours[0].centres.detach()
    assert centres.abs().min() > 0 and ours[0].distance > 0
    assert torch.equal(centres, second[0].centres.detach())
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert float(ours[1].sparsity) == float(second[1].sparsity) == 0.5


@pytest.mark.parametrize("run", FRAMEWORKS)
def test_the_method_changes_what_is_trained(run, tmp_path):
    model, alone = Net(), Net()
    run(model, [class_centres()], tmp_path / "with", stop=False, resume=False)
    run(alone, [Sparsifier(alone, sparsity=0.0, schedule="lin")], tmp_path / "without", stop=False, resume=False)
    assert not any(torch.equal(a, b) for a, b in zip(model.parameters(), alone.parameters(), strict=True))
