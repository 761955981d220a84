"""What becomes of a sparsifier's masks when channels are taken out of its model."""

import copy
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fasterai.callbacks.plain import attach
from fasterai.prune.removal import remove
from fasterai.sparse.sparsifier import Sparsifier
from tests.networks import residual

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def test_what_was_pruned_can_be_removed_without_the_outputs_moving():
    model = residual(width=16, inner=8)
    Sparsifier(model, "coupled", "global", "large_final", example_inputs=X).sparsify_model(0.5)
    model.eval()
    before = model(X)
    result = remove(model, X)
    assert sum(n - m for n, m in result.removed.values()) == 12
    assert not result.refused
    assert torch.allclose(model(X), before, rtol=0, atol=1e-5 * float(before.abs().max()))


@pytest.mark.parametrize("granularity", ["weight", "kernel", "filter", "row", "coupled"])
def test_masks_are_cut_with_the_weights(granularity):
    model = residual(8, 8)
    sparsifier = Sparsifier(model, granularity, "local", "movement", example_inputs=X, targets=["branch.0", "branch.3"])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    sparsifier.sparsify_model(0.5)
    masks = sparsifier.masks["branch.0.weight"]
    with torch.no_grad():
        model.branch[0].weight[[1, 5]] = 0
        model.branch[1].weight[[1, 5]] = 0
        model.branch[1].bias[[1, 5]] = 0
    result = remove(model.eval(), X)
    left = torch.as_tensor(result.plan.keep["branch.0.weight", 0])
    inputs = torch.as_tensor(result.plan.keep.get(("branch.0.weight", 1), np.arange(8)))
    after = sparsifier.masks["branch.0.weight"]
    assert len(left) <= 6
    assert torch.equal(after, masks[left][:, inputs])
    sparsifier.apply_masks()
    assert not model.branch[0].weight[~after].any()
    sparsifier.sparsify_model(0.75)
    assert sparsifier.report().together.units == sum(r.units for r in sparsifier.report().rows)


def test_masks_are_held_when_channels_go_under_way():
    model = residual(8, 8)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    sparsifier = Sparsifier(model, "weight", "global", "large_final")
    sparsifier.sparsify_model(0.5)
    sparsifier.hold(optimizer)
    with torch.no_grad():
        for parameter in (model.branch[0].weight, model.branch[1].weight, model.branch[1].bias):
            parameter[2:4] = 0
    model.eval()
    remove(model, X, optimizer=optimizer)
    assert model.branch[0].weight.shape[0] == 6
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(X), torch.tensor([0, 1])).backward()
        optimizer.step()
        for name, mask in sparsifier.masks.items():
            assert not model.get_parameter(name)[~mask].any()


def test_the_optimizer_of_an_earlier_run_goes_on_after_a_removal():
    """As in fastai, where a learner keeps its optimizer from one fit to the next and nobody hands it to `remove`."""
    model = residual(16, 8)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    sparsifier = Sparsifier(model, "coupled", "local", "large_final", sparsity=0.5, schedule="lin", example_inputs=X)
    with attach(optimizer, sparsifier, total_steps=6):
        for _ in range(6):
            optimizer.zero_grad()
            F.cross_entropy(model(X), torch.tensor([0, 1])).backward()
            optimizer.step()
    moments = {n: optimizer.state[p]["exp_avg"].clone() for n, p in model.named_parameters()}
    plan = remove(model.eval(), X).plan
    for name, parameter in model.named_parameters():
        left = moments[name]
        for d in range(left.dim()):
            if (name, d) in plan.keep:
                left = left[(slice(None),) * d + (torch.as_tensor(plan.keep[name, d]),)]
        assert torch.equal(optimizer.state[parameter]["exp_avg"], left), name
    optimizer.zero_grad()
    F.cross_entropy(model(X), torch.tensor([0, 1])).backward()
    optimizer.step()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
@pytest.mark.parametrize("granularity", ["filter", "coupled"])
def test_a_copy_follows_its_own_model(granularity, copied):
    model = residual(8, 8).eval()
    sparsifier = Sparsifier(model, granularity, "local", "movement", example_inputs=X, targets=["branch.0"])
    sparsifier.sparsify_model(0.5)
    other, others = copied((model, sparsifier))
    remove(other, X, measure=False)
    assert other.branch[0].weight.shape[0] < 8
    assert model.branch[0].weight.shape[0] == 8
    for one in (sparsifier, others):
        one.apply_masks()
        one.sparsify_model(0.25)


@pytest.mark.parametrize("granularity", ["weight", "filter", "coupled"])
def test_layers_that_were_taken_off_or_folded_do_not_hinder_a_removal(granularity):
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 8), nn.Linear(8, 5)),
    ).eval()
    sparsifier = Sparsifier(model, granularity, example_inputs=X, targets=["0", "3", "7"] if granularity != "filter" else None)
    sparsifier.sparsify_model(0.5)
    with torch.no_grad():
        for parameter in model[0].parameters():
            parameter[:2] = 0
    model[1], model[8] = nn.Identity(), nn.Identity()
    if granularity != "filter":
        model[7] = nn.Identity()
    assert remove(model, X, measure=False).removed
    sparsifier.apply_masks()
    sparsifier.sparsify_model(0.75)
    assert "7.weight" not in sparsifier.masks


class Holder(nn.Module):
    """Holds a sparsifier of itself, which a copy of it meets before it is complete."""

    def __init__(self) -> None:
        super().__init__()
        self.net = residual(8, 8)
        self.sparsifiers = [Sparsifier(self, "weight")]

    def forward(self, x):
        return self.net(x)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_model_that_holds_its_sparsifier_can_be_copied(copied):
    other = copied(Holder().eval())
    other.sparsifiers[0].sparsify_model(0.5)
    with torch.no_grad():
        other.net.branch[3].weight[:, :2] = 0
    assert remove(other, X, measure=False).removed
    other.sparsifiers[0].apply_masks()
