"""Wrapped methods of a LightningModule: to Lightning the module's own, and gone afterwards, whatever happens meanwhile."""

from __future__ import annotations

import copy
import io
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import BackboneFinetuning, LearningRateFinder
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fasterai.callbacks.lightning import ParticipantCallback, SparsifyCallback
from fasterai.core.loop import Participant
from tests.messages import heard

pytestmark = pytest.mark.filterwarnings("ignore")
WRAPPED = {"training_step", "configure_gradient_clipping"}


class Net(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
        self.lr = 0.01

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], self.lr)


class Follows(Participant):
    """Writes down the events, and trains a parameter of its own towards the outputs."""

    def __init__(self) -> None:
        self.seen = ""
        self.own = nn.Parameter(torch.zeros(3))

    def on_setup(self, model):
        return [self.own]

    def after_forward(self, batch) -> None:
        assert batch.outputs.shape == (8, 3)
        self.seen += "f"

    def after_loss(self, loss, batch) -> Tensor:
        self.seen += "l"
        return loss + (batch.logits.detach() - self.own).square().mean()

    def after_backward(self) -> None:
        self.seen += "b"

    def before_step(self, position) -> None:
        self.seen += "s"

    def after_step(self, position) -> None:
        self.seen += "a"

    def on_fit_end(self, completed) -> None:
        self.seen += f" {completed}"


def loader() -> DataLoader:
    generator = torch.Generator().manual_seed(1)
    rows = TensorDataset(torch.randn(32, 6, generator=generator), torch.randint(3, (32,), generator=generator))
    return DataLoader(rows, batch_size=8)


def trainer(path, *callbacks, **options) -> pl.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    options = {"max_epochs": 1, "accelerator": "cpu", "default_root_dir": path, **quiet, **options}
    return pl.Trainer(callbacks=list(callbacks), **options)


def left(module) -> set[str]:
    return WRAPPED & vars(module).keys()


class Does(pl.Callback):
    """Calls a function once, in the middle of a run."""

    def __init__(self, what) -> None:
        self.what, self.found = what, None

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if batch_idx == 1:
            self.found = self.what(pl_module)


def test_a_step_may_leave_the_index_out(tmp_path):
    class Short(Net):
        def training_step(self, batch):
            return F.cross_entropy(self.net(batch[0]), batch[1])

    module, follows = Short(), Follows()
    trainer(tmp_path, ParticipantCallback(follows)).fit(module, loader())
    assert follows.seen == "flbsa" * 4 + " True" and not left(module)


def test_several_callbacks_leave_nothing(tmp_path):
    module, follows = Net(), Follows()
    both = [SparsifyCallback(0.5, "weight", "global", "large_final", "lin"), ParticipantCallback(follows)]
    trainer(tmp_path, *both).fit(module, loader())
    assert follows.seen == "flbsa" * 4 + " True" and not left(module)
    trainer(tmp_path).fit(module, loader())


@pytest.mark.parametrize("how", ["copied", "saved"])
def test_a_module_that_is_taken_along_in_the_middle_is_its_own(tmp_path, how):
    def taken(module):
        if how == "copied":
            return copy.deepcopy(module)
        torch.save(module.cpu(), file := io.BytesIO())
        return torch.load(io.BytesIO(file.getvalue()), weights_only=False)

    does, module = Does(taken), Net()
    trainer(
        tmp_path, ParticipantCallback(Follows()), does, SparsifyCallback(0.5, "weight", "global", "large_final", "lin")
    ).fit(module, loader())
    other, before = does.found, copy.deepcopy(module.state_dict())
    start = copy.deepcopy(other.state_dict())
    trainer(tmp_path).fit(other, loader())
    assert all(torch.equal(a, b) for a, b in zip(before.values(), module.state_dict().values(), strict=True))
    assert not torch.equal(start["net.0.weight"], other.state_dict()["net.0.weight"])
    assert not left(module)


def test_a_search_for_a_rate_in_the_middle_is_no_part_of_the_run(tmp_path):
    class Middle(LearningRateFinder):
        def on_fit_start(self, *_):
            pass

        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                self.lr_find(trainer, pl_module)

    follows, module = Follows(), Net()
    callback = ParticipantCallback(follows)
    run = trainer(tmp_path, callback, Middle(num_training_steps=3, update_attr=False), max_epochs=3)
    run.fit(module, loader())
    assert follows.seen == "flbsa" * 12 + " True" and not left(module)
    assert callback.state_dict()["step"] == 12  # and not what the search has loaded


def test_a_batch_that_is_left_out_has_no_outputs_and_no_loss(tmp_path):
    class Half(Net):
        def training_step(self, batch, batch_idx):
            return None if batch_idx % 2 else {"loss": super().training_step(batch, batch_idx), "more": 1}

    follows = Follows()
    trainer(tmp_path, ParticipantCallback(follows)).fit(Half(), loader())
    assert follows.seen == "flbsabsa" * 2 + " True"


def test_layers_that_begin_to_train_later_are_saved_as_ever(tmp_path):
    class Two(Net):
        def __init__(self):
            super().__init__()
            self.backbone = nn.Linear(6, 6)

        def forward(self, x):
            return self.net(self.backbone(x))

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch[0]), batch[1])

    sizes = []

    class Looks(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            saved = trainer.optimizers[0].state_dict()
            sizes.append(([len(group["params"]) for group in saved["param_groups"]], len(saved["state"])))

    follows = Follows()
    trainer(tmp_path, ParticipantCallback(follows), BackboneFinetuning(1), Looks(), max_epochs=2).fit(Two(), loader())
    assert sizes == [([4], 4), ([4, 2], 6)]


@pytest.mark.parametrize("whole", [False, True])
def test_what_is_compiled_is_compiled_once(tmp_path, whole):
    torch._dynamo.reset()
    count = 0

    def backend(graph, _):
        nonlocal count
        count += 1
        return graph.forward

    module, follows = Net(), Follows()
    if whole:
        given = torch.compile(module, backend=backend)
    else:
        given = module
        module.net = torch.compile(module.net, backend=backend)
    with heard("compile the network in the module") as said:
        trainer(tmp_path, ParticipantCallback(follows)).fit(given, loader())
    assert follows.seen == "flbsa" * 4 + " True"
    assert count == (0 if whole else 1)
    assert bool(said) is whole


class Watches(Participant):
    def __init__(self) -> None:
        self.seen, self.shapes = "", []

    def after_forward(self, batch) -> None:
        self.seen += "f"
        self.shapes.append(tuple(batch.outputs.shape))

    def after_backward(self) -> None:
        self.seen += "g"

    def before_step(self, position) -> None:
        self.seen += "s"

    def after_step(self, position) -> None:
        self.seen += "a"


def test_outputs_are_shown_before_a_backward_pass_of_the_module_s_own(tmp_path):
    watches = Watches()

    class Manual(Net):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            watches.seen += "b"
            self.manual_backward(loss)
            self.optimizers().step()
            self.optimizers().zero_grad()

    trainer(tmp_path, ParticipantCallback(watches)).fit(Manual(), loader())
    assert watches.seen == "fbgsa" * 4


def test_of_inputs_that_are_mixed_the_first_outputs_are_shown_once(tmp_path):
    class Mixed(Net):
        def __init__(self):
            super().__init__()
            self.measure = nn.Linear(3, 1)

        def training_step(self, batch, batch_idx):
            outputs = self.net(batch[0] * 0.5)
            return F.cross_entropy(outputs, batch[1]) + self.measure(outputs).mean()

    watches = Watches()
    trainer(tmp_path, ParticipantCallback(watches)).fit(Mixed(), loader())
    assert watches.seen == "fgsa" * 4 and watches.shapes == [(8, 3)] * 4
