from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Subset, TensorDataset

from fasterai.cli.data import Data
from fasterai.cli.errors import UsageError
from fasterai.cli.training import Recipe, Training, augment, evaluate, learning_rate, shuffled
from fasterai.sparse.sparsifier import Sparsifier


@pytest.mark.parametrize(("position", "expected"), [
    (0.0, 0.04), (0.125, 0.52), (0.25, 1.0), (0.625, 0.500005), (1.0, 1e-5),
])  # fmt: skip
def test_learning_rate_by_hand(position: float, expected: float) -> None:
    assert learning_rate(1.0, position) == pytest.approx(expected, rel=1e-9)
    assert learning_rate(3e-3, position) == pytest.approx(3e-3 * expected, rel=1e-9)


@pytest.mark.parametrize("batch_size", [2, 3, 7, 64])
@pytest.mark.parametrize("count", [2, 3, 5, 7, 8, 22, 65])
def test_batches_hold_every_number_once_and_never_one_alone(count: int, batch_size: int) -> None:
    batches = shuffled(count, batch_size, torch.Generator().manual_seed(0))
    sizes = [len(batch) for batch in batches]
    assert sorted(torch.cat(batches).tolist()) == list(range(count))
    assert min(sizes) >= 2
    assert max(sizes) - min(sizes) <= 1
    assert max(sizes) <= batch_size + 1


def test_a_batch_is_as_large_as_asked() -> None:
    assert [len(batch) for batch in shuffled(21, 8, torch.Generator())] == [7, 7, 7]
    assert [len(batch) for batch in shuffled(3, 2, torch.Generator())] == [3]


def test_order_follows_the_generator() -> None:
    orders = [torch.cat(shuffled(50, 8, torch.Generator().manual_seed(seed))).tolist() for seed in (0, 0, 1)]
    assert orders[0] == orders[1]
    assert orders[0] != orders[2]


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("crop", [False, True])
def test_augmented_images_are_shifts_and_mirrors(crop: bool, flip: bool) -> None:
    images = torch.arange(1.0, 200 * 2 * 64 + 1).view(200, 2, 8, 8)
    before = images.clone()
    found = augment(images, torch.Generator().manual_seed(0), crop=crop, flip=flip).numpy()

    seen = set()
    for i, image in enumerate(images.numpy()):
        pad = 1 if crop else 0  # an eighth of 8
        padded = np.pad(image, ((0, 0), (pad, pad), (pad, pad)))
        for y in range(2 * pad + 1):
            for x in range(2 * pad + 1):
                window = padded[:, y : y + 8, x : x + 8]
                for mirrored in (False, True):
                    if np.array_equal(found[i], window[:, :, ::-1] if mirrored else window):
                        seen.add((i, y, x, mirrored))
    assert len({i for i, *_ in seen}) == 200
    assert len({tuple(rest) for _, *rest in seen}) == (9 if crop else 1) * (2 if flip else 1)
    assert torch.equal(images, before)


class Says(nn.Module):
    """Says the class that is written into the pixel."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert not self.training
        return 100.0 * nn.functional.one_hot((x.flatten(1)[:, 0] * 255).round().long(), 3).float()


def tiny_data(labels: list[int], pixels: torch.Tensor, valid: int) -> Data:
    images, rows = TensorDataset(pixels, torch.tensor(labels)), range(len(labels))
    return Data(
        Subset(images, rows[:-valid]),
        Subset(images, rows[-valid:]),
        ("a", "b", "c"),
        (0.0,) * pixels.shape[1],
        (1.0,) * pixels.shape[1],
        pixels.shape[-1],
        "",
    )


def recipe(**changes) -> Recipe:
    settings = {"epochs": 2, "batch_size": 3, "lr": 1e-2, "seed": 0, "device": torch.device("cpu")}
    return Recipe(**(settings | changes))


def test_accuracy_counts_every_image_once() -> None:
    said = torch.tensor([0, 0, 1, 2, 0, 1, 2, 2], dtype=torch.uint8).view(-1, 1, 1, 1)
    data = tiny_data([0, 0, 1, 2, 0, 1, 1, 2], said, valid=7)
    accuracy, loss = evaluate(Says(), data, data.valid, recipe())
    assert accuracy == pytest.approx(6 / 7)
    assert loss == pytest.approx(100 / 7)


def noise(count: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.2), nn.Flatten(), nn.Linear(144, 3))


def test_training_lowers_the_loss_and_notes_every_epoch() -> None:
    data = tiny_data([0, 1, 2] * 8, noise(24), valid=6)
    training = Training(network(), data, recipe(epochs=12, crop=False, flip=False), None, "dense")
    while not training.is_done:
        training.run_epoch()
    assert [epoch["epoch"] for epoch in training.history] == list(range(1, 13))
    assert training.history[-1]["loss"] < 0.5 * training.history[0]["loss"]
    assert training.step == 12 * 6
    assert training.seconds > 0


@pytest.mark.parametrize("criteria", ["large_final", "taylor", "wanda", "grasp", "snip", "synflow", "updating_movement"])
def test_sparse_training_ends_at_the_sparsity_whatever_the_criterion_reads(criteria: str) -> None:
    model = network()
    sparsifier = Sparsifier(
        model,
        "weight",
        "global",
        criteria,
        sparsity=0.75,
        loss=nn.functional.cross_entropy,
        example_inputs=torch.zeros(2, 3, 8, 8),
    )
    training = Training(model, tiny_data([0, 1, 2] * 4, noise(12), valid=3), recipe(), sparsifier, "sparse")
    while not training.is_done:
        training.run_epoch()
    training.finish()

    # 4x3x3x3 + 3x144 = 540 weights, of which 405 go.
    assert sum(int((~mask).sum()) for mask in sparsifier.masks.values()) == 405
    assert all(bool((p[~sparsifier.masks[n]] == 0).all()) for n, p in model.named_parameters() if n in sparsifier.masks)
    assert training.trace[0] == (0.0, 0.0)
    assert training.trace[-1] == (2.0, 0.75)
    assert training.history[-1]["sparsity"] == 0.75


def test_a_loss_that_is_no_number_is_told_with_its_repair() -> None:
    model = network()
    nn.init.constant_(model[4].bias, float("inf"))
    training = Training(model, tiny_data([0, 1, 2] * 4, noise(12), valid=3), recipe(), None, "dense")
    with pytest.raises(UsageError, match="the loss became nan in epoch 1; pass a lower --lr"):
        training.run_epoch()
