"""Every callback that is made of a participant: its text and figures, a fit of fastai, and Lightning's resumed bit for bit."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fasterai.callbacks.fastai as for_fastai
import fasterai.callbacks.huggingface as for_huggingface
import fasterai.callbacks.lightning as for_lightning
from fasterai.callbacks.participants import ParticipantMethod

pytestmark = pytest.mark.filterwarnings("ignore")
STEPS = 4
#: Callback -> arguments that are right, and one that is wrong with what is said of it.
GIVEN: dict[str, tuple[tuple[Any, ...], dict[str, Any], dict[str, Any], str]] = {
    "ACDCCallback": ((0.5,), {}, {"context": "globe"}, "context must be one of"),
    "RegularizeCallback": (("large_final", "row", 0.1, nn.Linear), {"how": "proximal"}, {"how": "step"}, "how must be one of"),
    "RigLCallback": ((0.5,), {"dt": 2}, {"dt": 0}, "dt must be at least 1"),
    "SETCallback": ((0.5,), {"dt": 2}, {"distribution": "even"}, "distribution must be one of"),
    "SRSTECallback": ((2, 4), {"decay": 0.01}, {"decay": -1.0}, "decay must be a number of at least 0"),
    "STECallback": ((2, 4), {}, {"schedule": "linn"}, "schedule must be one of"),
    "STRCallback": ((), {"s_init": -3.0}, {"s_init": 1.0}, "s_init must be below 0"),
    "StaticCallback": ((0.5,), {}, {"seed": -1}, "seed must be at least 0"),
    "TernarizeCallback": ((4,), {}, {"rule": "best"}, "rule must be one of"),
}
FILES = [for_fastai, for_lightning, for_huggingface]


def callback(module: Any, name: str) -> Any:
    given, named, _, _ = GIVEN[name]
    return getattr(module, name)(*given, **named)


@pytest.mark.parametrize("module", FILES)
def test_every_one_has_its_line_here(module):
    kinds = [name for name in module.__all__ if issubclass(getattr(module, name), ParticipantMethod)]
    assert sorted(kinds) == sorted(GIVEN)


@pytest.mark.parametrize("name", GIVEN)
def test_its_text_names_every_argument_but_the_model_s_place(name):
    text = inspect.getdoc(getattr(for_fastai, name)) or ""
    for module in FILES:
        kind = getattr(module, name)
        parameters = inspect.signature(kind).parameters
        assert next(iter(parameters)) != "model" and "model" in parameters
        assert [argument for argument in parameters if f"\n    {argument}: " not in text] == []
        assert inspect.getdoc(kind) == text and "  _" not in text


@pytest.mark.parametrize("name", GIVEN)
def test_a_wrong_argument_is_refused_at_once(name):
    given, named, wrong, message = GIVEN[name]
    for module in FILES:
        with pytest.raises(ValueError, match=message):
            getattr(module, name)(*given, **{**named, **wrong})


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.body, self.head = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.body(F.relu(self.first(x)))))


def loader() -> DataLoader:
    generator = torch.Generator().manual_seed(1)
    return DataLoader(TensorDataset(torch.randn(8 * STEPS, 8, generator=generator), torch.arange(8 * STEPS) % 4), batch_size=8)


@pytest.mark.parametrize("name", GIVEN)
def test_it_trains_in_fastai_with_the_columns_that_it_promised(name, tmp_path):
    learn = Learner(DataLoaders(loader(), loader()), Net(), loss_func=CrossEntropyLossFlat(), lr=0.01, path=tmp_path)
    one = callback(for_fastai, name)
    promised = list(one.metrics())
    with learn.no_bar(), learn.no_logging():
        learn.fit(2, cbs=one)
    columns = learn.recorder.metric_names
    assert len(columns) == len(learn.recorder.log)
    assert columns[3 : 3 + len(promised)] == promised == list(one.participant.metrics())
    assert max(learn.recorder.log[3 : 3 + len(promised)]) > 0
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in learn.model.modules())


class Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), 0.01)


@pytest.mark.parametrize("name", GIVEN)
def test_it_goes_on_in_lightning_bit_for_bit(name, tmp_path):
    def trained(folder: Path, resume: Path | None = None) -> tuple[Module, Any]:
        one, module = callback(for_lightning, name), Module()
        saves = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = pl.Trainer(max_epochs=2, callbacks=[one, saves], accelerator="cpu", default_root_dir=folder, **quiet)
        trainer.fit(module, loader(), ckpt_path=resume)
        return module, one

    whole, ours = trained(tmp_path / "whole")
    resumed, again = trained(tmp_path / "again", tmp_path / "whole" / "epoch=0.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    first, second = ours.loop.state_dict(), again.loop.state_dict()
    assert first["step"] == second["step"] == 2 * STEPS
    assert repr(first["participants"]) == repr(second["participants"])
