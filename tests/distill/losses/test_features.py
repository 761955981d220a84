from __future__ import annotations

from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fasterai.distill.losses import features
from fasterai.distill.losses.adapters import Generators
from fasterai.distill.losses.features import MGD, ActivationBoundaries, Attention, Contrastive, FitNet, ReviewKD, Similarity
from fasterai.distill.losses.loss import FeatureLoss
from fasterai.distill.losses.shapes import UnlikeShapesError

LOSSES = {
    "ActivationBoundaries": ActivationBoundaries(),
    "Attention": Attention(),
    "Contrastive": Contrastive(dim=8),
    "FitNet": FitNet(),
    "MGD": MGD(ratio=0),
    "ReviewKD": ReviewKD(),
    "Similarity": Similarity(),
}
#: Shapes of the student's and the teacher's features: like ones, then ones of other channels and sizes.
SHAPES = {
    "images": ((4, 3, 6, 6), (4, 3, 6, 6)),
    "other images": ((4, 3, 6, 4), (4, 5, 3, 8)),
    "volumes": ((4, 3, 2, 2, 4), (4, 2, 4, 4, 2)),
    "tokens": ((4, 6, 3), (4, 6, 5)),
    "tokens beside images": ((4, 10, 3), (4, 5, 3, 3)),
    "images beside tokens": ((4, 3, 4, 4), (4, 9, 5)),
}
VECTORS = ("ActivationBoundaries", "Contrastive", "FitNet", "ReviewKD", "Similarity")
CASES = [(name, *shapes) for name in LOSSES for shapes in SHAPES.values()] + [(name, (4, 3), (4, 5)) for name in VECTORS]


def random(*shapes: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def value(loss: FeatureLoss, student: Any, teacher: Any, labels: Tensor | None = None) -> Tensor:
    """The loss with an adapter of its own."""
    torch.manual_seed(0)
    one, other = ([x] if isinstance(x, Tensor) else x for x in (student, teacher))
    return loss(student, teacher, labels, loss.adapter(one, other))


def arrays(*tensors: Tensor) -> list[Any]:
    return [x.double().numpy() for x in tensors]


def unit(rows: Any) -> Any:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_every_entry_has_a_case():
    assert sorted(LOSSES) == sorted(features.__all__)


@pytest.mark.parametrize(("name", "own", "other"), CASES)
def test_gradients_reach_the_student_and_the_adapter_and_not_the_teacher(name, own, other):
    loss = LOSSES[name]
    student, teacher = (x.requires_grad_() for x in random(own, other))
    adapter = loss.adapter([student], [teacher])
    result = loss(student, teacher, None, adapter)
    result.backward()
    assert result.dtype == torch.float32
    assert result.dim() == 0
    assert torch.isfinite(result)
    assert student.grad is not None
    assert bool(student.grad.any())
    assert teacher.grad is None
    for part, p in adapter.named_parameters() if adapter is not None else ():
        assert p.grad is not None, part
        # What shifts a map of one place as a whole, the norm behind it takes out again.
        assert bool(p.grad.any()) or (part.startswith("inner") and part.endswith("bias") and len(own) == 2), part


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_features_of_half_precision(name, dtype):
    half = [x.to(dtype) for x in random((4, 3, 6, 6), (4, 5, 3, 3))]
    assert torch.equal(value(LOSSES[name], *half), value(LOSSES[name], *(x.float() for x in half)))


@pytest.mark.parametrize("name", LOSSES)
def test_features_of_another_memory_format(name):
    plain = random((4, 3, 6, 6), (4, 5, 3, 3))
    last = [x.contiguous(memory_format=torch.channels_last) for x in plain]
    torch.testing.assert_close(value(LOSSES[name], *last), value(LOSSES[name], *plain))


@pytest.mark.parametrize("name", LOSSES)
def test_the_order_of_the_batch_does_not_matter(name):
    student, teacher = random((4, 3, 6, 6), (4, 5, 3, 3))
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(value(LOSSES[name], student[order], teacher[order]), value(LOSSES[name], student, teacher))


@pytest.mark.parametrize("name", [n for n in LOSSES if n != "ReviewKD"])
def test_pairs_are_added_up_as_given(name):
    """One teacher's layer stands for two students', and in another order than the layers run."""
    a, b, t = random((4, 3, 6, 6), (4, 3, 6, 6), (4, 3, 6, 6))
    loss = LOSSES[name]
    torch.manual_seed(0)
    adapter = loss.adapter([b, a], [t, t])
    both = loss([b, a], [t, t], None, adapter)
    single = [None if adapter is None else alone(adapter, i) for i in (0, 1)]
    torch.testing.assert_close(both, loss(b, t, None, single[0]) + loss(a, t, None, single[1]))
    assert not torch.allclose(both, loss([a, b], [t, a], None, adapter))


def alone(adapter: nn.Module, index: int) -> Any:
    """The part of an adapter that one of two pairs has."""
    part = deepcopy(adapter)
    for child in part.children():
        if isinstance(child, nn.ModuleList):
            del child[1 - index]
    return part


@pytest.mark.parametrize("name", LOSSES)
def test_scale_is_a_factor(name):
    student, teacher = random((4, 3, 6, 6), (4, 5, 3, 3))
    scaled = type(LOSSES[name])(**{**vars(LOSSES[name]), "scale": 3.0})
    torch.testing.assert_close(value(scaled, student, teacher), 3 * value(LOSSES[name], student, teacher))


@pytest.mark.parametrize("loss", [FitNet(), Attention(), Similarity()])
def test_equal_features_have_no_loss(loss):
    (x,) = random((4, 3, 6, 6))
    assert float(value(loss, x, x.clone())) == 0.0


# --- values ------------------------------------------------------------------------------------------------------------


def test_fitnet_is_the_mean_square():
    student, teacher = torch.tensor([[[[1.0, 2]]]]), torch.tensor([[[[3.0, 1]]]])
    assert float(FitNet()(student, teacher)) == 2.5  # (4 + 1) / 2


def test_fitnet_projects_channels():
    student, teacher = random((4, 3, 6, 6), (4, 5, 6, 6))
    adapter = FitNet().adapter([student], [teacher])
    layer = adapter.layers["0"]
    s, t, w, b = arrays(student, teacher, layer.weight.detach()[:, :, 0, 0], layer.bias.detach())
    expected = np.mean((np.einsum("oc,bchw->bohw", w, s) + b[:, None, None] - t) ** 2)
    assert FitNet()(student, teacher, None, adapter).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("p", [1, 2, 3.5])
def test_attention(p):
    student, teacher = random((4, 3, 6, 5), (4, 7, 6, 5))
    s, t = (unit((np.abs(x) ** p).sum(1).reshape(4, -1)) for x in arrays(student, teacher))
    assert float(Attention(p)(student, teacher)) == pytest.approx(np.mean((s - t) ** 2), rel=1e-5)


def test_attention_of_tokens_is_that_of_their_map():
    student, teacher = random((4, 9, 3), (4, 9, 5))
    maps = [x.transpose(1, 2).reshape(4, -1, 3, 3) for x in (student, teacher)]
    torch.testing.assert_close(Attention()(student, teacher), Attention()(*maps))
    torch.testing.assert_close(Attention()(student, maps[1]), Attention()(*maps))


@pytest.mark.parametrize("shapes", [((4, 3, 6, 5), (4, 7, 2, 2)), ((4, 6), (4, 9, 2)), ((4, 3), (4, 7))])
def test_similarity(shapes):
    student, teacher = random(*shapes)
    s, t = (unit(x.reshape(4, -1) @ x.reshape(4, -1).T) for x in arrays(student, teacher))
    assert float(Similarity()(student, teacher)) == pytest.approx(((s - t) ** 2).sum() / 16, rel=1e-5)


def test_activation_boundaries_by_hand():
    """Margin 2: 3 is past it; 1 lacks 1; -1, which should be 2, lacks 3; 1, which should be -2, is 3 past; -3 is fine."""
    student = torch.tensor([[3.0, 1, -1, 1, -3]])
    teacher = torch.tensor([[0.1, 5, 1, -1, 0]])
    assert float(ActivationBoundaries()(student, teacher)) == pytest.approx((0 + 1 + 9 + 9 + 0) / 5)
    assert float(ActivationBoundaries(m=1)(student, teacher)) == pytest.approx((0 + 0 + 4 + 4 + 0) / 5)


@pytest.mark.parametrize("labels", [None, torch.tensor([0, 1, 0, 2]), torch.rand(4, 3), torch.tensor([0.0, 1, 0, 2])])
def test_contrast_within_a_batch(labels):
    student, teacher = random((4, 3, 6, 6), (4, 9, 5))
    loss = Contrastive(dim=8, temperature=0.5)
    adapter = loss.adapter([student], [teacher])
    own, other = adapter.students[0], adapter.teachers[0]
    s, t, ws, bs, wt, bt = arrays(student, teacher, *(p.detach() for layer in (own, other) for p in layer.parameters()))
    z, w = unit(s.mean((2, 3)) @ ws.T + bs), unit(t.mean(1) @ wt.T + bt)
    near = np.exp(z @ w.T / 0.5)
    if labels is not None and labels.dtype == torch.int64:
        near[[0, 2], [2, 0]] = 0  # the two samples of class 0
    expected = -np.log(np.diag(near) / near.sum(1)).mean() / 2 - np.log(np.diag(near) / near.sum(0)).mean() / 2
    assert loss(student, teacher, labels, adapter).item() == pytest.approx(expected, rel=1e-5)


def test_contrast_of_one_sample_is_nothing():
    assert value(Contrastive(), *random((1, 3), (1, 5))).item() == 0.0


def test_masked_generation():
    student, teacher = random((4, 3, 6, 6), (4, 5, 6, 6))
    loss = MGD(ratio=0.5)
    adapter = loss.adapter([student], [teacher])
    torch.manual_seed(3)
    found = loss(student, teacher, None, adapter)
    torch.manual_seed(3)
    mask = torch.rand(4, 5, 1, 1) >= 0.5
    first, _, second = adapter.generators[0]
    projected = F.conv2d(student, adapter.layers["0"].weight, adapter.layers["0"].bias) * mask
    hidden = F.conv2d(projected, first.weight, first.bias, padding=1).clamp(min=0)
    expected = (F.conv2d(hidden, second.weight, second.bias, padding=1) - teacher).square().sum() / teacher.numel()
    torch.testing.assert_close(found, expected)
    torch.manual_seed(4)
    assert loss(student, teacher, None, adapter).item() != found.item()


@pytest.mark.parametrize(("ratio", "hidden"), [(0.0, 0.0), (0.3, 0.3), (1.0, 1.0)])
def test_the_share_of_hidden_channels(ratio, hidden):
    adapter = Generators([torch.zeros(1, 4, 1)], [torch.zeros(1, 4, 1)])
    adapter.generators[0] = nn.Identity()
    torch.manual_seed(0)
    out = adapter(0, torch.ones(1000, 4, 2), ratio)
    assert float((out == 0).float().mean()) == pytest.approx(hidden, abs=0.03)
    assert torch.equal(out[..., 0], out[..., 1])


def pooled(x: Any, size: int) -> Any:
    """Averages over a grid: for sizes that it divides."""
    b, c, h, w = x.shape
    return x.reshape(b, c, size, h // size, size, w // size).mean((3, 5))


@pytest.mark.parametrize(
    ("size", "shares"), [(8, {4: 1 / 2, 2: 1 / 4, 1: 1 / 8}), (4, {2: 1 / 2, 1: 1 / 4}), (2, {1: 1 / 2}), (1, {})]
)
def test_hierarchical_context(size, shares):
    s, t = random((4, 3, size, size), (4, 3, size, size))
    a, b = arrays(s, t)
    expected = np.mean((a - b) ** 2) + sum(x * np.mean((pooled(a, n) - pooled(b, n)) ** 2) for n, x in shares.items())
    assert float(ReviewKD().of_maps(0, s, t, None)) == pytest.approx(expected / (1 + sum(shares.values())), rel=1e-5)


def normed(x: Any) -> Any:
    """Batch norm of fresh layers: no scale, no shift."""
    return (x - x.mean((0, 2, 3), keepdims=True)) / np.sqrt(x.var((0, 2, 3), keepdims=True) + 1e-5)


def larger(x: Any, factor: int) -> Any:
    return x.repeat(factor, 2).repeat(factor, 3)


def test_review_fuses_from_the_last_to_the_first():
    """Two pairs by numpy: attention between a map and the one behind it, then a convolution of 3."""
    students, teachers = random((4, 3, 8, 8), (4, 6, 2, 2)), random((4, 5, 8, 8), (4, 7, 4, 4), seed=1)
    loss = ReviewKD(middle=4)
    torch.manual_seed(0)
    adapter = loss.adapter(students, teachers)
    fused = adapter(students, teachers)
    first, last = (
        normed(np.einsum("oc,bchw->bohw", *arrays(layer[0].weight.detach()[..., 0, 0], x)))
        for layer, x in zip(adapter.inner, students, strict=True)
    )
    behind = larger(last, 2)  # to the teacher's 4 x 4
    w, b = arrays(*(p.detach() for p in adapter.weights[0][0].parameters()))
    shares = 1 / (
        1 + np.exp(-np.einsum("oc,bchw->bohw", w[..., 0, 0], np.concatenate([first, larger(behind, 2)], 1)) - b[:, None, None])
    )
    mixed = first * shares[:, :1] + larger(behind, 2) * shares[:, 1:]
    for found, layer, x in zip(fused, adapter.outer, (mixed, behind), strict=True):
        expected = normed(F.conv2d(torch.tensor(x), layer[0].weight.double(), padding=1).detach().numpy())
        np.testing.assert_allclose(found.detach().numpy(), expected, atol=1e-4)
    found = loss(students, teachers, None, adapter).item()
    assert found == pytest.approx(sum(loss.of_maps(0, s, t, None).item() for s, t in zip(fused, teachers, strict=True)))


def test_review_takes_vectors_as_maps_of_one_place():
    students, teachers = random((4, 3, 4, 4), (4, 6)), random((4, 5, 4, 4), (4, 7), seed=1)
    maps = (
        [x if x.dim() > 2 else x[..., None, None] for x in students],
        [x if x.dim() > 2 else x[..., None, None] for x in teachers],
    )
    assert torch.equal(value(ReviewKD(), students, teachers), value(ReviewKD(), *maps))


# --- for all inputs ----------------------------------------------------------------------------------------------------

SEEDS = st.integers(0, 10_000)


@settings(max_examples=25, deadline=None)
@given(seed=SEEDS, factor=st.floats(1e-2, 1e2), p=st.sampled_from([1.0, 2.0, 3.0]))
def test_attention_does_not_see_the_size_of_features(seed, factor, p):
    student, teacher = random((3, 4, 5, 5), (3, 2, 5, 5), seed=seed)
    torch.testing.assert_close(Attention(p)(factor * student, teacher), Attention(p)(student, teacher), rtol=1e-3, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(seed=SEEDS, factor=st.floats(1e-1, 1e1))
def test_similarity_does_not_see_a_rotation_of_channels(seed, factor):
    student, teacher, square = random((3, 4, 5, 5), (3, 2, 5, 5), (4, 4), seed=seed)
    turned = factor * torch.einsum("oc,bchw->bohw", torch.linalg.qr(square)[0], student)
    torch.testing.assert_close(Similarity()(turned, teacher), Similarity()(student, teacher), rtol=1e-3, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(seed=SEEDS, past=st.floats(0, 10), m=st.floats(0.1, 4))
def test_activation_boundaries_that_are_kept_cost_nothing(seed, past, m):
    (teacher,) = random((3, 4, 2, 2), seed=seed)
    assert float(ActivationBoundaries(m)(torch.where(teacher > 0, m + past, -m - past), teacher)) == 0.0


# --- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
def test_unequal_numbers_of_features_are_refused(name):
    x, y = random((4, 3, 6, 6), (4, 3, 6, 6))
    with pytest.raises(ValueError, match=r"features must be as many of the student as of the teacher, .* got 2 and 1"):
        value(LOSSES[name], [x, y], [x])
    with pytest.raises(ValueError, match="at least one, got 0 and 0"):
        value(LOSSES[name], [], [])


@pytest.mark.parametrize("name", LOSSES)
def test_unequal_batches_are_refused(name):
    with pytest.raises(UnlikeShapesError, match=r"got \(4, 3, 6, 6\) of the student and \(3, 3, 6, 6\)"):
        value(LOSSES[name], *random((4, 3, 6, 6), (3, 3, 6, 6)))


@pytest.mark.parametrize("loss", [FitNet(), ActivationBoundaries()])
@pytest.mark.parametrize("channels", [1, 3])
def test_channels_are_never_broadcast(loss, channels):
    """A map of one channel beside one of several would fit for torch."""
    with pytest.raises(UnlikeShapesError, match=r"pass the adapter that the loss makes"):
        loss(*random((4, channels, 6, 6), (4, 5, 6, 6)))


@pytest.mark.parametrize("name", ["Contrastive", "MGD", "ReviewKD"])
def test_losses_that_always_have_an_adapter_ask_for_it(name):
    with pytest.raises(ValueError, match=f"adapter must be that of {name}, .* got None; pass adapter=loss.adapter"):
        LOSSES[name](*random((4, 3, 6, 6), (4, 3, 6, 6)))


@pytest.mark.parametrize("loss", [Attention(), MGD()])
def test_vectors_have_no_places(loss):
    with pytest.raises(UnlikeShapesError, match="name layers whose outputs have places"):
        value(loss, *random((4, 3), (4, 3)))


def test_review_refuses_maps_of_several_dimensions():
    one, other = random((4, 3, 6, 6), (4, 9, 3))
    with pytest.raises(UnlikeShapesError, match=r"pair 1 .* others have 2 dimensions of places"):
        value(ReviewKD(), [one, other], [one, other])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Attention(p=0.5), "p must be a number of at least 1, got 0.5"),
        (lambda: Similarity(p=0), "p must be a number of at least 1, got 0"),
        (lambda: ActivationBoundaries(m=-1), "m must be a number of at least 0, got -1"),
        (lambda: Contrastive(dim=0), "dim must be at least 1, got 0"),
        (lambda: Contrastive(temperature=0), "temperature must be a number above 0, got 0"),
        (lambda: ReviewKD(middle=0), "middle must be at least 1, got 0"),
        (lambda: MGD(ratio=15), "ratio must be in .0, 1., got 15; pass 0.15"),
        (lambda: FitNet(scale=-1), "scale must be a number of at least 0, got -1"),
        (lambda: MGD(scale=-1), "scale must be a number of at least 0, got -1"),
    ],
)
def test_settings_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("name", LOSSES)
def test_shapes_are_checked_before_anything_is_compared(name):
    """An adapter is asked for with the first batch, before the run changes anything."""
    student, teacher = random((4, 3, 6, 6), (3, 3, 6, 6))
    with pytest.raises(UnlikeShapesError, match=r"features of pair 1 must be"):
        LOSSES[name].adapter([student, student], [student, teacher])
