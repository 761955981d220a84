"""The network as torch.export sees it: what is read, how often, and what training mode adds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fasterai.graph.exported import exported
from fasterai.prune.pruner import Pruner

X = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))


class Auxiliary(nn.Module):
    """A second head that runs in training alone."""

    def __init__(self, branches: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.aux, self.branches = nn.Linear(3, 8), nn.Linear(8, 2), nn.Linear(8, 4), branches

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        y = self.a(x).relu()
        if not self.training:
            return self.b(y)
        return self.b(y), self.aux(y if not self.branches or bool(y.sum() > 1e9) else y + 1)


def test_uses_are_counted() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.spare = nn.Linear(3, 4), nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(self.a(x), self.a.weight.t())

    (eval_mode,) = exported(Tied(), (X,))  # training reads no more
    assert dict(eval_mode.uses()) == {"a.weight": 2, "a.bias": 1}
    assert eval_mode.shared() == {"a.weight"}
    assert eval_mode.unread() == ["spare.weight", "spare.bias"]


def test_training_mode_is_followed_where_eval_mode_leaves_weights_out() -> None:
    (_, training_mode) = exported(Auxiliary(), (X,))
    assert training_mode.unread() == []
    assert len(exported(nn.Linear(3, 4), (X,))) == 1


def test_a_head_that_runs_in_training_alone_is_cut_with_what_it_reads() -> None:
    model = Auxiliary().eval()
    removal = Pruner(model, 0.5, "local", "large_final", example_inputs=X).prune_model()
    assert removal.removed == {"a.weight": (8, 4)}
    assert tuple(model.aux.weight.shape) == (4, 4)
    assert [tuple(y.shape) for y in model.train()(X)] == [(2, 2), (2, 4)]


def test_training_mode_that_cannot_be_followed_is_warned_of() -> None:
    with pytest.warns(
        UserWarning, match=r"2 parameters take no part in eval mode, such as aux.weight, and training mode cannot"
    ):
        assert len(exported(Auxiliary(branches=True), (X,))) == 1


def test_modes_and_buffers_stay_as_they_were() -> None:
    model = nn.ModuleDict({"a": nn.BatchNorm1d(3).eval(), "b": nn.Linear(3, 2)})
    model.forward = model["a"].forward
    exported(model, (X,))
    assert (model["a"].training, model["b"].training) == (False, True)
    assert not model["a"].running_mean.any()
    assert int(model["a"].num_batches_tracked) == 0


def test_noise_of_training_pins_nothing_where_training_reads_no_more() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.spare = nn.Linear(3, 8), nn.Linear(8, 2), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            return self.b(y * torch.empty_like(y).bernoulli_(0.9) if self.training else y)

    removal = Pruner(Noisy().eval(), 0.5, "local", "large_final", example_inputs=X).prune_model(measure=False)
    assert removal.removed == {"a.weight": (8, 4)}


def test_training_mode_is_followed_on_the_inputs_as_they_are_where_the_batch_is_fixed() -> None:
    class Fixed(Auxiliary):
        def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
            return super().forward(x.reshape(2, 3))

    assert len(exported(Fixed(), (X,))) == 2
