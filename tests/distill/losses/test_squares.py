from __future__ import annotations

import pytest
import torch

from fasterai.distill.losses.features import MGD, FitNet
from fasterai.distill.losses.squares import mean_square


@pytest.mark.parametrize("dim", [None, 0, 1, 3, -1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_mean_of_squares_and_its_gradient(dim, dtype):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, 5, dtype=dtype, requires_grad=True)
    plain = x.square().mean() if dim is None else x.square().mean(dim)
    found = mean_square(x, dim)
    weights = torch.randn(plain.shape, dtype=dtype)
    assert torch.equal(found, plain)
    own, expected = (torch.autograd.grad(value, x, weights)[0] for value in (found, plain))
    torch.testing.assert_close(own, expected)


def test_values_by_hand():
    x = torch.tensor([[1.0, -2.0], [3.0, 0.0]], requires_grad=True)
    mean_square(x).backward()
    assert x.grad.tolist() == [[0.5, -1.0], [1.5, 0.0]]  # 2 x / 4
    assert mean_square(x, 1).tolist() == [2.5, 4.5]


@pytest.mark.parametrize("dim", [None, 1])
def test_gradients_of_gradients(dim):
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: mean_square(x, dim), x)
    assert torch.autograd.gradgradcheck(lambda x: mean_square(x, dim), x)


def test_what_is_squared_is_all_that_is_kept():
    x, kept = torch.randn(8, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one) or one, lambda one: one):
        mean_square(x)
    assert [one.data_ptr() for one in kept] == [x.data_ptr()]


def test_the_memory_format_stays():
    x = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last).requires_grad_()
    mean_square(x).backward()
    assert x.grad.is_contiguous(memory_format=torch.channels_last)


def test_it_can_be_mapped():
    x = torch.randn(4, 3)
    torch.testing.assert_close(torch.vmap(mean_square)(x), x.square().mean(1))


@pytest.mark.parametrize("loss", [FitNet(), MGD(ratio=0)])
def test_of_two_maps_only_their_difference_is_kept(loss):
    """The teacher's map is not kept beside what the adapter has made of the student's."""
    student, teacher = torch.randn(2, 3, 4, 4, requires_grad=True), torch.randn(2, 7, 4, 4)
    before, adapter, kept = teacher.clone(), loss.adapter([student], [teacher]), set()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.add(x.data_ptr()) or x, lambda x: x):
        loss(student, teacher, None, adapter)
    assert teacher.data_ptr() not in kept
    assert torch.equal(teacher, before)
