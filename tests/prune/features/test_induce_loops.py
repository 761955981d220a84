"""Masks on features in every loop, then a small network and its selector; a stopped run goes on bit for bit."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fasterai.callbacks.plain import attach
from fasterai.core.schedules import one_cycle
from fasterai.prune.features.induce import induce
from fasterai.sparse.sparsifier import Sparsifier
from tests.networks import perceptron

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*number of training batches"),
    pytest.mark.filterwarnings("ignore:.*litlogger"),
]
X = torch.randn(16, 12, generator=torch.Generator().manual_seed(0))
Y = torch.arange(16) % 3
DATA = list(zip(X, Y, strict=True))


def settings(name):
    """The arguments of a callback that masks three quarters of the features of an argument."""
    return ({f"{name}.1": 0.75}, "coupled", "local", "large_final", one_cycle), {"features": {name: 1}}


def check(model, name):
    kept = model.get_submodule(name).weight.detach().abs().sum(0).nonzero().flatten().tolist()
    assert len(kept) == 3
    return kept


def in_fastai(tmp_path):
    learner = pytest.importorskip("fastai.learner")
    from fastai.data.core import DataLoaders

    from fasterai.callbacks.fastai import SparsifyCallback

    arguments, options = settings("input")
    model = perceptron(12, 10, 3)
    dls = DataLoaders.from_dsets(DATA, DATA, bs=8, num_workers=0, device="cpu")
    learn = learner.Learner(dls, model, loss_func=F.cross_entropy, cbs=SparsifyCallback(*arguments, **options), path=tmp_path)
    with learn.no_bar(), learn.no_logging():
        learn.fit(3, 0.01)
    return model, check(model, "0")


def in_lightning(tmp_path):
    pl = pytest.importorskip("lightning.pytorch")
    from fasterai.callbacks.lightning import SparsifyCallback

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.network = perceptron(12, 10, 3)

        def forward(self, x):
            return self.network(x)

        def training_step(self, batch, _):
            return F.cross_entropy(self.network(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), 0.01)

    arguments, options = settings("x")
    module = Module()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    callback = SparsifyCallback(*arguments, **options, example_inputs=X[:2])
    trainer = pl.Trainer(max_epochs=3, accelerator="cpu", callbacks=[callback], default_root_dir=tmp_path, **quiet)
    trainer.fit(module, torch.utils.data.DataLoader(DATA, 8))
    return module.network, check(module, "network.0")


class Named(nn.Module):
    """A network as Hugging Face's Trainer takes it: keywords in, loss and outputs out."""

    def __init__(self):
        super().__init__()
        self.network = perceptron(12, 10, 3)

    def forward(self, x, labels=None):
        outputs = self.network(x)
        return outputs if labels is None else {"loss": F.cross_entropy(outputs, labels), "logits": outputs}


def in_huggingface(tmp_path):
    transformers = pytest.importorskip("transformers")
    from fasterai.callbacks.huggingface import SparsifyCallback

    arguments, options = settings("x")
    model = Named()
    quiet = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_strategy": "no", "use_cpu": True}
    args = transformers.TrainingArguments(tmp_path, num_train_epochs=3, per_device_train_batch_size=8, **quiet)
    callback = SparsifyCallback(*arguments, **options, example_inputs=X[:2])
    data = [{"x": x, "labels": y} for x, y in DATA]
    transformers.Trainer(model, args, train_dataset=data, callbacks=[callback]).train()
    return model, check(model, "network.0")


@pytest.mark.parametrize("train", [in_fastai, in_lightning, in_huggingface])
def test_features_are_masked_in_every_loop_and_taken_out_after_it(train, tmp_path):
    model, kept = train(tmp_path)
    model.eval()
    result = induce(model, X, 0.75, measure=False)
    assert list(result.selector.keep) == kept
    assert torch.allclose(result.model(result.selector(X)), model(X), atol=1e-6)


def test_a_stopped_run_goes_on_bit_for_bit():
    def run(since=0, state=None, saved_at=()):
        model = perceptron(12, 10, 3)
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        arguments, options = settings("input")
        share, granularity, context, criterion, schedule = arguments
        options |= {"sparsity": share, "schedule": schedule, "example_inputs": X[:2]}
        sparsifier = Sparsifier(model, granularity, context, criterion, **options)
        states = {}
        with attach(optimizer, sparsifier, total_steps=6) as handle:
            parts = {"model": model, "optimizer": optimizer, "handle": handle}
            for name, part in parts.items() if state else ():
                part.load_state_dict(state[name])
            for i in range(since, 6):
                if i in saved_at:
                    states[i] = copy.deepcopy({name: part.state_dict() for name, part in parts.items()})
                optimizer.zero_grad()
                F.cross_entropy(model(X), Y).backward()
                optimizer.step()
        return model, states

    wanted, states = run(saved_at=(1, 3, 5))
    for since, state in states.items():
        found, _ = run(since, state)
        assert all(torch.equal(a, b) for a, b in zip(found.state_dict().values(), wanted.state_dict().values(), strict=True))
        assert induce(found, X, 0.75, measure=False).selector == induce(wanted, X, 0.75, measure=False).selector
