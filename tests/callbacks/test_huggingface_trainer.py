"""Trainings that are interrupted, resumed wrongly, accumulated unevenly, scaled, or have a loss of their own."""

from __future__ import annotations

import itertools
import types
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from fasterai.callbacks.huggingface import ParticipantCallback, SparsifyCallback
from fasterai.callbacks.huggingface_trainer import batches_of_step
from fasterai.core.loop import Participant

pytestmark = pytest.mark.filterwarnings("ignore")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(6, 3)

    def forward(self, x, labels=None):
        logits = self.body(x)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class Counts(Net):
    """Divides its loss by the items of all batches of a step, as Hugging Face's models do."""

    def forward(self, x, labels=None, num_items_in_batch=None, **_):
        logits = self.body(x)
        return {"loss": F.cross_entropy(logits, labels, reduction="sum") / num_items_in_batch, "logits": logits}


class Follows(Participant):
    def __init__(self) -> None:
        self.seen, self.losses, self.norms = "", [], []
        self.own = nn.Parameter(torch.zeros(3))

    def on_setup(self, model):
        self.model = model
        return [self.own]

    def after_loss(self, loss, batch):
        self.seen += "l"
        self.losses.append(float(loss.detach()))
        return loss + (self.own - 1).square().sum()

    def after_backward(self) -> None:
        self.seen += "b"
        self.norms.append(float(self.model.body.weight.grad.norm()))

    def after_step(self, position) -> None:
        self.seen += "a"

    def on_fit_end(self, completed) -> None:
        self.seen += f" {completed}"

    def state_dict(self):
        return {"own": self.own.detach().clone()}

    def load_state_dict(self, state) -> None:
        self.own.data.copy_(state["own"])


class Interrupts(TrainerCallback):
    def on_step_begin(self, args, state, control, **_):
        if state.global_step == 2:
            raise KeyboardInterrupt


def arguments(path, **options) -> TrainingArguments:
    options = {"save_strategy": "no", "optim": "sgd", "num_train_epochs": 1, "lr_scheduler_type": "constant", **options}
    quiet = {"use_cpu": True, "report_to": [], "disable_tqdm": True}
    return TrainingArguments(str(path), per_device_train_batch_size=8, learning_rate=0.1, **quiet, **options)


def rows(batches: int = 4) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{"x": torch.randn(6, generator=generator), "labels": torch.tensor(i % 3)} for i in range(8 * batches)]


def trainer(model, args, *callbacks, batches: int = 4, kind=Trainer) -> Trainer:
    return kind(model, args, train_dataset=rows(batches), eval_dataset=rows(1), callbacks=list(callbacks))


@pytest.fixture
def interrupted(tmp_path):
    """A model, arguments and participant that a training has left in the middle."""
    model, follows, args = Net(), Follows(), arguments(tmp_path, max_grad_norm=0.5)
    with pytest.raises(KeyboardInterrupt):
        trainer(model, args, ParticipantCallback(follows), Interrupts()).train()
    assert follows.seen == "lbalba"
    return model, follows, args


def is_clean(model, args) -> bool:
    return args.max_grad_norm == 0.5 and not model._forward_hooks and not model._forward_pre_hooks


def test_a_later_training_without_the_callback_is_its_own(interrupted):
    model, follows, args = interrupted
    with pytest.warns(UserWarning, match="interrupted with its ParticipantCallback on the model: its run ends here"):
        trainer(model, args).train()
    assert follows.seen == "lbalba False" and is_clean(model, args)


def test_a_later_training_with_another_callback_is_its_own(interrupted):
    model, follows, args = interrupted
    other = Follows()
    with pytest.warns(UserWarning, match="interrupted with its ParticipantCallback"):
        trainer(model, args, ParticipantCallback(other)).train()
    assert follows.seen == "lbalba False" and other.seen == "lba" * 4 + " True" and is_clean(model, args)


def test_a_later_loop_of_ones_own_is_its_own(interrupted):
    model, follows, args = interrupted
    with pytest.warns(UserWarning, match="interrupted"):
        model(torch.randn(2, 6), torch.tensor([0, 1]))
    model(torch.randn(2, 6), torch.tensor([0, 1]))
    assert follows.seen == "lbalba False" and is_clean(model, args)


def test_a_new_model_is_clipped_with_the_arguments_of_before(interrupted):
    _, _, args = interrupted
    follows = Follows()
    seen = []

    class Looks(TrainerCallback):
        def on_optimizer_step(self, args, state, control, model=None, **_):
            seen.append(float(torch.cat([p.grad.flatten() for p in model.parameters()]).norm()))

    args.max_grad_norm = 0.0  # as the interrupted training has left it
    model = Net()
    trainer(model, args, ParticipantCallback(follows), Looks()).train()
    assert len(seen) == 4 and max(seen) <= 0.5 * 1.001 and is_clean(model, args)


def test_two_callbacks_of_a_class_are_refused(tmp_path):
    both = ParticipantCallback(Follows()), ParticipantCallback(Follows())
    model = Net()
    with pytest.raises(ValueError, match=r"callbacks must hold one ParticipantCallback.*, got two"):
        trainer(model, arguments(tmp_path), *both).train()
    follows = Follows()
    sparsify = SparsifyCallback(0.5, "weight", "local", "large_final", "lin")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*interrupted.*")
        trainer(Net(), arguments(tmp_path), ParticipantCallback(follows), sparsify).train()
    assert follows.seen == "lba" * 4 + " True" and sparsify.current_sparsity == 0.5


def test_a_short_last_step_of_an_epoch_is_no_less_of_a_loss(tmp_path):
    """5 batches in steps of 4: the fifth has a step to itself. The same in models that divide by all items and that do not."""
    found = []
    for model in (Net(), Counts()):
        follows = Follows()
        args = arguments(tmp_path, gradient_accumulation_steps=4, num_train_epochs=2, max_grad_norm=0.0)
        trainer(model, args, ParticipantCallback(follows), batches=5).train()
        assert follows.seen == "llllbalba" * 2 + " True"
        found.append(follows)
    assert found[0].losses == pytest.approx(found[1].losses, rel=1e-5)
    # Each step has the whole gradient 2 (own - 1), at rate 0.1: own = 1 - 0.8 ** 4
    assert found[0].own.tolist() == pytest.approx([1 - 0.8**4] * 3)
    assert found[1].own.tolist() == pytest.approx([1 - 0.8**4] * 3)


def test_batches_of_a_step_by_hand():
    args = types.SimpleNamespace(gradient_accumulation_steps=4)
    counts = [batches_of_step(args, types.SimpleNamespace(global_step=i), 10) for i in range(6)]
    assert counts == [4, 4, 2, 4, 4, 2]
    assert batches_of_step(args, types.SimpleNamespace(global_step=1), 8) == 4
    assert batches_of_step(args, types.SimpleNamespace(global_step=1), 0) == 4


def test_a_loss_of_the_trainer_s_own_is_said(tmp_path):
    class Own(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return F.cross_entropy(model(**inputs)["logits"], inputs["labels"])

    follows = Follows()
    with pytest.raises(ValueError, match="must train on the loss that the model returns, which Follows changes, got one of"):
        trainer(Net(), arguments(tmp_path), ParticipantCallback(follows), kind=Own).train()
    assert follows.seen == "l"


def test_a_folder_of_another_step_is_refused(tmp_path):
    trainer(Net(), arguments(tmp_path, save_strategy="epoch", num_train_epochs=2), ParticipantCallback(Follows())).train()
    callback = ParticipantCallback(Follows())
    callback.resume_from = tmp_path / "checkpoint-4"
    later = trainer(Net(), arguments(tmp_path, num_train_epochs=3), callback)
    with pytest.raises(ValueError, match="must be the folder that the Trainer resumes, at step 8, got one of step 4"):
        later.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))


@pytest.mark.parametrize("clip", [0.0, 1e6])
def test_scaled_gradients_are_shown_unscaled_and_a_skipped_step_leaves_nothing(tmp_path, clip):
    """Half precision's scaler on the CPU; the second loss overflows."""
    factors = itertools.chain([1.0, float("inf")], itertools.repeat(1.0))

    class Overflows(Net):
        def forward(self, x, labels=None):
            out = super().forward(x, labels)
            return {**out, "loss": out["loss"] * next(factors)}

    class Scales(TrainerCallback):
        def on_train_begin(self, args, state, control, optimizer=None, **_):
            run.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
            optimizer.__init__(optimizer.optimizer, False, run.accelerator.scaler)
            run.accelerator.native_amp = True
            run.accelerator.state._mixed_precision = "fp16"

    follows, plain = Follows(), Follows()
    model = Overflows()
    run = trainer(model, arguments(tmp_path, max_grad_norm=clip), ParticipantCallback(follows), Scales())
    try:
        run.train()
    finally:
        run.accelerator.state._mixed_precision = "no"
    trainer(Net(), arguments(tmp_path, max_grad_norm=clip), ParticipantCallback(plain)).train()
    assert follows.seen == "lbalblbalba True"
    assert follows.norms[0] == pytest.approx(plain.norms[0], rel=1e-4)
    assert follows.own.tolist() == pytest.approx([1 - 0.8**3] * 3)


def test_evaluations_in_between_show_nothing(tmp_path):
    follows = Follows()
    trainer(Net(), arguments(tmp_path, eval_strategy="steps", eval_steps=1), ParticipantCallback(follows)).train()
    assert follows.seen == "lba" * 4 + " True"


def test_a_loss_in_a_tuple_is_changed(tmp_path):
    class Pair(Net):
        def forward(self, x, labels=None):
            return tuple(super().forward(x, labels).values())

    follows = Follows()
    trainer(Pair(), arguments(tmp_path, max_grad_norm=0.0), ParticipantCallback(follows)).train()
    assert follows.own.tolist() == pytest.approx([1 - 0.8**4] * 3)


def test_a_training_that_is_stopped_is_not_completed(tmp_path):
    class Stops(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_training_stop = state.global_step == 2

    follows = Follows()
    trainer(Net(), arguments(tmp_path), ParticipantCallback(follows), Stops()).train()
    assert follows.seen == "lbalba False"
