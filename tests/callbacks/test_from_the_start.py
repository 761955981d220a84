"""`TernarizeCallback` in each of the frameworks: its settings are checked at once, and the trained weights are ternary."""

from __future__ import annotations

import importlib
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import Trainer, TrainingArguments

from fasterai.misc.ternary.ternarize import find_ternary

pytestmark = pytest.mark.filterwarnings("ignore")
FRAMEWORKS = ["fastai", "lightning", "huggingface"]


class Net(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.body, self.last = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.last(torch.tanh(self.body(torch.tanh(self.first(x)))))
        return logits if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(framework: str, net: Net, callback: Any, folder: Any) -> None:
    data = TensorDataset(torch.randn(16, 4, generator=torch.Generator().manual_seed(1)), torch.arange(16) % 3)
    loader = DataLoader(data, batch_size=8)
    if framework == "fastai":
        learn = Learner(DataLoaders(loader, loader), net, loss_func=F.cross_entropy, lr=0.1, path=folder)
        with learn.no_bar(), learn.no_logging():
            learn.fit(1, cbs=callback)
    elif framework == "lightning":
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
        pl.Trainer(max_epochs=1, callbacks=[callback], accelerator="cpu", **quiet).fit(net, loader)
    else:
        arguments = TrainingArguments(
            str(folder), per_device_train_batch_size=8, num_train_epochs=1, use_cpu=True, report_to=[], save_strategy="no"
        )
        items = [{"x": x, "labels": y} for x, y in data]
        Trainer(net, arguments, train_dataset=items, callbacks=[callback]).train()


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_the_trained_weights_are_ternary_and_the_dense_ones_have_moved(framework, tmp_path):
    kind = importlib.import_module(f"fasterai.callbacks.{framework}").TernarizeCallback
    net, callback = Net(), kind(4, rule="exact")
    assert callback.metrics() == {"zeros": 0.0} and callback.participant is None
    fit(framework, net, callback, tmp_path)
    assert find_ternary(net).layers["body.weight"].error < 1e-6
    moved = callback.participant.latent["body.weight"] - Net().body.weight.detach()
    assert 0 < moved.abs().max() < 1
    assert callback.metrics() == {"zeros": int((net.body.weight == 0).sum()) / 64}


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_settings_are_checked_before_a_run(framework):
    kind = importlib.import_module(f"fasterai.callbacks.{framework}").TernarizeCallback
    with pytest.raises(ValueError, match="group must be at least 1, got 0"):
        kind(group=0)
    with pytest.raises(ValueError, match="rule must be one of exact, threshold, got 'best'"):
        kind(4, rule="best")
    with pytest.raises(TypeError, match=r"TernarizeCallback\(\) got an unexpected keyword argument 'size'"):
        kind(size=4)
    assert repr(kind(8)) == "<TernarizeCallback: group 8>"
