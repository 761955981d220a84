from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from fasterai.cli.data import Data, Held, Part, digits, image_statistics, split_each_class

# Images of each class -> how many of them a fifth is, with at least one on both sides.
FIFTHS = [(2, 1), (3, 1), (5, 1), (10, 2), (13, 3), (100, 20)]


@pytest.mark.parametrize(("count", "expected"), FIFTHS)
def test_each_class_gives_a_fifth(count: int, expected: int) -> None:
    labels = [1] * count + [0] * 10
    train, valid = split_each_class(labels, 0.2, seed=3)

    assert sorted([*train.tolist(), *valid.tolist()]) == list(range(count + 10))
    assert int((valid < count).sum()) == expected
    assert int((valid >= count).sum()) == 2


def test_split_follows_its_seed() -> None:
    labels = [0] * 50 + [1] * 50
    splits = [split_each_class(labels, 0.2, seed)[1].tolist() for seed in (0, 0, 1)]
    assert splits[0] == splits[1]
    assert splits[0] != splits[2]


def test_statistics_are_those_of_numpy() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (7, 3, 4, 4))
    values = torch.as_tensor(pixels).double()
    mean, std = image_statistics(values.sum((2, 3)), values.square().sum((2, 3)), 16)
    np.testing.assert_allclose(mean, (pixels / 255).mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(std, (pixels / 255).std((0, 2, 3)), rtol=1e-9)


def test_constant_images_do_not_divide_by_zero() -> None:
    sums = torch.full((2, 1), 4 * 51.0, dtype=torch.float64)
    mean, std = image_statistics(sums, 51 * sums, 4)
    assert mean == (0.2,)
    assert std == (1 / 255,)


def test_normalize_by_hand() -> None:
    part = Part(Held(torch.zeros(1, 2, 1, 1, dtype=torch.uint8)), torch.tensor([0]), torch.tensor([0]))
    data = Data(part, part, ("a", "b"), (0.5, 0.2), (0.25, 0.1), 1, "")
    pixels = torch.tensor([255, 51], dtype=torch.uint8).view(1, 2, 1, 1)
    torch.testing.assert_close(data.normalize(pixels).flatten(), torch.tensor([2.0, 0.0]))


def test_part_reads_its_own_rows() -> None:
    pixels = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1)
    part = Part(Held(pixels), torch.tensor([4, 1, 3]), torch.tensor([7, 8, 9]))
    images, labels = part.batch(torch.tensor([2, 0]))
    assert images.flatten().tolist() == [3, 4]
    assert labels.tolist() == [9, 7]


def test_digits_are_those_of_scikit_learn() -> None:
    data, found = digits(seed=0), load_digits()

    rows = torch.cat([data.train.rows, data.valid.rows])
    assert sorted(rows.tolist()) == list(range(1797))
    images, labels = data.valid.batch(torch.arange(len(data.valid)))
    np.testing.assert_array_equal(labels, found.target[data.valid.rows])
    np.testing.assert_array_equal(images[:, 0], np.round(found.images[data.valid.rows] * 255 / 16))
    # Digits 0 to 9 are there 178, 182, 177, 183, 181, 182, 181, 179, 174 and 180 times.
    assert torch.bincount(labels).tolist() == [36, 36, 35, 37, 36, 36, 36, 36, 35, 36]
    assert data.classes == tuple("0123456789")
