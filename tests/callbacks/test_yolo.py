"""Ultralytics' trainer, by a stand-in that calls as it does: its steps, its moving average, its files, and errors."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from fasterai.callbacks.yolo import HoldCallback, ParticipantCallback, PruneCallback, SparsifyCallback, steps_of
from fasterai.core.loop import Participant

SIDE = 8


class Average:
    """The moving average as ultralytics keeps it: pairs of tensors, made once."""

    def __init__(self, model: nn.Module) -> None:
        self.ema = copy.deepcopy(model).eval().requires_grad_(False)
        self._pairs: Any = None

    def update(self, model: nn.Module) -> None:
        if self._pairs is None:
            own, its = self.ema.state_dict(), model.state_dict()
            self._pairs = [(own[n], its[n]) for n in own if own[n].is_floating_point()]
        for average, value in self._pairs:
            average.mul_(0.5).add_(value.detach(), alpha=0.5)


class Trainer:
    """Ultralytics' loop without its data: accumulation in the warm-up, the average, validation and the best weights."""

    def __init__(self, epochs: int = 3, batches: int = 4, accumulate: int = 1, warmup: float = 0.0) -> None:
        torch.manual_seed(0)
        layers = (nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.model = nn.Sequential(*layers)
        self.optimizer: Any = torch.optim.SGD(self.model.parameters(), 0.05, momentum=0.9)
        self.ema, self.save_dir, self.start_epoch = Average(self.model), ".", 0
        self.args = SimpleNamespace(imgsz=SIDE, time=None, warmup_epochs=warmup)
        self.epochs, self.train_loader, self.accumulate = epochs, range(batches), accumulate
        self.best_fitness: float | None = None
        self.best: list[nn.Module] = []
        self.steps = 0
        self._calls: dict[str, list[Any]] = {}

    def add_callback(self, event: str, call: Any) -> None:
        self._calls.setdefault(event, []).append(call)

    def run(self, event: str) -> None:
        for call in self._calls.get(event, ()):
            call(self)

    def train(self) -> None:
        self.run("on_train_start")
        batches, last, most = len(self.train_loader), -1, self.accumulate
        warm = round(min(self.args.warmup_epochs, max(self.epochs - 1, 0)) * batches)
        for epoch in range(self.epochs):
            self.run("on_train_epoch_start")
            self.model.train()
            for i in self.train_loader:
                n = i + batches * epoch
                accumulate = max(1, round(1 + (most - 1) * n / warm)) if warm and n <= warm else most
                self.model(torch.randn(4, 3, SIDE, SIDE)).square().sum().backward()
                if n - last >= accumulate:
                    self.optimizer.step()
                    self.optimizer.zero_grad()
                    self.ema.update(self.model)
                    last, self.steps = n, self.steps + 1
                self.run("on_train_batch_end")
            self.run("on_train_epoch_end")
            fitness = 1 / (1 + epoch)  # the dense beginning is the best of all
            if self.best_fitness is None or self.best_fitness < fitness:
                self.best_fitness = fitness
                self.best.append(copy.deepcopy(self.ema.ema))
        self.run("on_train_end")
        self.run("teardown")


def zeros(model: nn.Module) -> int:
    return sum(int((p == 0).sum()) for p in model.parameters() if p.dim() > 1)


def test_the_average_is_masked_and_the_end_is_the_best() -> None:
    trainer = Trainer()
    callback = SparsifyCallback(0.5, "weight", "local", "large_final", "one_cycle")
    assert callback.add_to(trainer) is trainer
    trainer.train()
    assert callback.current_sparsity == pytest.approx(0.5, abs=0.01)
    assert zeros(trainer.model) == zeros(trainer.ema.ema) == zeros(trainer.best[-1]) == (216 + 432) // 2
    assert (callback.loop.step, trainer.steps) == (12, 12)
    assert not trainer.optimizer._optimizer_step_post_hooks


def test_channels_go_from_model_optimizer_and_average_which_goes_on_averaging() -> None:
    trainer = Trainer()
    callback = PruneCallback(0.5, "lin", "local", "large_final", max_updates=2, round_to=1)
    callback.add_to(trainer)
    trainer.train()
    assert trainer.model[0].weight.shape == trainer.ema.ema[0].weight.shape == trainer.best[-1][0].weight.shape == (4, 3, 3, 3)
    assert trainer.optimizer.state[trainer.model[0].weight]["momentum_buffer"].shape == (4, 3, 3, 3)
    before = trainer.ema.ema[0].weight.clone()
    with torch.no_grad():
        trainer.model[0].weight.add_(1)
    trainer.ema.update(trainer.model)
    assert torch.allclose(trainer.ema.ema[0].weight, (before + trainer.model[0].weight) / 2)


@pytest.mark.parametrize(("accumulate", "warmup"), [(1, 0.0), (3, 0.0), (4, 2.0), (16, 1.5)])
def test_steps_are_counted_as_the_trainer_takes_them(accumulate: int, warmup: float) -> None:
    trainer = Trainer(epochs=5, batches=5, accumulate=accumulate, warmup=warmup)
    counted = steps_of(trainer)
    trainer.train()
    assert counted == trainer.steps


def test_masks_are_held_in_a_second_training() -> None:
    first = Trainer()
    callback = SparsifyCallback(0.5, "weight", "local", "large_final", "one_shot")
    callback.add_to(first)
    first.train()
    second = Trainer()
    second.model, second.ema = first.model, Average(first.model)
    second.optimizer = torch.optim.SGD(second.model.parameters(), 0.05)
    HoldCallback(callback.sparsifier).add_to(second)
    second.train()
    assert zeros(second.model) == zeros(first.best[-1]) == 324


class Reads(Participant):
    def after_forward(self, batch: Any) -> None: ...


def test_what_the_trainer_does_not_give_is_refused() -> None:
    with pytest.raises(TypeError, match="yolo must be a YOLO or a trainer of ultralytics, got 3"):
        ParticipantCallback(Reads()).add_to(3)
    trainer = Trainer()
    ParticipantCallback(Reads()).add_to(trainer)
    with pytest.raises(ValueError, match=r"participants must do without batches and the loss, .* got Reads"):
        trainer.train()
    timed = Trainer()
    timed.args.time = 0.5
    SparsifyCallback(0.5, "weight", "local", "large_final", "one_cycle").add_to(timed)
    with pytest.raises(ValueError, match=r"time must be left out, .* got 0.5; give epochs"):
        timed.train()


def test_a_resumed_training_begins_afresh_and_says_so() -> None:
    trainer = Trainer()
    trainer.start_epoch = 1
    SparsifyCallback(0.5, "weight", "local", "large_final", "one_cycle").add_to(trainer)
    with pytest.warns(UserWarning, match="resumes at epoch 1, and the participants begin afresh"):
        trainer.run("on_train_start")
    trainer.run("teardown")
