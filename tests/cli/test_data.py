from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch.utils.data import Subset, TensorDataset

from fasterai.cli.data import Data, byte_sums, digits, image_statistics, split_each_class

# Images of each class -> how many of them a fifth is, with at least one on both sides.
FIFTHS = [(2, 1), (3, 1), (5, 1), (10, 2), (13, 3), (100, 20)]


@pytest.mark.parametrize(("count", "expected"), FIFTHS)
def test_each_class_gives_a_fifth(count: int, expected: int) -> None:
    labels = [1] * count + [0] * 10
    train, valid = split_each_class(torch.tensor(labels), 0.2, seed=3)

    assert sorted([*train.tolist(), *valid.tolist()]) == list(range(count + 10))
    assert int((valid < count).sum()) == expected
    assert int((valid >= count).sum()) == 2


def test_split_follows_its_seed() -> None:
    labels = [0] * 50 + [1] * 50
    splits = [split_each_class(torch.tensor(labels), 0.2, seed)[1].tolist() for seed in (0, 0, 1)]
    assert splits[0] == splits[1]
    assert splits[0] != splits[2]


def test_statistics_are_those_of_numpy() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (7, 3, 4, 4))
    mean, std = image_statistics(byte_sums(torch.as_tensor(pixels).to(torch.uint8)), 16)
    np.testing.assert_allclose(mean, (pixels / 255).mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(std, (pixels / 255).std((0, 2, 3)), rtol=1e-9)


def test_sums_by_hand() -> None:
    pixels = torch.tensor([[[[1, 2], [3, 255]], [[0, 0], [0, 200]]]], dtype=torch.uint8)
    assert byte_sums(pixels).tolist() == [[[261, 200], [65039, 40000]]]


def test_constant_images_do_not_divide_by_zero() -> None:
    mean, std = image_statistics(byte_sums(torch.full((2, 1, 2, 2), 51, dtype=torch.uint8)), 4)
    assert mean == (0.2,)
    assert std == (1 / 255,)


def tiny() -> Data:
    pixels = torch.tensor([0, 0, 255, 51, 51, 255], dtype=torch.uint8).view(3, 2, 1, 1)
    images = TensorDataset(pixels, torch.tensor([0, 1, 0]))
    return Data(Subset(images, [2, 1]), Subset(images, [0]), ("a", "b"), (0.5, 0.2), (0.25, 0.1), 1, "")


def test_batches_are_normalised_and_of_their_part() -> None:
    data = tiny()
    batches = list(data.batches(data.train, [torch.tensor([1]), torch.tensor([0, 1])], torch.device("cpu")))
    assert [labels.tolist() for _, labels in batches] == [[1], [0, 1]]
    # By hand: (1 - 0.5) / 0.25, (0.2 - 0.2) / 0.1 of image 1; (0.2 - 0.5) / 0.25, (1 - 0.2) / 0.1 of image 2.
    torch.testing.assert_close(batches[0][0].flatten(1), torch.tensor([[2.0, 0.0]]))
    torch.testing.assert_close(batches[1][0].flatten(1), torch.tensor([[-1.2, 8.0], [2.0, 0.0]]))


def test_examples_are_repeated_where_there_are_too_few() -> None:
    images = tiny().examples(5, torch.device("cpu"))
    assert images.shape == (5, 2, 1, 1)
    torch.testing.assert_close(images[:, 0].flatten(), torch.tensor([-1.2, 2.0, -1.2, 2.0, -1.2]))


def test_digits_are_those_of_scikit_learn() -> None:
    data, found = digits(seed=0), load_digits()

    assert sorted([*data.train.indices, *data.valid.indices]) == list(range(1797))
    images, labels = data.valid[list(range(len(data.valid)))]
    np.testing.assert_array_equal(labels, found.target[data.valid.indices])
    np.testing.assert_array_equal(images[:, 0], np.round(found.images[data.valid.indices] * 255 / 16))
    # Digits 0 to 9 are there 178, 182, 177, 183, 181, 182, 181, 179, 174 and 180 times.
    assert torch.bincount(labels).tolist() == [36, 36, 35, 37, 36, 36, 36, 36, 35, 36]
    assert data.classes == tuple("0123456789")
