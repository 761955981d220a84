"""Running a model without leaving traces in it."""

from __future__ import annotations

import torch
from torch import nn

from fasterai.core.undisturbed import evaluating, in_mode, undisturbed, without_fast_path


def test_fused_attention_comes_back() -> None:
    before = torch.backends.mha.get_fastpath_enabled()
    with without_fast_path():
        assert not torch.backends.mha.get_fastpath_enabled()
    assert torch.backends.mha.get_fastpath_enabled() == before


def net() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    model[1].eval()
    return model


def test_every_module_comes_back_in_its_own_mode() -> None:
    model = net()
    with evaluating(model):
        assert not any(m.training for m in model.modules())
    assert [m.training for m in model.modules()] == [True, True, False]
    with in_mode(model, True):
        assert all(m.training for m in model.modules())
    assert [m.training for m in model.modules()] == [True, True, False]


def test_random_numbers_go_on_as_if_none_had_been_drawn() -> None:
    model = net()
    torch.manual_seed(0)
    wanted = torch.rand(3)
    torch.manual_seed(0)
    with undisturbed(model):
        torch.rand(7)
    assert torch.equal(torch.rand(3), wanted)
