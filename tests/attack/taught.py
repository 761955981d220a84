"""Distillation in fastai and in Lightning: a fit by chance, to its end or up to an error."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.attack import oracles

Fitted = Callable[[nn.Module, Any, Callable[[], object]], torch.optim.Optimizer | None]


def samples(pair: Any, batches: int) -> list[tuple[Tensor, Tensor]]:
    """The samples of some batches."""
    return [(x, y) for i in range(batches) for x, y in zip(pair.batch(i)[0][0], pair.batch(i)[1], strict=True)]


def in_fastai(pair: Any, batches: int, folder: Path) -> tuple[Any, Fitted]:
    """The callback of fastai, and who fits a student with it."""
    from fastai.basics import Callback, DataLoader, DataLoaders, Learner, OptimWrapper

    from fasterai.callbacks.fastai import KnowledgeDistillationCallback

    def fit(student: nn.Module, callback: Any, hurts: Callable[[], object]) -> torch.optim.Optimizer:
        class Hurts(Callback):  # type: ignore[misc]
            def before_step(self) -> None:
                hurts()

        data = samples(pair, batches)
        loaders = DataLoaders(DataLoader(data, bs=6, shuffle=False), DataLoader(data, bs=6), device="cpu")
        made = lambda parameters, lr, **_: OptimWrapper(parameters, torch.optim.SGD, lr=0.05)  # noqa: E731 - handed over
        learn = Learner(loaders, student, loss_func=pair.task, opt_func=made, path=folder)
        try:
            with learn.no_bar(), learn.no_logging():
                learn.fit(2, cbs=[*([] if callback is None else [callback]), Hurts()])
        finally:
            optimizer: torch.optim.Optimizer = learn.opt.opt
        return optimizer

    return KnowledgeDistillationCallback, fit


def in_lightning(pair: Any, batches: int, folder: Path) -> tuple[Any, Fitted]:
    """The callback of Lightning, and who fits a student with it."""
    import lightning.pytorch as pl

    from fasterai.callbacks.lightning import KnowledgeDistillationCallback

    def fit(student: nn.Module, callback: Any, hurts: Callable[[], object]) -> torch.optim.Optimizer:
        class Module(pl.LightningModule):
            def __init__(self) -> None:
                super().__init__()
                self.net = student

            def forward(self, *inputs: Any) -> Any:
                return self.net(*inputs)

            def training_step(self, batch: Any, batch_idx: int) -> Tensor:
                return pair.task(self.net(batch[0]), batch[1])  # type: ignore[no-any-return]

            def validation_step(self, batch: Any, batch_idx: int) -> None:
                self.log("valid", pair.task(self.net(batch[0]), batch[1]))

            def configure_optimizers(self) -> torch.optim.Optimizer:
                return torch.optim.SGD(self.net.parameters(), 0.05)

            def on_before_optimizer_step(self, optimizer: Any) -> None:
                hurts()

        off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
        trainer = pl.Trainer(
            max_epochs=2, accelerator="cpu", default_root_dir=folder, callbacks=[] if callback is None else [callback], **off
        )
        load = torch.utils.data.DataLoader
        trainer.fit(Module(), load(samples(pair, batches), 6), load(samples(pair, 1), 6))
        return trainer.optimizers[0]

    return KnowledgeDistillationCallback, fit


class Explosion(BaseException):
    """What ends a fit; no framework takes it for an error of its own."""


def attack(draw: random.Random, plan: Any, made: Callable[[], Any]) -> str | None:
    """Fit a student in a framework; return why it was refused."""
    kind, fit = draw.choice((in_fastai, in_lightning))(plan.pair, plan.steps, plan.folder)
    run = made()
    layers = plan.layers or (None, None)
    callback = kind(run.distiller.teacher, list(plan.losses), *layers, weight=plan.weight, schedule=plan.schedule)
    optimizers: list[Any] = []

    def go(student: nn.Module, callback: Any, hurts: Callable[[], object]) -> None:
        torch.manual_seed(5)
        optimizers.append(fit(student, callback, hurts))

    said = oracles.refusal(lambda: go(run.model, callback, int))
    run.check_teacher()
    if said:
        return said
    run.optimizer = optimizers[0]
    run.check_left()
    assert all(bool(x.isfinite().all()) for x in run.values().values()), "weights are not finite"
    if plan.weight == 0:
        alone = plan.pair.student()
        go(alone, None, int)
        for name, x in alone.state_dict().items():
            assert torch.equal(x, run.values()[name]), f"a share of zero trains {name} otherwise"
    left = [draw.randint(1, plan.steps)]

    def hurts() -> None:
        left[0] -= 1
        if left[0] == 0:
            raise Explosion

    try:
        go(run.model, callback, hurts)
    except Explosion:
        run.check_teacher()
    else:
        raise AssertionError("nothing was raised")
    return None
