"""Losses of embeddings: values by hand and from numpy, what they do not change with, bad input, and a run with a distiller."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fasterai.callbacks.plain import attach
from fasterai.distill.distiller import Distiller
from fasterai.distill.losses import embeddings as catalogue
from fasterai.distill.losses.adapters import Projections
from fasterai.distill.losses.embeddings import EmbeddingCosine, EmbeddingRegression, Relational, RelativeTriplet, mean_triplet

EVERY = [
    EmbeddingRegression(),
    EmbeddingRegression("smooth_l1", "l2"),
    EmbeddingRegression(norm=None),
    EmbeddingCosine(),
    Relational(),
    Relational(distance=0),
    Relational(angle=0),
    RelativeTriplet(),
    RelativeTriplet(0.5, "l2", 2.0),
    RelativeTriplet(0.5, None, 0.0),
]
every = pytest.mark.parametrize("loss", EVERY, ids=repr)
LABELS = torch.tensor([0, 1, 0, 2, 1, 0])


def drawn(seed=0, size=4, count=6):
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed))


# --- values by hand --------------------------------------------------------------------------------------------------

S = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]])  # distances 3, 4, 5
T = torch.tensor([[0.0, 0.0], [2.0, 0.0], [4.0, 0.0]])  # distances 2, 4, 2
CASES = [
    # (0 + 1 + 16 + 16) / 6
    (EmbeddingRegression(norm=None), S, T, None, 33 / 6),
    # (0 + 1 / 2 + (4 - 1 / 2) + (4 - 1 / 2)) / 6
    (EmbeddingRegression("smooth_l1", None), S, T, None, 7.5 / 6),
    # (3, 4) / 5 and (1, 0), of length sqrt(2): 2 * (0.16 + 0.64) / 2
    (EmbeddingRegression(norm="l2"), torch.tensor([[3.0, 4.0]]), torch.tensor([[7.0, 0.0]]), None, 0.8),
    # both are -1 and 1 in each dimension after the norm, but the second one is turned round: (0 + 4) / 2
    (EmbeddingRegression(), torch.tensor([[0.0, 9.0], [2.0, 5.0]]), torch.tensor([[5.0, 0.0], [9.0, 8.0]]), None, 2.0),
    # 1 - (3 / 5 + 0) / 2
    (EmbeddingCosine(), torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.tensor([[10.0, 0.0], [5.0, 0.0]]), None, 0.7),
    # over their means 4 and 8 / 3: |3/4 - 3/4| = 0, |4/4 - 6/4| = 1/2, |5/4 - 3/4| = 1/2; each pair stands twice among nine
    (Relational(angle=0), S, T, None, 2 * (0.125 + 0.125) / 9),
    # cosines 0, 3/5, 4/5 at the corners beside 1, -1, 1, of Huber's 1/2, 1.6 - 1/2 and 0.2**2 / 2; each twice among 27
    (Relational(distance=0, angle=1), S, T, None, 2 * (0.5 + 1.1 + 0.02) / 27),
    (Relational(3, 5, scale=2), S, T, None, 2 * (3 * 0.5 / 9 + 5 * 3.24 / 27)),
    # d(a, p) = 3 / sqrt(2) both ways; d(a, n) = 4 and 5 over sqrt(2); the teacher finds the first two apart by (1 - 0) / 2,
    # the second two by (1 + 1) / 2
    (
        RelativeTriplet(2.0, None),
        S,
        torch.tensor([[1.0, 0.0], [0.0, -2.0], [0.0, 3.0]]),
        torch.tensor([7, 7, 1]),
        (0.5 * (2 - 1 / math.sqrt(2)) + 1.0 * (2 - 2 / math.sqrt(2))) / 1.5,
    ),
]


@pytest.mark.parametrize(("loss", "student", "teacher", "labels", "expected"), CASES)
def test_values_by_hand(loss, student, teacher, labels, expected):
    assert float(loss(student, teacher, labels)) == pytest.approx(expected, rel=1e-5)


def test_every_entry_of_the_catalogue_has_a_case():
    assert {type(case[0]).__name__ for case in CASES} == set(catalogue.__all__)


# --- another implementation ------------------------------------------------------------------------------------------


def normed(x, norm):
    if norm == "batch":
        return (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)
    return x / np.linalg.norm(x, axis=1, keepdims=True) * np.sqrt(x.shape[1]) if norm == "l2" else x


def huber(a, b):
    off = abs(a - b)
    return off**2 / 2 if off < 1 else off - 0.5


def of_regression(loss, s, t, labels):
    pairs = zip(normed(s, loss.norm).ravel(), normed(t, loss.norm).ravel(), strict=True)
    return np.mean([(a - b) ** 2 if loss.kind == "mse" else huber(a, b) for a, b in pairs])


def of_cosine(loss, s, t, labels):
    from scipy.spatial.distance import cosine

    return np.mean([cosine(a, b) for a, b in zip(s, t, strict=True)])


def of_relations(loss, s, t, labels):
    from scipy.spatial.distance import pdist, squareform

    n = len(s)
    own, other = (squareform(pdist(x) / pdist(x).mean()) for x in (s, t))
    far = sum(huber(a, b) for a, b in zip(own.ravel(), other.ravel(), strict=True)) / n**2

    def at(x, i, j, k):
        a, b = x[j] - x[i], x[k] - x[i]
        return 0.0 if i in (j, k) else a @ b / np.linalg.norm(a) / np.linalg.norm(b)

    places = [(i, j, k) for i in range(n) for j in range(n) for k in range(n)]
    return loss.distance * far + loss.angle * sum(huber(at(s, *p), at(t, *p)) for p in places) / n**3


def of_triplets(loss, s, t, labels):
    x, total, count = normed(s, loss.norm), 0.0, 0.0
    for a in range(len(s)):
        for p in (p for p in range(len(s)) if p != a and labels[p] == labels[a]):
            for n in (n for n in range(len(s)) if labels[n] != labels[a]):
                weight = ((1 - t[a] @ t[n] / np.linalg.norm(t[a]) / np.linalg.norm(t[n])) / 2) ** loss.power
                near, far = (np.sqrt(np.mean((x[a] - x[i]) ** 2)) for i in (p, n))
                total, count = total + weight * max(0, loss.margin + near - far), count + weight
    return total / count


ORACLES = {
    EmbeddingRegression: of_regression,
    EmbeddingCosine: of_cosine,
    Relational: of_relations,
    RelativeTriplet: of_triplets,
}


@every
def test_values_of_numpy(loss):
    s, t = drawn(1), drawn(2)
    expected = ORACLES[type(loss)](loss, s.double().numpy(), t.double().numpy(), LABELS.numpy())
    assert float(loss(s, t, LABELS)) == pytest.approx(expected, rel=1e-4)


def test_a_triplet_loss_without_weights_is_that_of_torch():
    x = drawn(3)
    places = [(a, p, n) for a in range(6) for p in range(6) for n in range(6) if a != p]
    triplets = torch.tensor([(a, p, n) for a, p, n in places if LABELS[a] == LABELS[p] != LABELS[n]])
    expected = F.triplet_margin_loss(*(x[triplets[:, i]] for i in range(3)), margin=0.7, eps=0.0)
    assert torch.allclose(mean_triplet(torch.cdist(x, x), LABELS, 0.7), expected)


def test_batch_norm_is_that_of_torch():
    x = drawn(4)
    assert torch.allclose(catalogue.batch_norm(x), F.batch_norm(x, None, None, training=True), atol=1e-6)


# --- what they do not change with ------------------------------------------------------------------------------------


@every
@given(order=st.permutations(range(6)))
@settings(max_examples=10, deadline=None)
def test_the_order_of_the_batch_does_not_matter(loss, order):
    s, t = drawn(1), drawn(2)
    assert torch.allclose(loss(s[order], t[order], LABELS[order]), loss(s, t, LABELS), rtol=1e-5)


moves = given(seed=st.integers(0, 99), scale=st.floats(0.1, 100), shift=st.floats(-3, 3))


@moves
@settings(max_examples=15, deadline=None)
def test_relations_do_not_change_with_rotation_scale_and_shift(seed, scale, shift):
    s, t = drawn(1), drawn(2)
    turn = torch.linalg.qr(drawn(seed, count=4)).Q
    assert torch.allclose(Relational()(s @ turn * scale + shift * drawn(seed, count=1), t), Relational()(s, t), rtol=1e-3)
    assert not torch.allclose(Relational()(s + drawn(100 + seed), t), Relational()(s, t), rtol=1e-3)


@moves
@settings(max_examples=15, deadline=None)
def test_cosine_does_not_change_with_the_scale_of_samples(seed, scale, shift):
    s, t = drawn(1), drawn(2)
    own = scale * (0.1 + drawn(seed, 1).abs())
    assert torch.allclose(EmbeddingCosine()(s * own, t), EmbeddingCosine()(s, t), rtol=1e-4)
    assert float(EmbeddingRegression(norm="l2")(s * own, t)) == pytest.approx(2 * float(EmbeddingCosine()(s, t)), rel=1e-4)


@moves
@settings(max_examples=15, deadline=None)
def test_a_batch_norm_takes_scale_and_shift_of_dimensions_away(seed, scale, shift):
    s, t = drawn(1), drawn(2)
    own = 1 + scale * drawn(seed, count=1).abs()
    for loss in (EmbeddingRegression(), RelativeTriplet()):
        assert torch.allclose(loss(s * own + shift, t, LABELS), loss(s, t, LABELS), rtol=1e-2)


@every
def test_a_student_that_is_equal_is_at_the_least(loss):
    s = drawn(1).requires_grad_()
    value = loss(s, s.detach().clone(), LABELS)
    if loss.is_distance:
        assert value.item() == pytest.approx(0, abs=1e-6)
        assert torch.allclose(torch.autograd.grad(value, s)[0], torch.zeros(6, 4), atol=1e-6)
    else:
        assert loss.needs_labels


# --- numbers at the edge ---------------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_loss_is_worked_out_in_float32(loss, dtype):
    s, t = drawn(1).to(dtype).requires_grad_(), drawn(2).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(s, t, LABELS)
    assert value.dtype == torch.float32
    assert torch.equal(value, loss(s.detach().float(), t.float(), LABELS))
    value.backward()
    assert s.grad.dtype == dtype and s.grad.isfinite().all() and s.grad.any()


@every
def test_the_teacher_gets_no_gradient(loss):
    s, t = drawn(1).requires_grad_(), drawn(2).requires_grad_()
    loss(s, t, LABELS).backward()
    assert t.grad is None and s.grad.any()


@every
def test_one_sample_says_nothing_of_relations(loss):
    s = drawn(1, count=1).requires_grad_()
    value = loss(s, drawn(2, count=1), LABELS[:1])
    value.backward()
    compares = isinstance(loss, EmbeddingCosine) or (isinstance(loss, EmbeddingRegression) and loss.norm != "batch")
    assert s.grad.isfinite().all()
    assert (bool(value), bool(s.grad.any())) == (compares, compares)


@every
@pytest.mark.parametrize("value", [0.0, 2.0])
def test_embeddings_that_are_all_the_same_give_finite_gradients(loss, value):
    for s, t in [(torch.full((6, 4), value), drawn(2)), (drawn(1), torch.full((6, 4), value))]:
        s.requires_grad_()
        found = loss(s, t, LABELS)
        found.backward()
        assert found.isfinite() and s.grad.isfinite().all() and s.grad.abs().max() < 1e4


@pytest.mark.parametrize("labels", [torch.zeros(6, dtype=torch.long), torch.arange(6)])
def test_a_batch_without_a_triplet_costs_nothing(labels):
    s = drawn(1).requires_grad_()
    value = RelativeTriplet()(s, drawn(2), labels)
    value.backward()
    assert value.item() == 0 and not s.grad.any()


def test_samples_that_the_teacher_finds_alike_need_not_part():
    s = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 0.5]]).requires_grad_()
    alike = torch.tensor([[1.0, 0.0], [1.0, 0.0], [2.0, 0.0]])
    labels = torch.tensor([0, 0, 1])
    assert RelativeTriplet(norm=None)(s, alike, labels).item() == 0
    for seed in range(5):  # a cosine of 1 that is rounded to above it
        equal = drawn(seed, 3, 1).expand(3, 3)
        assert RelativeTriplet(norm=None, power=0.5)(s, equal, labels).isfinite()
    assert RelativeTriplet(norm=None, power=0)(s, alike, labels).item() > 0.1


# --- sizes that differ -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [EmbeddingRegression(), EmbeddingCosine()], ids=repr)
def test_a_linear_layer_brings_the_student_to_the_teachers_dimensions(loss):
    s, t = drawn(1, 3).requires_grad_(), drawn(2, 5)
    adapter = loss.adapter([s], [t])
    assert [tuple(p.shape) for p in adapter.parameters()] == [(5, 3), (5,)]
    layer = adapter.layers["0"]
    assert torch.equal(loss(s, t, None, adapter), loss(s @ layer.weight.T + layer.bias, t))
    loss(s, t, None, adapter).backward()
    assert s.grad.any() and layer.weight.grad.any()


@pytest.mark.parametrize("loss", [Relational(), RelativeTriplet()], ids=repr)
def test_losses_of_relations_compare_any_dimensions(loss):
    s, t = drawn(1, 3), drawn(2, 5)
    assert loss.adapter([s], [t]) is None
    assert float(loss(s, t, LABELS)) == pytest.approx(
        ORACLES[type(loss)](loss, s.double().numpy(), t.double().numpy(), LABELS.numpy()), rel=1e-4
    )


@pytest.mark.parametrize("teacher_size", [4, 5])
def test_an_embedding_that_gets_narrower_goes_on(teacher_size):
    s, t = drawn(1), drawn(2, teacher_size)
    loss = EmbeddingRegression(norm=None)
    adapter = loss.adapter([s], [t])
    assert isinstance(adapter, Projections)
    before = {p: p.detach().clone() for p in adapter.parameters()}
    if before:
        loss(s, t, None, adapter).backward()
    kept = torch.tensor([0, 2, 3])
    cut = adapter.keep_(0, kept)
    narrow = s[:, kept].requires_grad_()
    value = loss(narrow, t, None, adapter)
    value.backward()
    if teacher_size == 4:  # the same dimensions as before are compared
        assert not cut and torch.equal(value, loss(s[:, kept], t[:, kept]))
    else:
        weight, bias = before
        assert list(cut) == [weight] and weight.shape == weight.grad.shape == (5, 3)
        assert torch.allclose(value, loss(s[:, kept] @ before[weight][:, kept].T + before[bias], t))
    assert narrow.grad.any()


# --- in a run --------------------------------------------------------------------------------------------------------


def run_steps(loss, size=3, steps=30):
    torch.manual_seed(0)
    student, teacher = nn.Linear(4, size), nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 5))
    optimizer = torch.optim.SGD(student.parameters(), 0.05)
    distiller, seen = Distiller(teacher, loss, weight=1.0), []
    with attach(optimizer, distiller, total_steps=steps, model=student) as handle:
        for _ in range(steps):
            x = drawn(1, count=12)
            outputs = student(x)
            value = handle.loss(outputs.sum() * 0, x, LABELS.repeat(2), outputs)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            seen.append((value.item(), outputs.detach(), teacher(x).detach()))
    assert all(p.grad is None for p in teacher.parameters())
    return seen, [p.shape for group in optimizer.param_groups for p in group["params"]]


@every
def test_a_distiller_compares_the_outputs_where_no_layers_are_named(loss):
    size = 5 if loss.same_size else 3
    seen, _ = run_steps(loss, size)
    value, outputs, answer = seen[0]
    assert value == pytest.approx(float(loss(outputs, answer, LABELS.repeat(2))), rel=1e-5)
    assert seen[-1][0] < value


def test_the_linear_layer_trains_with_the_student():
    seen, shapes = run_steps(EmbeddingRegression(), 3)
    assert shapes == [(3, 4), (3,)] and seen[-1][0] < 0.8 * seen[0][0]  # and leaves with the run


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: EmbeddingRegression("l1"), ValueError, "kind must be one of mse, smooth_l1, got 'l1'"),
        (lambda: EmbeddingRegression(norm="layer"), ValueError, "norm must be one of batch, l2, None, got 'layer'"),
        (lambda: EmbeddingRegression(norm=2), TypeError, "norm must be one of batch, l2, None, got 2"),
        (lambda: Relational(-1), ValueError, "distance must be a number of at least 0, got -1"),
        (lambda: Relational(angle=math.nan), ValueError, "angle must be a number of at least 0, got nan"),
        (lambda: Relational(angle="2"), TypeError, "angle must be a number of at least 0, got '2'"),
        (lambda: Relational(0, 0), ValueError, "distance or angle must be above 0, got 0 for both"),
        (lambda: RelativeTriplet(0), ValueError, "margin must be a number above 0, got 0"),
        (lambda: RelativeTriplet(power=-1), ValueError, "power must be a number of at least 0, got -1"),
        (lambda: EmbeddingCosine(scale=-1), ValueError, "scale must be a number of at least 0, got -1"),
    ],
)
def test_settings_out_of_range(make, error, message):
    with pytest.raises(error) as found:
        make()
    assert str(found.value).startswith(message)


@every
def test_what_is_no_embedding(loss):
    maps, s = torch.zeros(6, 4, 2, 2), drawn(1)
    for call in (lambda a, b: loss(a, b, LABELS), lambda a, b: loss.adapter([a], [b])):
        with pytest.raises(ValueError, match=r"embeddings must be \(B, D\), got shape \(6, 4, 2, 2\) of the student; name"):
            call(maps, s)
        with pytest.raises(ValueError, match=r"got shape \(6, 4, 2, 2\) of the teacher"):
            call(s, maps)
        with pytest.raises(ValueError, match="embeddings must be of the same samples, got 6 and 5"):
            call(s, s[:5])


def test_dimensions_that_differ_without_an_adapter():
    with pytest.raises(ValueError, match=r"got \(6, 4\) of the student and \(6, 5\) of the teacher.*adapter"):
        EmbeddingCosine()(drawn(1), drawn(2, 5))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (None, "labels must be there for RelativeTriplet, got None"),
        (LABELS[:5], "labels must be .* class of each of the 6 samples .* got torch.int64 of shape \\(5,\\); mixed"),
        (torch.full((6,), 0.5), "got torch.float32 of shape \\(6,\\)"),
        (torch.rand(6, 3), "got torch.float32 of shape \\(6, 3\\)"),
        ([0, 1, 0, 2, 1, 0], "got \\[0, 1, 0, 2, 1, 0\\]"),
    ],
)
def test_labels_that_are_no_classes(labels, message):
    with pytest.raises(ValueError, match=message):
        RelativeTriplet()(drawn(1), drawn(2), labels)


def test_labels_may_be_a_column():
    s, t = drawn(1), drawn(2)
    assert torch.equal(RelativeTriplet()(s, t, LABELS[:, None]), RelativeTriplet()(s, t, LABELS))


def test_settings_are_shown():
    assert repr(Relational(angle=1)) == "Relational(scale=1.0, distance=1.0, angle=1)"
