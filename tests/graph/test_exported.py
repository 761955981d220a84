"""The network as torch.export sees it: what is read, how often, and what training mode adds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fasterai.graph.exported import exported
from fasterai.prune.pruner import Pruner
from fasterai.prune.removal import remove

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
        if self.branches:
            y = y.detach().requires_grad_() * (2 if bool(y.sum() > 1e9) else 1)
            (y,) = torch.autograd.grad(y.sum(), y)
        return self.b(y), self.aux(y)


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


class Heads(nn.Module):
    """Heads whose results only training returns; `how` says in which form."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.a, self.m, self.b, self.aux, self.how = nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 2), nn.Linear(8, 4), how
        self.aux2, self.norm = nn.Linear(4, 6), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        y = self.m(self.a(x).relu()).relu()
        aux = self.aux(y) if self.how != "features" else y
        if self.how == "activation":
            aux = aux.softmax(1)
        elif self.how == "in place":
            aux.relu_()
        elif self.how == "in place through a view":
            aux.view(-1, 2, 2)[:, 0].add_(1)
        elif self.how == "two layers":
            aux = self.aux2(aux.relu())
        elif self.how == "norm":
            aux = self.norm(aux)
        return (self.b(y), aux) if self.training else self.b(y)


HOWS = ("plain", "activation", "in place", "in place through a view", "two layers", "norm", "features")


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("batch", [1, 2])
def test_what_training_alone_returns_keeps_its_channels_and_its_values(how: str, batch: int) -> None:
    torch.manual_seed(0)
    model = Heads(how).eval()
    for module in (model.aux2, model.norm):  # parameters that no mode reads
        if module is not {"two layers": model.aux2, "norm": model.norm}.get(how):
            for parameter in module.parameters():
                parameter.requires_grad_(False)
    pruner = Pruner(model, 0.5, "local", "large_final", example_inputs=X[:batch])
    with torch.no_grad():
        sizes = [tuple(y.shape) for y in model.train()(X)]
    model.eval()
    removal = pruner.prune_model()
    assert removal.removed["a.weight"] == (8, 4)
    assert ("m.weight" in removal.removed) == (how != "features")
    assert "aux2.weight" not in removal.removed
    with torch.no_grad():
        assert [tuple(y.shape) for y in model.train()(X)] == sizes


def test_outputs_of_training_are_unchanged_by_a_removal() -> None:
    torch.manual_seed(0)
    model = Heads("plain").eval()
    with torch.no_grad():
        for layer in (model.a, model.m):
            layer.weight[4:], layer.bias[4:] = 0, 0
        model.aux.weight[2:], model.aux.bias[2:] = 0, 0  # silent outputs of the head: they are outputs all the same
        wanted = model.train()(X)
        removal = remove(model.eval(), X)
        assert removal.removed == {"a.weight": (8, 4), "m.weight": (8, 4)}
        for before, after in zip(wanted, model.train()(X), strict=True):
            torch.testing.assert_close(after, before)


def test_a_change_in_place_that_is_read_under_the_first_name_is_no_unused_result() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.scale, self.b = nn.Linear(3, 8), nn.Parameter(torch.ones(8)), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            y.relu_()
            y.view(-1, 8).mul_(self.scale)
            return self.b(y)

    (program,) = exported(InPlace(), (X,))
    assert program.idle_and_unused() == (set(), set())
