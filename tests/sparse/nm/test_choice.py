"""The N largest of every M: equal to context NM's choice, in every order of memory, and exact when put together again."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fasterai.core.contexts import NM
from fasterai.core.scores import TensorScores
from fasterai.model.targets import all_targets
from fasterai.sparse.nm import choice
from fasterai.sparse.nm.choice import groups_dim, keep_largest, split_

LAYERS = {
    "linear": lambda: nn.Linear(24, 5),
    "wide": lambda: nn.Linear(96, 3),
    "convolution": lambda: nn.Conv2d(24, 6, 3),
    "channels last": lambda: nn.Conv2d(24, 6, 3).to(memory_format=torch.channels_last),
    "grouped": lambda: nn.Conv2d(48, 6, 3, groups=2),
    "grouped, channels last": lambda: nn.Conv2d(48, 6, 3, groups=2).to(memory_format=torch.channels_last),
    "transposed": lambda: nn.ConvTranspose2d(24, 6, (2, 3)),
    "1d": lambda: nn.Conv1d(24, 4, 5),
    "3d": lambda: nn.Conv3d(24, 4, 2),
    "attention": lambda: nn.MultiheadAttention(24, 2),
}


def chosen_by_context(view: Tensor, dim: int, n: int, m: int) -> Tensor:
    return NM(n, m)._winners(TensorScores("", view.abs(), None), dim, nested=False)


@pytest.mark.parametrize("kind", LAYERS)
def test_the_choice_is_that_of_the_context_ties_included_and_the_parts_make_the_whole(kind, monkeypatch):
    """In pieces of one group, of a few, and of all, on numbers of which many are equal or of equal size."""
    torch.manual_seed(0)
    target = all_targets(LAYERS[kind]())[0]
    view = target.parameter.detach().view(target.layout.shape)
    dim = groups_dim(target.layout)
    for piece, (n, m), whole in (
        (1, (2, 4), False),
        (500, (1, 4), True),
        (500, (2, 8), True),
        (1 << 16, (3, 4), True),
        (1 << 16, (5, 24), False),
        (700, (1, 3), True),
    ):
        monkeypatch.setattr(choice, "PIECE", piece)
        view.normal_()
        if whole:
            view.mul_(2).round_()  # -2 ... 2: most groups have ties, and zeros of both signs
        before = view.clone()
        wanted = chosen_by_context(view, dim, n, m)
        torch.testing.assert_close(keep_largest(view, dim, n, m), wanted, rtol=0, atol=0)
        hidden, keep = torch.full_like(view, 7.0), torch.zeros_like(view, dtype=torch.bool)
        split_(view, hidden, keep, dim, n, m)
        assert torch.equal(keep, wanted)
        assert torch.equal(view, before * wanted)
        assert torch.equal(view + hidden, before)
        assert not torch.count_nonzero(view[~wanted])
        assert not torch.count_nonzero(hidden[wanted])


def test_by_hand():
    """(3, -1, 1, -4) keeps 3 and -4; of (1, 1, 1, 0) the last two ones stay; rows of a kernel are groups of their own."""
    weight = torch.tensor([[3.0, -1, 1, -4, 1, 1, 1, 0]])
    hidden, keep = torch.empty(1, 8), torch.empty(1, 8, dtype=torch.bool)
    split_(weight, hidden, keep, 1, 2, 4)
    assert weight.tolist() == [[3, 0, 0, -4, 0, 1, 1, 0]]
    assert hidden.tolist() == [[0, -1, 1, 0, 1, 0, 0, 0]]
    kernel = torch.tensor([[[1.0, 4.0], [2.0, 3.0], [3.0, 2.0], [4.0, 1.0]]])  # four inputs, two places
    assert keep_largest(kernel, 1, 1, 4).int().tolist() == [[[0, 1], [0, 0], [0, 0], [1, 0]]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types_and_large_groups(dtype):
    torch.manual_seed(0)
    weight = torch.randn(4, 160).to(dtype)
    for n, m in ((2, 4), (7, 80)):
        part, hidden, keep = weight.clone(), torch.empty_like(weight), torch.empty(weight.shape, dtype=torch.bool)
        split_(part, hidden, keep, 1, n, m)
        assert torch.equal(keep, chosen_by_context(weight.double(), 1, n, m))
        assert torch.equal(part + hidden, weight)
        assert (keep.view(4, -1, m).sum(-1) == n).all()


def test_gaps_in_memory_and_all_of_a_group():
    torch.manual_seed(0)
    wide = torch.randn(8, 48)
    weight = wide[:, ::2]
    before = weight.clone()
    hidden, keep = torch.empty_like(weight), torch.empty(8, 24, dtype=torch.bool)
    split_(weight, hidden, keep, 1, 2, 4)
    assert torch.equal(keep, chosen_by_context(before, 1, 2, 4))
    assert torch.equal(weight + hidden, before)
    split_(weight, hidden, keep, 1, 4, 4)
    assert keep.all()
    assert not hidden.any()
