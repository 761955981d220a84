"""Hugging Face's Trainer with tiny networks: exact, logged, resumed, and nothing left on the model."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

from fasterai.callbacks.huggingface import HoldCallback, ParticipantCallback, PruneCallback, SparsifyCallback, _are_alike
from fasterai.core.loop import Participant
from fasterai.sparse.sparsifier import Sparsifier

pytestmark = pytest.mark.filterwarnings("ignore")
STEPS = 4  # in an epoch


def bert(seed: int = 0) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, num_labels=3
    )
    return BertForSequenceClassification(config)


class Net(nn.Module):
    """Two layers that work their loss out themselves."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None):
        logits = self.head(torch.relu(self.body(x)))
        return logits if labels is None else (nn.functional.cross_entropy(logits, labels), logits)


def sentences() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 20, (8 * STEPS, 5), generator=generator)
    return [{"input_ids": x, "attention_mask": torch.ones_like(x), "labels": x[0] % 3} for x in ids]


def rows() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{"x": torch.randn(6, generator=generator), "labels": torch.tensor(i % 3)} for i in range(8 * STEPS)]


def trainer(model, path, *callbacks, epochs: int = 2, data=None, valid=None, **options) -> Trainer:
    arguments = TrainingArguments(
        str(path),
        per_device_train_batch_size=8,
        num_train_epochs=epochs,
        learning_rate=1e-2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        **{"save_strategy": "no", "logging_steps": STEPS, **options},
    )
    data = data or (sentences() if isinstance(model, BertForSequenceClassification) else rows())
    return Trainer(model, arguments, train_dataset=data, eval_dataset=valid, callbacks=list(callbacks))


def sparsify(sparsity=0.5, criteria="large_final", **options) -> SparsifyCallback:
    return SparsifyCallback(sparsity, "weight", "local", criteria, "lin", **options)


@pytest.mark.parametrize("criteria", ["large_final", "movement", "snip", "wanda"])
def test_the_sparsity_is_exact_and_stands_in_the_log(tmp_path, criteria):
    model, callback = bert(), sparsify(0.75, criteria)
    keys = set(model.state_dict())
    run = trainer(model, tmp_path, callback)
    run.train()
    assert callback.current_sparsity == 0.75
    weight = model.bert.encoder.layer[0].intermediate.dense.weight
    assert int((weight == 0).sum()) == 384  # of 512
    logged = [entry["sparsity"] for entry in run.state.log_history if "sparsity" in entry]
    assert logged[0] == pytest.approx(0.375, abs=0.01) and logged[-1] == 0.75
    assert set(model.state_dict()) == keys
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    copy.deepcopy(model)


@pytest.mark.parametrize("criteria", ["large_final", "movement"])
def test_a_checkpoint_is_resumed_bit_for_bit(tmp_path, criteria):
    whole, resumed = bert(), bert()
    first, second = sparsify(criteria=criteria), sparsify(criteria=criteria)
    trainer(whole, tmp_path, first, save_strategy="epoch").train()
    assert (tmp_path / f"checkpoint-{STEPS}" / "SparsifyCallback.pt").is_file()
    other = trainer(resumed, tmp_path / "other", second, save_strategy="epoch")
    second.resume_from = tmp_path / f"checkpoint-{STEPS}"
    other.train(resume_from_checkpoint=str(second.resume_from))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert second.current_sparsity == 0.5


def test_a_checkpoint_without_a_state_is_said(tmp_path):
    trainer(bert(), tmp_path, save_strategy="epoch").train()
    with pytest.warns(UserWarning, match=rf"resumes at step {STEPS}, and no SparsifyCallback.pt is in .*checkpoint-{STEPS}"):
        trainer(bert(), tmp_path, sparsify()).train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{STEPS}"))


def test_masks_are_held_in_a_second_training(tmp_path):
    model, callback = bert(), sparsify()
    trainer(model, tmp_path, callback, epochs=1).train()
    zeros = {n: (model.get_parameter(n) == 0).clone() for n in callback.sparsifier.masks}
    run = trainer(model, tmp_path, HoldCallback(callback.sparsifier), epochs=1)
    run.train()
    assert all((model.get_parameter(n)[zero] == 0).all() for n, zero in zeros.items())
    assert run.state.log_history[-1]["sparsity"] == 0.5


def test_channels_go_and_a_resumed_run_is_the_same(tmp_path):
    def prune() -> PruneCallback:
        return PruneCallback(0.5, "lin", "local", "large_final", round_to=1)

    whole, resumed = Net(), Net()
    run = trainer(whole, tmp_path, prune(), save_strategy="epoch", data=rows())
    run.train()
    assert whole.body.out_features == 8 and run.state.log_history[-1]["sparsity"] == 0.5
    folder = str(tmp_path / f"checkpoint-{STEPS}")
    other = trainer(resumed, tmp_path, prune(), resume_from_checkpoint=folder, data=rows())
    assert resumed.body.out_features < 16  # before the weights come
    other.train(resume_from_checkpoint=folder)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_accumulated_losses_are_changed_in_proportion(tmp_path):
    """A loss that is multiplied by 2 in batches that are accumulated trains as with twice the rate."""

    class Doubles(Participant):
        def after_loss(self, loss, batch):
            return loss * 2

    plain, doubled = Net(), Net()
    options = {"gradient_accumulation_steps": 2, "optim": "sgd", "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}
    trainer(plain, tmp_path, epochs=1, **options).train()
    run = trainer(doubled, tmp_path, ParticipantCallback(Doubles()), epochs=1, **options)
    run.args.learning_rate /= 2
    run.train()
    for a, b in zip(plain.parameters(), doubled.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_a_model_without_a_loss_is_refused_where_it_is_needed(tmp_path):
    class Changes(Participant):
        def after_loss(self, loss, batch):
            return loss

    class NoLoss(Net):
        def forward(self, x, labels=None):
            return {"logits": self.head(self.body(x))}

    with pytest.raises(ValueError, match="model must return its loss for participants that need it, got dict without one"):
        trainer(NoLoss(), tmp_path, ParticipantCallback(Changes())).train()


def test_an_interrupted_training_leaves_a_usable_model_and_the_next_starts_clean(tmp_path):
    class Interrupts(TrainerCallback):
        def on_step_end(self, args, state, control, **given):
            if state.global_step == 3:
                raise KeyboardInterrupt

    model, callback = bert(), sparsify()
    with pytest.raises(KeyboardInterrupt):
        trainer(model, tmp_path, callback, Interrupts()).train()
    trainer(model, tmp_path, callback).train()
    assert callback.current_sparsity == 0.5
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_evaluation_is_no_training(tmp_path):
    model, callback = Net(), sparsify()
    trainer(model, tmp_path, callback, data=rows(), valid=rows(), eval_strategy="epoch", eval_on_start=True).train()
    assert callback.current_sparsity == 0.5


def test_a_function_makes_participants_for_the_model(tmp_path):
    made = []

    def make(model):
        made.append(Sparsifier(model, sparsity=0.5, schedule="lin"))
        return made

    trainer(Net(), tmp_path, ParticipantCallback(make), data=rows()).train()
    assert len(made) == 1 and made[0].sparsity.overall == 0.5


class Remembers(Participant):
    """Counts its steps, under a name of its own."""

    def __init__(self, name: str) -> None:
        self._name, self.steps = name, 0

    @property
    def name(self) -> str:
        return self._name

    def after_step(self, position) -> None:
        self.steps += 1

    def state_dict(self):
        return {"steps": self.steps}

    def load_state_dict(self, state) -> None:
        self.steps = state["steps"]


def test_two_callbacks_keep_a_state_each(tmp_path):
    for resumed in (None, str(tmp_path / f"checkpoint-{STEPS}")):
        ours = [Remembers("one"), Remembers("two")]
        callbacks = [ParticipantCallback(one) for one in ours]
        trainer(Net(), tmp_path, *callbacks, save_strategy="epoch").train(resume_from_checkpoint=resumed)
        assert [one.steps for one in ours] == [2 * STEPS] * 2


def test_the_state_of_another_run_is_refused(tmp_path):
    trainer(bert(0), tmp_path / "first", sparsify(), save_strategy="epoch").train()
    trainer(bert(1), tmp_path / "second", sparsify(), save_strategy="epoch").train()
    folder = str(tmp_path / "first" / f"checkpoint-{STEPS}")
    with pytest.raises(
        ValueError, match=r"resume_from must be the folder that the Trainer resumes, got None, and .* another run"
    ):
        trainer(bert(0), tmp_path / "second", sparsify()).train(resume_from_checkpoint=folder)


def test_sums_of_the_same_weights_on_another_device_are_alike():
    assert _are_alike([1.0, 2.0, 0.0], [1.0 + 1e-9, 2.0, 0.0])
    assert not _are_alike([1.0, 2.0], [1.0, 2.001])
    assert _are_alike(None, [1.0])
