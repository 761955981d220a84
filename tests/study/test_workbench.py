"""Networks, training loop and accuracy of the studies."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from torch import nn

from fasterai.core.participant import Participant
from fasterai.sparse.sparsifier import Sparsifier
from fasterai.study.data import Data, load_data
from fasterai.study.sizes import SIZES, Size
from fasterai.study.workbench import Residual, accuracy, make_mlp, make_residual, train


@pytest.fixture(scope="module")
def digits() -> Data:
    return load_data(None, Size("own", 600, 200, 8, epochs=1))


def weights(network: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in network.parameters()])


def data_of(images: torch.Tensor, labels: torch.Tensor, flip: bool = False) -> Data:
    return Data((images, labels), (images, labels), tuple("abc"), flip, "own", "own")


def test_the_residual_network_has_77_thousand_weights():
    network = make_residual(data_of(torch.zeros(1, 3, 16, 16), torch.zeros(1, dtype=torch.long)))
    convolutions = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d)]
    by_hand = 9 * (3 * 16 + 16 * 16 * 2 + 16 * 32 + 32 * 32 + 32 * 64 + 64 * 64) + 16 * 32 + 32 * 64
    assert sum(layer.weight.numel() for layer in convolutions) == by_hand == 76_720
    assert network(torch.zeros(2, 3, 16, 16)).shape == (2, 3)


def test_a_residual_block_adds_what_it_was_given():
    block = Residual(2, 2, 1).eval()
    nn.init.zeros_(block.conv2.weight)
    x = torch.randn(1, 2, 4, 4)
    assert torch.equal(block(x), x.relu())


def test_the_mlp_has_the_layers_asked_for(digits):
    shapes = [tuple(p.shape) for p in make_mlp(digits, (20, 30)).parameters() if p.ndim == 2]
    assert shapes == [(20, 64), (30, 20), (10, 30)]


@pytest.mark.parametrize("make", [make_residual, make_mlp])
def test_a_network_learns_the_digits(digits, make):
    torch.manual_seed(0)
    network = make(digits)
    before = accuracy(network, digits)
    train(network, digits, epochs=4, lr=0.1, seed=0, batch_size=32)
    assert before < 0.4
    assert accuracy(network, digits) > 0.8


def test_equal_seeds_train_equal_bits_and_other_seeds_others(digits):
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(0)
        network = make_mlp(digits)
        train(network, digits, epochs=1, lr=0.1, seed=seed)
        found.append(weights(network))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_participants_take_part_and_see_the_batches(digits):
    class Seeing(Participant):
        batches: ClassVar[list] = []

        def after_loss(self, loss, batch):
            self.batches.append((len(batch.inputs[0]), len(batch.targets[0]), tuple(batch.outputs.shape)))
            return loss

    network = make_mlp(digits)
    sparsifier = Sparsifier(network, sparsity=0.8)
    train(network, digits, [sparsifier, Seeing()], epochs=1, lr=0.1, seed=0, batch_size=200)
    assert Seeing.batches == [(200, 200, (200, 10))] * 3
    assert sparsifier.sparsity.overall == pytest.approx(0.8, abs=1e-3)
    assert float((network[1].weight == 0).float().mean()) == pytest.approx(0.8, abs=1e-3)


def test_images_are_mirrored_where_that_is_no_other_class():
    seen = []
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    network[0].register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].clone()))
    images, labels = torch.arange(64.0).reshape(16, 1, 2, 2), torch.zeros(16, dtype=torch.long)
    for flip in (False, True):
        train(network, data_of(images, labels, flip), epochs=1, lr=1e-6, seed=0, batch_size=16)
    plain, mirrored = seen
    turned = (plain != mirrored).flatten(1).any(1)
    assert torch.equal(torch.where(turned[:, None, None, None], plain.flip(3), plain), mirrored)
    assert 0 < int(turned.sum()) < 16


def test_what_is_left_of_an_epoch_is_dropped_unless_that_were_all():
    counts = []
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    network[0].register_forward_hook(lambda module, inputs, output: counts.append(len(inputs[0])))
    data = data_of(torch.zeros(10, 1, 2, 2), torch.zeros(10, dtype=torch.long))
    train(network, data, epochs=1, lr=0.1, seed=0, batch_size=4)
    train(network, data, epochs=1, lr=0.1, seed=0, batch_size=64)
    assert counts == [4, 4, 10]


def test_accuracy_is_the_share_of_right_ones_in_eval_mode():
    class Named(nn.Module):
        def forward(self, x):
            assert not self.training
            return torch.nn.functional.one_hot(x[:, 0, 0, 0].long(), 3).float()

    images = torch.tensor([0.0, 1.0, 2.0, 2.0]).reshape(4, 1, 1, 1)
    assert accuracy(Named().train(), data_of(images, torch.tensor([0, 1, 2, 0]))) == 0.75


def test_the_tiny_size_trains_in_a_moment():
    data = load_data(None, SIZES["tiny"])
    train(make_residual(data), data, epochs=1, lr=0.1, seed=0, batch_size=32)
