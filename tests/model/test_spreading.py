from __future__ import annotations

import pytest
import torch

from fasterai.model.spreading import put_back, taken_out


@pytest.mark.parametrize(("d", "shape"), [(1, (2, 3)), (2, (3, 2)), (3, (3, 4, 2)), (1, (3,))])
def test_what_is_put_back_stands_among_zeros_and_is_taken_out_again(d: int, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, requires_grad=True)
    wide = put_back(x, d, 5, (0, 2, 3))
    expected = torch.zeros([5 if i == len(shape) - d else n for i, n in enumerate(shape)])
    expected.movedim(-d, 0)[[0, 2, 3]] = x.detach().movedim(-d, 0)
    assert torch.equal(wide, expected) and torch.equal(taken_out(wide, d, (0, 2, 3)), x)
    wide.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
