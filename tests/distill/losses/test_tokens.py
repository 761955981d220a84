"""Distillation of language models: padding, the shift of causal models, the teacher's largest classes alone."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.special
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fasterai.callbacks.plain import attach
from fasterai.core.batch import Batch
from fasterai.distill.distiller import Distiller
from fasterai.distill.losses.logits import DIST, DKD, NKD, Logits, Mutual, SoftTarget, Standardised
from fasterai.distill.losses.loss import LogitLoss
from fasterai.distill.losses.tokens import Tokens

WORDS = 11


def tensors(seed: int = 0, *, length: int = 6, batch: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (2 * torch.randn(batch, length, WORDS, generator=generator) for _ in range(2))
    return student, teacher, torch.randint(0, WORDS, (batch, length), generator=generator)


def kl(student: Tensor, teacher: Tensor) -> float:
    s, t = (scipy.special.softmax(x.double().numpy()) for x in (student, teacher))
    return float(scipy.special.rel_entr(t, s).sum())


# --- the shift and the padding -------------------------------------------------------------------------------------------


def test_the_shift_by_hand() -> None:
    student, teacher, labels = tensors(batch=1, length=4)
    labels[0] = torch.tensor([7, 3, -100, 5])  # logits 0 belong to label 3, logits 1 to padding, logits 2 to label 5
    wanted = (kl(student[0, 0], teacher[0, 0]) + kl(student[0, 2], teacher[0, 2])) / 2
    assert float(Tokens(Mutual())(student, teacher, labels)) == pytest.approx(wanted, rel=1e-5)
    # without a shift logits 0, 1 and 3 count
    wanted = sum(kl(student[0, i], teacher[0, i]) for i in (0, 1, 3)) / 3
    assert float(Tokens(Mutual(), shift=False)(student, teacher, labels)) == pytest.approx(wanted, rel=1e-5)


def test_the_label_of_a_token_is_the_next_one() -> None:
    student, teacher, labels = tensors()
    wanted = DKD()(student[:, :-1].reshape(-1, WORDS), teacher[:, :-1].reshape(-1, WORDS), labels[:, 1:].reshape(-1))
    torch.testing.assert_close(Tokens(DKD())(student, teacher, labels), wanted)
    assert not torch.isclose(Tokens(DKD(), shift=False)(student, teacher, labels), wanted)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), share=st.floats(0, 1))
@pytest.mark.parametrize("loss", [SoftTarget(), DKD(), NKD(), DIST(), Standardised(), Logits(scale=3)], ids=repr)
def test_what_does_not_count_is_as_if_it_were_not_there(loss: LogitLoss, seed: int, share: float) -> None:
    student, teacher, labels = tensors(seed)
    gone = torch.rand(labels.shape, generator=torch.Generator().manual_seed(seed)) < share
    gone[0, 1:3] = False  # two tokens at least
    masked = labels.masked_fill(gone, -100)
    kept = ~gone[:, 1:]
    wanted = loss(student[:, :-1][kept], teacher[:, :-1][kept], labels[:, 1:][kept])
    torch.testing.assert_close(Tokens(loss)(student, teacher, masked), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loss", [SoftTarget(), DKD(), NKD(), DIST(), Standardised(DKD())], ids=repr)
@pytest.mark.parametrize("planted", [float("nan"), float("inf"), 1e9])
def test_whatever_stands_at_padding_changes_neither_value_nor_gradient(loss: LogitLoss, planted: float) -> None:
    student, teacher, labels = tensors()
    labels[0, 3:] = labels[2, 5:] = -100

    def run(s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        s = s.clone().requires_grad_()
        value = Tokens(loss)(s, t, labels)
        value.backward()
        assert s.grad is not None
        return value.detach(), s.grad

    wanted, grad = run(student, teacher)
    assert grad[0, 2:].abs().sum() == 0  # the logits before padding, and the last
    for x in (student, teacher):
        x[0, 2:] = x[2, 4:] = planted
    value, other = run(student, teacher)
    assert torch.equal(value, wanted) and torch.equal(grad, other)


def test_a_batch_of_padding_alone_has_the_loss_0() -> None:
    student, teacher, labels = tensors()
    student.requires_grad_()
    value = Tokens()(student, teacher, torch.full_like(labels, -100))
    value.backward()
    assert float(value) == 0
    assert student.grad is not None and student.grad.abs().sum() == 0


def test_another_number_may_stand_for_padding_and_maps_have_places_without_a_class() -> None:
    student, teacher = (torch.randn(2, 5, 4, 3, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    labels = torch.randint(0, 5, (2, 4, 3), generator=torch.Generator().manual_seed(2))
    labels[0, :2] = 255
    rows = [x.permute(0, 2, 3, 1)[labels != 255] for x in (student, teacher)]
    wanted = DKD()(*rows, labels[labels != 255])
    torch.testing.assert_close(Tokens(DKD(), ignore=255, shift=False)(student, teacher, labels), wanted)


# --- the largest classes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rest", [False, True])
def test_the_largest_classes_by_hand(rest: bool) -> None:
    student, teacher, labels = tensors()
    wanted = []
    for s, t in zip(student[:, :-1].reshape(-1, WORDS).double(), teacher[:, :-1].reshape(-1, WORDS).double(), strict=True):
        there = np.argsort(t.numpy())[::-1][:3]
        ps, pt = (scipy.special.softmax(x.numpy()) for x in (s, t))
        some = [p[there] for p in (ps, pt)]
        some = [np.append(p, 1 - p.sum()) if rest else p / p.sum() for p in some]
        wanted.append(float(scipy.special.rel_entr(some[1], some[0]).sum()))
    value = Tokens(Mutual(), top_k=3, rest=rest)(student, teacher, labels)
    assert float(value) == pytest.approx(np.mean(wanted), rel=1e-4)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), k=st.integers(2, WORDS - 1))
def test_with_the_rest_it_is_never_more_than_of_all_and_comes_up_to_it(seed: int, k: int) -> None:
    student, teacher, labels = tensors(seed)
    whole = float(Tokens(Mutual())(student, teacher, labels))
    some = float(Tokens(Mutual(), top_k=k, rest=True)(student, teacher, labels))
    assert some <= whole + 1e-5  # classes that are put together lose what tells them apart
    more = float(Tokens(Mutual(), top_k=k + 1, rest=True)(student, teacher, labels))
    assert some <= more + 1e-5
    assert float(Tokens(Mutual(), top_k=WORDS, rest=True)(student, teacher, labels)) == pytest.approx(whole)


def test_labels_go_along_to_the_largest_classes() -> None:
    teacher = torch.tensor([[[5.0, 4.0, 3.0, 2.0, 1.0]]])
    student = torch.tensor([[[1.0, 0.5, 2.0, 0.0, 0.3]]])
    for label, shares in ((1, [[0.0, 1.0, 0.0]]), (4, [[0.0, 0.0, 1.0]])):
        loss = Tokens(DKD(T=1), top_k=2, rest=True, shift=False)
        others = [torch.cat([x[0, :, :2], x[0, :, 2:].logsumexp(1, keepdim=True)], 1) for x in (student, teacher)]
        wanted = DKD(T=1)(*others, torch.tensor(shares))
        torch.testing.assert_close(loss(student, teacher, torch.tensor([[label]])), wanted)
    value = Tokens(DKD(), top_k=2, shift=False)(student, teacher, torch.tensor([[4]]))  # a label that is not among them
    assert value.isfinite()


# --- models --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gpts() -> tuple[nn.Module, nn.Module]:
    transformers = pytest.importorskip("transformers")
    made = []
    for seed, layers in ((0, 1), (1, 2)):
        torch.manual_seed(seed)
        sizes = {"vocab_size": WORDS, "n_positions": 16, "n_embd": 8, "n_layer": layers, "n_head": 2}
        dropped = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "initializer_range": 0.5}
        made.append(transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **dropped)))
    return made[0], made[1]


def sentences(padding: int, *, left: bool = False) -> dict[str, Tensor]:
    """Make two sentences of 5 and 3 tokens with so much more padding, and labels that leave it out."""
    words = torch.randint(1, WORDS, (2, 5), generator=torch.Generator().manual_seed(3))
    ids, mask = torch.zeros(2, 5 + padding, dtype=torch.long), torch.zeros(2, 5 + padding, dtype=torch.long)
    for row, length in ((0, 5), (1, 3)):
        where = slice(-length, None) if left else slice(0, length)
        ids[row, where], mask[row, where] = words[row, :length], 1
    places = (mask.cumsum(1) - 1).clamp(min=0)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": places, "labels": ids.masked_fill(mask == 0, -100)}


def distilled(models: tuple[nn.Module, nn.Module], loss: LogitLoss, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the distillation loss of a batch in a loop of one's own, and the gradient of the student's first parameter."""
    student, teacher = models
    student.zero_grad()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.0)
    handle = attach(optimizer, Distiller(teacher, loss, weight=1.0), total_steps=1, model=student)
    outputs = student(**batch)
    task = outputs.logits.sum() * 0 if outputs.loss is None else outputs.loss
    value = handle.loss(task, batch, (), outputs)
    value.backward()
    grad = next(student.parameters()).grad
    assert grad is not None
    grad = grad.clone()
    optimizer.step()
    handle.remove()
    return value.detach(), grad


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("loss", [Tokens(), Tokens(DKD()), Tokens(SoftTarget(), top_k=4, rest=True), Tokens(DIST())], ids=repr)
def test_gpt_padding_makes_no_difference(gpts: tuple[nn.Module, nn.Module], loss: Tokens, left: bool) -> None:
    value, grad = distilled(gpts, loss, sentences(0, left=left))
    for padding in (1, 4):
        other, its = distilled(gpts, loss, sentences(padding, left=left))
        torch.testing.assert_close(other, value, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(its, grad, rtol=1e-3, atol=1e-5)
    plain, _ = distilled(gpts, loss.loss, {**sentences(0), "labels": sentences(0)["input_ids"]})
    padded, _ = distilled(gpts, loss.loss, {**sentences(4), "labels": sentences(4)["input_ids"]})
    assert not torch.isclose(plain, padded, rtol=1e-3)  # without Tokens it does make one


def test_gpt_by_hand_over_the_tokens_that_are_predicted(gpts: tuple[nn.Module, nn.Module]) -> None:
    batch = sentences(2)
    student, teacher = (model.eval()(**batch).logits.detach() for model in gpts)
    # 5 words are 4 predictions, 3 are 2
    places = [(0, i) for i in range(4)] + [(1, i) for i in range(2)]
    wanted = np.mean([kl(student[place], teacher[place]) for place in places])
    value, _ = distilled(gpts, Tokens(Mutual()), batch)
    assert float(value) == pytest.approx(wanted, rel=1e-4)


def test_gpt_a_loss_that_counts_padding_warns(gpts: tuple[nn.Module, nn.Module]) -> None:
    labels = torch.full((2, 5), 3)
    batch = {"input_ids": labels, "labels": labels}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        distilled(gpts, Mutual(), batch)
        distilled(gpts, Tokens(Mutual()), {**batch, "labels": labels.index_fill(1, torch.tensor([4]), -100)})
    with pytest.warns(
        UserWarning, match=r"Mutual counts the tokens whose label is -100, too, .*; Tokens\(Mutual\(...\)\) does not"
    ):
        distilled(gpts, Mutual(), {**batch, "labels": labels.index_fill(1, torch.tensor([4]), -100)})


def test_gpt_the_mask_stands_in_for_labels_that_leave_nothing_out(gpts: tuple[nn.Module, nn.Module]) -> None:
    batch = sentences(3)
    wanted, _ = distilled(gpts, Tokens(DKD()), batch)
    whole = {**batch, "labels": batch["input_ids"]}  # labels that do not leave the padding out
    torch.testing.assert_close(distilled(gpts, Tokens(DKD()), whole)[0], wanted)
    without = {name: x for name, x in batch.items() if name != "labels"}
    torch.testing.assert_close(distilled(gpts, Tokens(DKD()), without)[0], wanted)


def test_t5_labels_stand_at_their_logits() -> None:
    transformers = pytest.importorskip("transformers")
    made = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        sizes = {"vocab_size": WORDS, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0}
        made.append(transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, decoder_start_token_id=0)))
    source = torch.randint(1, WORDS, (2, 4), generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[3, 5, 2, 1], [4, 1, -100, -100]])
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])  # of the source, though of the labels' shape
    before = torch.tensor([[0, 3, 5, 2], [0, 4, 1, 0]])
    batch = {"input_ids": source, "attention_mask": mask, "decoder_input_ids": before, "labels": labels}
    student, teacher = (model(**batch).logits.detach() for model in made)
    places = [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1)]
    wanted = np.mean([kl(student[place], teacher[place]) for place in places])
    for name in ("", "decoder_input_ids"):  # without them, they are made of the labels, by the teacher too
        batch.pop(name, None)
        value, _ = distilled((made[0], made[1]), Tokens(Mutual(), shift=False), batch)
        assert float(value) == pytest.approx(wanted, rel=1e-4)
    with pytest.raises(
        ValueError, match=r"shift must be False for a T5For\w+, whose logits stand at their labels, got Tokens\("
    ):
        distilled((made[0], made[1]), Tokens(), batch)


def test_bert_learns_at_its_masked_words_alone() -> None:
    transformers = pytest.importorskip("transformers")
    made = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        sizes = {"vocab_size": WORDS, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        more = {"intermediate_size": 8, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        made.append(transformers.BertForMaskedLM(transformers.BertConfig(**sizes, **more)))
    ids = torch.randint(1, WORDS, (2, 5), generator=torch.Generator().manual_seed(0))
    labels = torch.full_like(ids, -100)
    labels[0, 1], labels[1, 4] = 3, 7
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    student, teacher = (model(**batch).logits.detach() for model in made)
    wanted = (kl(student[0, 1], teacher[0, 1]) + kl(student[1, 4], teacher[1, 4])) / 2
    value, _ = distilled((made[0], made[1]), Tokens(Mutual(), shift=False), batch)
    assert float(value) == pytest.approx(wanted, rel=1e-3)
    with pytest.raises(ValueError, match=r"shift must be False for a BertForMaskedLM, .* pass Tokens\(..., shift=False\)"):
        distilled((made[0], made[1]), Tokens(), batch)
    # without labels, all words that the mask leaves count
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    loss = Tokens(Mutual(), shift=False)
    found = loss.labels_of(Batch((), (), {"input_ids": ids, "attention_mask": mask}))
    assert found.tolist() == [[1, 1, 1, -100, -100], [1, 1, 1, 1, 1]]


# --- settings, errors, cost ----------------------------------------------------------------------------------------------


def test_labels_of_a_batch() -> None:
    ids, mask = torch.tensor([[4, 5, 6]]), torch.tensor([[1, 1, 0]])
    keywords = {"input_ids": ids, "attention_mask": mask}
    assert Tokens().labels_of(Batch((), (), {**keywords, "labels": ids})).tolist() == [[4, 5, -100]]
    assert Tokens().labels_of(Batch((), (), keywords)).tolist() == [[4, 5, -100]]
    assert Tokens(ignore=0).labels_of(Batch((), (), keywords)).tolist() == [[4, 5, 0]]
    assert Tokens(shift=False).labels_of(Batch((), (), {**keywords, "labels": ids})).tolist() == [[4, 5, 6]]
    assert Tokens(DKD(), shift=False).labels_of(Batch((), (), keywords)) is None  # no classes to be had
    assert Tokens().labels_of(Batch((), (ids,), {"attention_mask": torch.ones(1, 9)})).tolist() == [[4, 5, 6]]
    assert ids.tolist() == [[4, 5, 6]]
    left = Batch((), (), {"input_ids": ids, "attention_mask": torch.tensor([[0, 1, 1]])})
    assert Tokens().labels_of(left).tolist() == [[-100, -100, 6]]


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: Tokens(SoftTarget), TypeError, "loss must be a loss of logits, got .*pass one of its values"),
        (lambda: Tokens(Tokens()), ValueError, "loss must be one of single rows, got Tokens"),
        (lambda: Tokens(top_k=0), ValueError, "top_k must be at least 2, got 0"),
        (lambda: Tokens(top_k=2.5), TypeError, "top_k must be a whole number of at least 2, got 2.5"),
        (lambda: Tokens(rest=True), ValueError, "rest must be False without top_k, got True; pass top_k"),
        (lambda: Tokens()(*tensors()[:2]), ValueError, "labels must be there for Tokens, got None"),
        (
            lambda: Tokens()(torch.zeros(2, 5), torch.zeros(2, 5), torch.zeros(2)),
            ValueError,
            r"logits and labels must be \(B, T, C\) and \(B, T\) with shift, got \(2, 5\) and \(2,\); pass shift=False",
        ),
        (
            lambda: Tokens(shift=False)(torch.zeros(2, 5), torch.zeros(2, 5), torch.zeros(2, 5)),
            ValueError,
            r"labels must be numbers for Tokens, got shares of shape \(2, 5\)",
        ),
        (
            lambda: Tokens()(torch.zeros(2, 3, 50), torch.zeros(2, 3, 64), torch.zeros(2, 3)),
            ValueError,
            "the student's 50 classes, got 64; give it a head, or a tokenizer",
        ),
    ],
)
def test_what_does_not_fit_is_refused(make: Callable[[], Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        make()


class Waits(TorchFunctionMode):
    """Notes the calls after which a program has to wait for its device, as far as the calls show it."""

    NAMES = frozenset(("item", "nonzero", "masked_select", "tolist", "cpu", "__bool__", "__float__", "__int__", "unique"))

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        by_flags = name == "__getitem__" and isinstance(args[1], Tensor) and args[1].dtype == torch.bool
        if name in self.NAMES or by_flags:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("loss", [SoftTarget(), DKD(), NKD(), Standardised(), Logits(), Mutual()], ids=repr)
@pytest.mark.parametrize("extra", [{}, {"top_k": 3}, {"top_k": 3, "rest": True}])
def test_no_step_waits_for_the_device(loss: LogitLoss, extra: dict[str, Any]) -> None:
    student, teacher, labels = tensors()
    with Waits() as waits:
        Tokens(loss, **extra)(student, teacher, labels)
    assert waits.found == []


def test_only_losses_of_several_rows_wait() -> None:
    with Waits() as waits:
        Tokens(DIST())(*tensors())
    assert "__getitem__" in waits.found
    with Waits() as waits:
        F.softmax(torch.ones(3), 0).sum().item()
    assert waits.found == ["item"]
