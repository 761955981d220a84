"""What frameworks do after a sparse training, or in the place of its end, is said in each of the loops."""

from __future__ import annotations

import logging
import warnings

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.schedule import Learner  # which adds lr_find
from fastai.data.core import DataLoaders
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import Adam
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import Trainer, TrainerCallback, TrainingArguments

import fasterai.callbacks.fastai as for_fastai
import fasterai.callbacks.huggingface as for_huggingface
import fasterai.callbacks.lightning as for_lightning
from fasterai.callbacks.methods import Method

STEPS = 4


@pytest.fixture(autouse=True)
def _quiet():
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, labels: Tensor | None = None):
        logits = self.head(torch.tanh(self.body(x)))
        return logits if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


def dataset() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(8 * STEPS, 6, generator=generator)
    return TensorDataset(x, torch.randint(3, (8 * STEPS,), generator=generator))


class Module(pl.LightningModule):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.net = model

    def training_step(self, batch, index):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class StopsFastai(Callback):
    def after_batch(self):
        if self.learn.iter == 1 and self.training:
            raise CancelFitException


class StopsLightning(pl.Callback):
    def on_train_batch_end(self, trainer, *_):
        trainer.should_stop = trainer.global_step >= 2


class StopsHuggingFace(TrainerCallback):
    def on_step_end(self, args, state, control, **given):
        control.should_training_stop = state.global_step == 2


class Fastai:
    """Fits of one network in fastai."""

    callbacks, stops = for_fastai, StopsFastai

    def __init__(self, path) -> None:
        data = DataLoaders(DataLoader(dataset(), 8), DataLoader(dataset(), 8), device="cpu")
        self.learn = Learner(data, Net(), loss_func=CrossEntropyLossFlat(), opt_func=Adam, path=path)
        self.learn.remove_cb(self.learn.progress)
        self.learn.logger = lambda log: None

    def fit(self, *callbacks) -> None:
        self.learn.fit(1, 0.01, cbs=list(callbacks))


class Lightning:
    """Fits of one network in Lightning, each with a trainer of its own."""

    callbacks, stops = for_lightning, StopsLightning

    def __init__(self, path) -> None:
        self.path, self.module = path, Module(Net())

    def fit(self, *callbacks) -> None:
        options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
        trainer = pl.Trainer(
            accelerator="cpu", max_epochs=1, min_epochs=0, callbacks=[*callbacks], default_root_dir=self.path, **options
        )
        trainer.fit(self.module, DataLoader(dataset(), 8))


class HuggingFace:
    """Fits of one network in Hugging Face's Trainer, each with a trainer of its own."""

    callbacks, stops = for_huggingface, StopsHuggingFace

    def __init__(self, path) -> None:
        self.path, self.model = path, Net()

    def fit(self, *callbacks) -> None:
        args = TrainingArguments(
            str(self.path), num_train_epochs=1, use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no"
        )
        rows = [{"x": x, "labels": y} for x, y in dataset()]
        Trainer(self.model, args, train_dataset=rows, callbacks=[*callbacks]).train()


LOOPS = [Fastai, Lightning, HuggingFace]


@pytest.fixture(params=LOOPS, ids=[loop.__name__ for loop in LOOPS])
def loop(request, tmp_path):
    return request.param(tmp_path)


def sparsify(loop, sparsity: float = 0.5, **options) -> Method:
    return loop.callbacks.SparsifyCallback(sparsity, "weight", "global", "large_final", "lin", **options)


def said(fit, *words: str) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit()
    texts = [str(w.message) for w in caught if "its handle is gone" not in str(w.message)]  # that is of earlier tests
    return [text for text in texts if any(word in text for word in words)]


OURS = ("come back", "run ends", "were not zero", "nothing was pruned")


def test_a_sparse_training_and_one_that_holds_say_nothing(loop):
    callback = sparsify(loop)
    assert said(lambda: loop.fit(callback), *OURS) == []
    assert said(lambda: loop.fit(loop.callbacks.HoldCallback(callback.sparsifier)), *OURS) == []
    assert said(lambda: loop.fit(callback), *OURS) == []  # a second run of the same sparsifier holds what there is
    assert round(callback.current_sparsity, 2) == 0.5


def test_training_on_without_a_hold_is_said(loop):
    callback = sparsify(loop)
    loop.fit(callback)
    (message,) = said(loop.fit, *OURS)
    assert "its pruned weights come back" in message and "HoldCallback(sparsifier)" in message


def test_training_on_with_another_callback_is_said(loop):
    loop.fit(sparsify(loop))  # nobody keeps the callback
    (message,) = said(lambda: loop.fit(sparsify(loop, 0.1)), *OURS)
    assert "its pruned weights come back" in message


def test_a_training_that_was_stopped_is_said_with_both_figures(loop):
    (message,) = said(lambda: loop.fit(sparsify(loop), loop.stops()), *OURS)
    # of 6 * 8 + 8 * 3 = 72 weights half are 36; lin has a half of them, or a quarter, after 2 steps of 4
    assert message.startswith("the run ends at step 2 of 4, with sparsity 0.2500 of 0.5000: it was stopped early")


def test_a_training_that_was_stopped_on_what_was_asked_for_is_not_said(loop):
    callback = loop.callbacks.SparsifyCallback(0.5, "weight", "global", "large_final", "one_shot")
    callback.settings.options["schedule"] = lambda position: float(position >= 0.25)
    assert said(lambda: loop.fit(callback, loop.stops()), *OURS) == []


def test_a_network_whose_targets_are_all_frozen_is_said(loop):
    model = {"learn": "model", "module": "net"}
    owner = next((getattr(loop, name) for name in model if hasattr(loop, name)), loop)
    net = owner.model if hasattr(owner, "model") else owner.net
    for p in (net.body.weight, net.head.weight):
        p.requires_grad_(False)
    if isinstance(loop, Lightning):  # its optimizer has them all the same
        (message,) = said(lambda: loop.fit(sparsify(loop)), *OURS)
        assert message.startswith("nothing was pruned in this run: every target was frozen")
    else:
        with pytest.raises(ValueError, match=r"body\.weight, \.\.\.\): all of them are frozen; let them train"):
            loop.fit(sparsify(loop))


def test_errors_of_arguments_name_the_callback_that_was_called(loop):
    with pytest.raises(TypeError, match=r"^SparsifyCallback\.__init__\(\) missing 4 required positional arguments"):
        loop.callbacks.SparsifyCallback(0.5)
    with pytest.raises(TypeError, match=r"^PruneCallback\.__init__\(\) missing 3 required"):
        loop.callbacks.PruneCallback(0.5)
    with pytest.raises(TypeError, match=r"^HoldCallback\.__init__\(\) missing 1 required"):
        loop.callbacks.HoldCallback()


# --- what one framework alone does --------------------------------------------------------------------------------------


def test_a_search_for_a_rate_in_fastai_trains_nothing(tmp_path):
    loop = Fastai(tmp_path)
    callback = sparsify(loop)
    loop.fit(callback)
    assert said(lambda: loop.learn.lr_find(num_it=10, show_plot=False), *OURS) == []
    assert len(said(loop.fit, *OURS)) == 1


class PutsBack(Callback):
    """Puts other weights back at the end, as SaveModelCallback does with those of the best epoch."""

    order = 70

    def after_fit(self):
        with torch.no_grad():
            self.learn.model.body.weight.fill_(1.0)


def test_weights_that_fastai_puts_back_after_the_run_are_said(tmp_path):
    loop = Fastai(tmp_path)
    (message,) = said(lambda: loop.fit(sparsify(loop), PutsBack()), *OURS)
    assert message.startswith("after the run, which left them zero (sparsifier.apply_masks() does so again): ")


@pytest.mark.parametrize("first", [True, False])
def test_an_average_that_lightning_puts_back_is_said(tmp_path, first):
    loop = Lightning(tmp_path)
    callback, average = sparsify(loop), WeightAveraging()
    both = (average, callback) if first else (callback, average)
    (message,) = said(lambda: loop.fit(*both), *OURS)
    assert ("at the end of the run, which sets them to zero" if first else "after the run, which left them zero") in message
    if not first:
        callback.sparsifier.apply_masks()
    assert callback.sparsifier.report().together.disobeying == 0
