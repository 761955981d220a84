"""Images of a study, from a folder or the digits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from fasterai.study.data import load_data
from fasterai.study.sizes import SIZES, Size


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """train/ and test/ with two classes: dark and light pictures of noise."""
    root = tmp_path_factory.mktemp("images") / "pets"
    noise = np.random.default_rng(0)
    for part, count in (("train", 12), ("test", 6)):
        for low, name in ((0, "cat"), (120, "dog")):
            folder = root / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(noise.integers(low, low + 100, (10, 10, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return root


def size(train=None, test=None, side=8):
    return Size("own", train, test, side, epochs=1)


def test_the_digits_are_the_default_and_are_not_mirrored():
    data = load_data(None, SIZES["tiny"])
    assert (data.train[0].shape, data.test[0].shape) == ((160, 1, 8, 8), (80, 1, 8, 8))
    assert not data.flip and data.classes == tuple("0123456789") and data.fingerprint == "digits"
    assert data.name == "digits (160 + 80 images of 8x8)" and (data.channels, data.side) == (1, 8)
    assert abs(float(data.train[0].mean())) < 0.1 and abs(float(data.train[0].std()) - 1) < 0.1


def test_a_folder_is_read_and_normalised(images):
    data = load_data(images, size(side=5))
    assert (data.train[0].shape, data.test[0].shape) == ((24, 3, 5, 5), (12, 3, 5, 5))
    assert data.flip and data.classes == ("cat", "dog") and data.name == "pets (24 + 12 images of 5x5)"
    light = data.train[0][data.train[1] == 1].mean()
    assert light > 0.8 and data.train[0].is_contiguous(memory_format=torch.channels_last)


def test_a_part_of_a_folder_is_the_same_each_time_and_alone_is_read(images, monkeypatch):
    read = []
    from fasterai.cli import folders

    decode = folders._decode
    monkeypatch.setattr(folders, "_decode", lambda path, side: read.append(path) or decode(path, side))
    first, again = (load_data(images, size(10, 4)) for _ in range(2))
    assert len(read) == 28
    assert torch.equal(first.train[0], again.train[0]) and torch.equal(first.test[1], again.test[1])
    assert len(first.train[1]) == 10 and len(first.test[1]) == 4
    assert first.fingerprint == again.fingerprint != load_data(images, size()).fingerprint


def test_a_folder_without_a_validation_part_is_drawn_from_as_a_whole(images):
    data = load_data(images / "train", size(12, 3))
    assert (len(data.train[1]), len(data.test[1])) == (12, 3)


def test_more_than_there_are_is_all(images):
    assert len(load_data(images, size(1000, 1000)).train[1]) == 24


@pytest.mark.parametrize("name", ["nothing", "train/cat/0.png"])
def test_what_is_no_folder_of_images_is_refused(images, name):
    with pytest.raises(ValueError, match="data must be a folder of images, got"):
        load_data(images / name, size())


def test_an_unreadable_image_is_named(images, tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for i in range(2):
            (tmp_path / name / f"{i}.png").write_bytes((images / "train" / name / f"{i}.png").read_bytes())
    (tmp_path / "dog" / "1.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"unreadable image .*1\.png .*[^-]$") as raised:
        load_data(tmp_path, size())
    assert "--skip" not in str(raised.value)


def test_it_goes_to_a_device_and_is_one_line():
    data = load_data(None, SIZES["tiny"]).to("meta")
    assert data.train[0].device.type == data.test[1].device.type == "meta"
    assert repr(data).startswith("Data(train=(Tensor(160, 1, 8, 8), Tensor(160))")
