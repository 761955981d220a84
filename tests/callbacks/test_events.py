"""The table of events in docs/callbacks.md holds in every framework: one participant with all events, a loop of each."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import SGD
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import Trainer, TrainingArguments

import fasterai.callbacks.fastai as for_fastai
import fasterai.callbacks.huggingface as for_huggingface
import fasterai.callbacks.lightning as for_lightning
from fasterai.callbacks.plain import attach
from fasterai.core.loop import EVENTS, Participant

pytestmark = pytest.mark.filterwarnings("ignore")
STEPS, CLIP, ACCUMULATE = 4, 0.01, 2


class Net(nn.Module):
    """A network that works its loss out itself where it gets labels, as those of Hugging Face do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.head(torch.tanh(self.body(x)))
        return logits if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


def dataset(count: int = 8 * STEPS * ACCUMULATE) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(count, 6, generator=generator), torch.randint(3, (count,), generator=generator))


@dataclass
class All(Participant):
    """Notes every event, adds to the loss, and trains a parameter of its own with it."""

    model: Net
    shift: nn.Parameter = field(default_factory=lambda: nn.Parameter(torch.zeros(3)))
    seen: list[str] = field(default_factory=list)
    norms: list[tuple[float, float]] = field(default_factory=list)
    positions: list[float] = field(default_factory=list)
    unclipped: float = 0.0
    heard_move: bool = False

    def norm(self) -> float:
        return float(torch.cat([p.grad.flatten() for p in self.model.parameters()]).norm())

    def on_setup(self, model: nn.Module) -> list[nn.Parameter]:
        self.seen.append("on_setup")
        return [self.shift]

    def on_fit_start(self, fit: Any) -> None:
        assert fit.model is not None and fit.total_steps >= STEPS and fit.optimizers
        self.seen.append("on_fit_start")

    def after_forward(self, batch: Any) -> None:
        logits = batch.outputs["logits"] if isinstance(batch.outputs, dict) else batch.outputs
        given = [*batch.inputs, *batch.keywords.values()]
        assert logits.shape == (8, 3) and any(isinstance(x, Tensor) and x.shape == (8, 6) for x in given)
        self.logits = logits
        self.seen.append("after_forward")

    def after_loss(self, loss: Tensor, batch: Any) -> Tensor:
        assert loss.dim() == 0 and loss.requires_grad
        torch.testing.assert_close(loss, F.cross_entropy(self.logits, batch.labels))  # whole: not divided for accumulation
        self.seen.append("after_loss")
        return loss + 10 * (self.logits.detach() - self.shift).square().mean()

    def after_backward(self) -> None:
        self.unclipped = self.norm()
        self.seen.append("after_backward")

    def before_step(self, position: float) -> None:
        self.norms.append((self.unclipped, self.norm()))
        self.seen.append("before_step")

    def after_step(self, position: float) -> None:
        self.positions.append(position)
        self.seen.append("after_step")

    def metrics(self) -> dict[str, float]:
        return {"shifted": float(self.shift.detach().abs().sum())}

    def on_fit_end(self, completed: bool) -> None:
        self.seen.append(f"on_fit_end {completed}")

    def state_dict(self) -> dict[str, Any]:
        return {"shift": self.shift.detach().clone()}

    def load_state_dict(self, state: Any) -> None:
        with torch.no_grad():
            self.shift.copy_(state["shift"])


@dataclass
class Ran:
    """What is left of a run: the optimizer that was used, and what the loop showed of the figures."""

    optimizer: Any
    shown: dict[str, float]


def plain(model: Net, ours: All, path: Path) -> Ran:
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    with attach(optimizer, ours, total_steps=STEPS, model=model) as handle:
        for i, (x, y) in enumerate(DataLoader(dataset(), batch_size=8)):
            outputs = model(x)
            loss = handle.loss(F.cross_entropy(outputs, y), x, y, outputs)
            (loss / ACCUMULATE).backward()
            if i % ACCUMULATE == ACCUMULATE - 1:
                handle.after_backward()
                nn.utils.clip_grad_norm_(model.parameters(), CLIP)
                optimizer.step()
                optimizer.zero_grad()
        shown = handle.metrics()
    return Ran(optimizer, shown)


def accelerate(model: Net, ours: All, path: Path) -> Ran:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATE)
    bare = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    model, optimizer, loader = accelerator.prepare(model, bare, DataLoader(dataset(), batch_size=8))
    handle = attach(optimizer, ours, total_steps=STEPS, model=model)
    for x, y in loader:
        with accelerator.accumulate(model):
            outputs = model(x)
            accelerator.backward(handle.loss(F.cross_entropy(outputs, y), x, y, outputs))
            if accelerator.sync_gradients:
                handle.after_backward()
                accelerator.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
    shown = handle.metrics()
    handle.remove()
    return Ran(bare, shown)


def fastai(model: Net, ours: All, path: Path) -> Ran:
    loaders = DataLoaders(DataLoader(dataset(), batch_size=8), DataLoader(dataset(16), batch_size=8))
    learn = Learner(loaders, model, loss_func=CrossEntropyLossFlat(), opt_func=SGD, lr=0.1, path=path)
    callbacks = [for_fastai.ParticipantCallback(ours), GradientAccumulation(8 * ACCUMULATE), GradientClip(CLIP)]
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, cbs=callbacks)
    return Ran(learn.opt, dict(zip(learn.recorder.metric_names[1:-1], learn.recorder.log[1:], strict=False)))


class Module(pl.LightningModule):
    def __init__(self, net: Net) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)
        rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=STEPS + 1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": rate, "interval": "step"}}


def lightning(model: Net, ours: All, path: Path) -> Ran:
    trainer = pl.Trainer(
        max_epochs=1,
        callbacks=[for_lightning.ParticipantCallback(ours)],
        accumulate_grad_batches=ACCUMULATE,
        gradient_clip_val=CLIP,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=path,
    )
    module = Module(model)
    trainer.fit(module, DataLoader(dataset(), batch_size=8))
    assert "training_step" not in vars(module) and "configure_gradient_clipping" not in vars(module)
    return Ran(trainer.optimizers[0], {n: float(v) for n, v in trainer.callback_metrics.items()})


def huggingface(model: Net, ours: All, path: Path) -> Ran:
    arguments = TrainingArguments(
        str(path),
        per_device_train_batch_size=8,
        gradient_accumulation_steps=ACCUMULATE,
        max_grad_norm=CLIP,
        num_train_epochs=1,
        use_cpu=True,
        optim="sgd",
        learning_rate=0.1,
        report_to=[],
        logging_steps=STEPS,
        save_strategy="no",
        disable_tqdm=True,
    )
    items = [{"x": x, "labels": y} for x, y in dataset()]
    trainer = Trainer(model, arguments, train_dataset=items, callbacks=[for_huggingface.ParticipantCallback(ours)])
    trainer.train()
    assert arguments.max_grad_norm == CLIP and not model._forward_hooks and not model._forward_pre_hooks
    return Ran(trainer.optimizer.optimizer, trainer.state.log_history[0])


FRAMEWORKS = [plain, accelerate, fastai, lightning, huggingface]


@pytest.mark.parametrize("run", FRAMEWORKS)
def test_every_event_comes_at_its_place(run, tmp_path):
    model = Net()
    ours = All(model)
    ran = run(model, ours, tmp_path)
    batch = ["after_forward", "after_loss"]
    step = [*batch * ACCUMULATE, "after_backward", "before_step", "after_step"]
    assert ours.seen == ["on_setup", "on_fit_start", *step * STEPS, "on_fit_end True"]
    assert ours.positions[-1] == 1.0
    for unclipped, clipped in ours.norms:
        assert unclipped > 2 * CLIP and clipped <= CLIP * 1.001
    assert ran.shown["shifted"] > 0


@pytest.mark.parametrize("run", FRAMEWORKS)
def test_parameters_of_a_participant_train_with_the_optimizer_and_leave_it(run, tmp_path):
    model = Net()
    ours = All(model)
    ran = run(model, ours, tmp_path)
    assert ours.shift.detach().abs().min() > 0
    held = [p for group in ran.optimizer.param_groups for p in group["params"]]
    assert len(held) == 4 and not any(p is ours.shift for p in held)
    assert ours.shift not in ran.optimizer.state
    assert sorted(model.state_dict()) == ["body.bias", "body.weight", "head.bias", "head.weight"]


@pytest.mark.parametrize("run", FRAMEWORKS)
def test_the_loss_that_is_given_back_is_trained_on_and_accumulated_as_the_own_one(run, tmp_path):
    """The own parameter is that of a plain gradient descent by hand, with the mean of both batches of a step."""
    model = Net()
    logits: list[Tensor] = []

    class Noting(All):
        def after_forward(self, batch: Any) -> None:
            super().after_forward(batch)
            logits.append(self.logits.detach().clone())

        def after_step(self, position: float) -> None:
            super().after_step(position)
            self.shifts = [*getattr(self, "shifts", []), self.shift.detach().clone()]

    noting = Noting(model)
    run(model, noting, tmp_path)
    first = torch.stack([10 * 2 * (0 - x).mean(0) / 3 for x in logits[:ACCUMULATE]]).mean(0)  # d/ds 10 mean((x - s)^2) at s = 0
    moved = noting.shifts[0]
    rate = float((-moved / first).mean())
    torch.testing.assert_close(moved, -rate * first, rtol=1e-4, atol=1e-7)
    assert rate > 0


def test_the_table_of_the_docs_names_every_event():
    page = (Path(__file__).parents[2] / "docs" / "callbacks.md").read_text(encoding="utf-8")
    table = page[page.index("| event |") :]
    assert [name for name in EVENTS if f"`{name}(" not in table] == []
