"""Callbacks made of a participant's class: signature, text, checks and figures, and a run in each framework."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from fastai.callback.tracker import SaveModelCallback
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import Trainer, TrainingArguments

import fasterai.callbacks.fastai as for_fastai
import fasterai.callbacks.huggingface as for_huggingface
import fasterai.callbacks.lightning as for_lightning
from fasterai.callbacks.participants import ParticipantMethod
from fasterai.core.checks import check_fraction
from fasterai.core.loop import Participant

pytestmark = pytest.mark.filterwarnings("ignore")
STEPS = 3


class Shrink(Participant):
    """Shrinks the weights after each step.

    Args:
        model: The model.
        amount: The share that each weight loses at a step, in [0, 1].
        bias: Whether biases shrink
            as well.

    Raises:
        ValueError: `amount` is out of range.
    """

    def __init__(self, model: nn.Module, amount: float, *, bias: bool = False, **options: Any) -> None:
        self.check_settings(amount, bias=bias, **options)
        self.model, self.amount, self.bias, self.options = model, amount, bias, options
        self.steps = 0

    @staticmethod
    def check_settings(amount: float, *, bias: bool = False, **options: Any) -> None:
        check_fraction("amount", amount)
        if options.keys() - {"offset"}:
            raise TypeError(f"options must be offset, got {options}")

    def after_step(self, position: float) -> None:
        self.steps += 1
        with torch.no_grad():
            for p in self.model.parameters():
                if self.bias or p.dim() > 1:
                    p.mul_(1 - self.amount)

    def metrics(self) -> dict[str, float]:
        return {"shrunk": float(self.steps)}

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.steps = state["steps"]


class ShrinkMethod(ParticipantMethod):
    """Lets the weights shrink while the model trains."""

    makes, figures = Shrink, ("shrunk",)


class InFastai(ShrinkMethod, for_fastai.ParticipantCallback):
    pass


class InLightning(ShrinkMethod, for_lightning.ParticipantCallback):
    pass


class InHuggingFace(ShrinkMethod, for_huggingface.ParticipantCallback):
    pass


class OfPart(ShrinkMethod, for_fastai.ParticipantCallback):
    pass


ALL = [InFastai, InLightning, InHuggingFace]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.head(torch.tanh(self.body(x)))
        return logits if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


def dataset() -> TensorDataset:
    return TensorDataset(torch.randn(4 * STEPS, 6), torch.arange(4 * STEPS) % 3)


class Module(pl.LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def fastai(model: nn.Module, callbacks: list[Any], folder: Path) -> dict[str, float]:
    loader = DataLoader(dataset(), batch_size=4)
    learn = Learner(DataLoaders(loader, loader), model, loss_func=CrossEntropyLossFlat(), lr=0.1, path=folder)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, cbs=callbacks)
    return dict(zip(learn.recorder.metric_names[1:-1], learn.recorder.log[1:], strict=False))


def lightning(model: nn.Module, callbacks: list[Any], folder: Path) -> dict[str, float]:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = pl.Trainer(max_epochs=1, callbacks=callbacks, accelerator="cpu", default_root_dir=folder, **quiet)
    trainer.fit(Module(model), DataLoader(dataset(), batch_size=4))
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def huggingface(model: nn.Module, callbacks: list[Any], folder: Path) -> dict[str, float]:
    options = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "logging_steps": STEPS, "save_strategy": "no"}
    arguments = TrainingArguments(str(folder), per_device_train_batch_size=4, num_train_epochs=1, **options)
    items = [{"x": x, "labels": y} for x, y in dataset()]
    trainer = Trainer(model, arguments, train_dataset=items, callbacks=callbacks)
    trainer.train()
    return trainer.state.log_history[0]


RUNS = {InFastai: fastai, InLightning: lightning, InHuggingFace: huggingface}


@pytest.mark.parametrize("kind", ALL)
def test_it_trains_with_a_participant_of_its_own_and_shows_its_figures(kind, tmp_path):
    callback, model = kind(1.0, bias=True), Net()
    assert callback.metrics() == {"shrunk": 0.0} and callback.participant is None
    shown = RUNS[kind](model, [callback], tmp_path)
    assert not any(p.any() for p in model.parameters())
    assert shown["shrunk"] == callback.metrics()["shrunk"] == STEPS


@pytest.mark.parametrize("kind", ALL)
def test_signature_and_text_are_the_participant_s_without_the_model(kind):
    signature = "(amount: 'float', *, bias: 'bool' = False, model: 'nn.Module | None' = None, **options: 'Any')"
    assert str(inspect.signature(kind)) == signature
    assert inspect.getdoc(kind) == (
        "Lets the weights shrink while the model trains.\n\n"
        "Args:\n"
        "    amount: The share that each weight loses at a step, in [0, 1].\n"
        "    bias: Whether biases shrink\n"
        "        as well.\n"
        "    model: The part of the model that it is made for; all of it if left out.\n\n"
        "Attributes:\n"
        "    participant: The participant of the last run, None before.\n\n"
        "Raises:\n"
        "    ValueError: `amount` is out of range."
    )
    assert repr(kind(0.5, offset=1)) == f"<{kind.__name__}: amount 0.5, offset 1>"


def test_words_of_its_own_are_left_and_the_participant_s_stand_where_there_are_none():
    class Silent(ParticipantMethod):
        makes = Shrink

    class Own(ParticipantMethod):
        """Does it.

        Args:
            amount: Much.
        """

        makes = Shrink

    assert (inspect.getdoc(Silent) or "").startswith("Shrinks the weights after each step.\n\nArgs:\n    amount:")
    assert inspect.getdoc(Own) == "Does it.\n\nArgs:\n    amount: Much."


def test_arguments_that_a_base_class_describes_are_found():
    class Slow(Shrink):
        """Shrinks slowly."""

    class SlowMethod(ParticipantMethod):
        makes = Slow

    assert (inspect.getdoc(SlowMethod) or "").startswith("Shrinks slowly.\n\nArgs:\n    amount:")


def test_a_subclass_with_arguments_of_its_own_has_its_own_signature():
    class Half(InFastai):
        def __init__(self, bias: bool) -> None:
            super().__init__(0.5, bias=bias)

    assert str(inspect.signature(Half)) == "(bias: 'bool') -> 'None'"
    assert Half(True).arguments == {"amount": 0.5, "bias": True}


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize(
    ("given", "named", "error", "message"),
    [
        ((1.5,), {}, ValueError, r"amount must be in \[0, 1\], got 1\.5"),
        ((), {}, TypeError, r"{kind}\(\) missing a required argument: 'amount'; it is {kind}\(amount: 'float', \*, bias"),
        ((0.5, True), {}, TypeError, r"{kind}\(\) too many positional arguments; it is {kind}\("),
        ((0.5,), {"amount": 1}, TypeError, r"{kind}\(\) multiple values for argument 'amount'; it is"),
        ((0.5,), {"other": 1}, TypeError, "options must be offset, got {{'other': 1}}"),
        ((Net(), 0.5), {}, TypeError, r"model must be left out .*, got Net in the place of amount; it is {kind}\(amount"),
        ((0.5,), {"model": "body"}, TypeError, "model must be a module inside the model that is trained, .* got 'body'"),
    ],
)
def test_arguments_are_checked_at_once(kind, given, named, error, message):
    with pytest.raises(error, match=message.format(kind=kind.__name__)):
        kind(*given, **named)


class Bare(Participant):
    def __init__(self, model: nn.Module, decay: float = 0.1) -> None:
        self.model = model


class BareCallback(ParticipantMethod, for_fastai.ParticipantCallback):
    makes, figures = Bare, ()


def test_a_misspelt_argument_gets_a_hint():
    message = r"got an unexpected keyword argument 'decya'; did you mean 'decay'\?; it is BareCallback\("
    with pytest.raises(TypeError, match=message):
        BareCallback(decya=1)
    assert repr(BareCallback()) == "<BareCallback: by default>"


def test_a_second_fit_goes_on_and_another_model_gets_a_participant_of_its_own(tmp_path):
    callback, model = InFastai(0.1), Net()
    fastai(model, [callback], tmp_path)
    first = callback.participant
    fastai(model, [callback], tmp_path)
    assert callback.participant is first and first.steps == 2 * STEPS
    wrapper = nn.DataParallel(model)
    assert callback._make(wrapper) == [first] and first.model is wrapper
    fastai(Net(), [callback], tmp_path)
    assert callback.participant is not first and callback.participant.steps == STEPS


def test_a_part_of_the_model_is_what_it_is_made_for(tmp_path):
    model = Net()
    fastai(model, [InFastai(1.0, model=model.head)], tmp_path)
    assert not model.head.weight.any() and model.body.weight.all()


@pytest.mark.parametrize(
    ("kind", "again"),
    [(InFastai, copy.deepcopy), (InLightning, lambda x: pickle.loads(pickle.dumps(x))), (InHuggingFace, copy.deepcopy)],
    ids=["fastai", "lightning", "huggingface"],
)
def test_a_copy_is_a_callback_of_its_own(kind, again, tmp_path):
    callback = kind(1.0, bias=True)
    other, model = again(callback), Net()
    RUNS[kind](model, [other], tmp_path)
    assert not any(p.any() for p in model.parameters())
    assert callback.participant is None and other.participant.steps == STEPS


@pytest.mark.parametrize("kind", ALL)
def test_two_beside_each_other_have_keys_and_figures_of_their_own(kind, tmp_path):
    other = type("Other", (kind,), {})
    model = Net()
    first, second = kind(0.1, model=model.body), other(0.2, model=model.head)
    shown = RUNS[kind](model, [first, second], tmp_path)
    assert shown["shrunk"] == shown["shrunk_2"] == STEPS
    assert first.participant is not second.participant


def test_states_of_two_callbacks_are_found_again(tmp_path):
    model = Net()
    pair = [InFastai(0.1, model=model.body), OfPart(0.2, model=model.head)]
    fastai(model, [*pair, SaveModelCallback(every_epoch=True)], tmp_path)
    saved = torch.load(tmp_path / "models" / "model_0.fasterai.pt", weights_only=True)["states"]
    assert sorted(saved) == ["InFastai", "OfPart"]
    assert all(state["participants"] == {"Shrink": {"steps": STEPS}} for state in saved.values())
