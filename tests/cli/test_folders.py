from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset

from fasterai.cli.errors import UsageError
from fasterai.cli.folders import read_folder

MakeImages = Callable[..., Path]


def all_images(part) -> torch.Tensor:
    return part[list(range(len(part)))][0]


def labels_of(part) -> torch.Tensor:
    return part[list(range(len(part)))][1]


def test_without_parts_a_fifth_of_each_class_is_kept(make_images: MakeImages) -> None:
    data = read_folder(make_images("data", {"cat": 10, "ant": 5}))
    assert data.classes == ("ant", "cat")
    assert (len(data.train), len(data.valid)) == (12, 3)
    assert torch.bincount(labels_of(data.valid)).tolist() == [1, 2]
    assert not set(data.train.indices) & set(data.valid.indices)


@pytest.mark.parametrize(("names", "expected"), [
    (["valid"], "valid"), (["val"], "val"), (["test"], "test"), (["test", "val"], "val"), (["test", "val", "valid"], "valid"),
])  # fmt: skip
def test_parts_are_used(make_images: MakeImages, names: list[str], expected: str) -> None:
    root = make_images("data/train", {"a": 2, "b": 2}).parent
    for name in names:
        make_images(f"data/{name}", {"a": 1, "b": 4 if name == expected else 1})
    data = read_folder(root)
    assert (len(data.train), len(data.valid)) == (4, 5)
    assert data.validation == f"folder {expected}/"


def test_train_alone_is_split(make_images: MakeImages) -> None:
    data = read_folder(make_images("data/train", {"a": 5, "b": 5}).parent)
    assert data.classes == ("a", "b")
    assert (len(data.train), len(data.valid)) == (8, 2)


def test_a_class_may_be_called_train(make_images: MakeImages) -> None:
    data = read_folder(make_images("data", {"train": 2, "plane": 2}))
    assert data.classes == ("plane", "train")


def test_labels_are_the_training_classes_where_validation_lacks_one(make_images: MakeImages) -> None:
    root = make_images("data/train", {"a": 1, "b": 1, "c": 1}).parent
    make_images("data/valid", {"c": 2})
    assert labels_of(read_folder(root).valid).tolist() == [2, 2]


def test_images_lie_at_any_depth_and_hidden_files_do_not_count(make_images: MakeImages) -> None:
    root = make_images("data", {"a": 2, "b": 2})
    make_images("data/a", {"deep": 1})
    make_images("data", {".ipynb_checkpoints": 3})
    (root / "a" / "._0.png").write_bytes(b"not an image")
    (root / "a" / "notes.txt").write_text("not an image")
    data = read_folder(root)
    assert data.classes == ("a", "b")
    assert len(data.train) + len(data.valid) == 5


def test_files_come_before_folders_on_which_the_split_of_older_runs_depends(make_images: MakeImages) -> None:
    root = make_images("data", {"a": 2, "a/b": 1, "a/b-c": 1, "a/b/c": 1, "d": 2})
    paths = read_folder(root, cache_bytes=0).train.dataset.paths
    names = ["a/0.png", "a/1.png", "a/b/0.png", "a/b/c/0.png", "a/b-c/0.png", "d/0.png", "d/1.png"]
    assert paths == [str(root / name) for name in names]


@pytest.mark.parametrize(("size", "expected"), [
    ((32, 32), 32), ((40, 64), 40), ((4, 9), 8), ((65, 80), 64), ((100, 80), 64), ((500, 300), 224), ((160, 128), 128),
])  # fmt: skip
def test_default_image_size_follows_the_first_image(make_images: MakeImages, size: tuple[int, int], expected: int) -> None:
    data = read_folder(make_images("data", {"a": 2, "b": 2}, size=size))
    assert data.image_size == expected
    assert all_images(data.train).shape == (2, 3, expected, expected)


def test_pixels_of_square_images_come_unchanged(make_images: MakeImages) -> None:
    root = make_images("data/train", {"a": 2, "b": 1}).parent
    make_images("data/valid", {"a": 1})
    images = all_images(read_folder(root).train)
    for image, name in zip(images, ("a/0", "a/1", "b/0"), strict=True):
        np.testing.assert_array_equal(image.permute(1, 2, 0), np.asarray(Image.open(root / "train" / f"{name}.png")))


def test_wide_images_are_cut_in_the_middle(make_images: MakeImages) -> None:
    root = make_images("data", {"a": 2, "b": 2}, size=(8, 8))
    wide = np.zeros((8, 24, 3), dtype=np.uint8)
    wide[:, 8:16] = 200
    Image.fromarray(wide).save(root / "b" / "0.png")
    Image.fromarray(wide).save(root / "b" / "1.png")
    data = read_folder(root)
    assert bool((all_images(data.train)[labels_of(data.train) == 1] == 200).all())


GRAY = np.full((8, 8), 100, dtype=np.uint8)
MODES = {
    "gray": Image.fromarray(GRAY),
    "palette": Image.fromarray(np.stack([GRAY] * 3, 2)).quantize(4),
    "alpha": Image.fromarray(np.stack([GRAY, GRAY, GRAY, np.full_like(GRAY, 255)], 2)),
    "sixteen bits": Image.fromarray((GRAY.astype(np.uint16) << 8) + 77),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_kind_of_image_becomes_three_channels_of_bytes(make_images: MakeImages, mode: str) -> None:
    root = make_images("data/train", {"a": 1, "b": 1}).parent
    make_images("data/valid", {"a": 1})
    MODES[mode].save(root / "train" / "a" / "0.png")
    assert all_images(read_folder(root).train)[0].unique().tolist() == [100]


def test_photographs_are_turned_upright(make_images: MakeImages) -> None:
    root = make_images("data/train", {"a": 1, "b": 1}).parent
    make_images("data/valid", {"a": 1})
    pixels = np.arange(64, dtype=np.uint8).reshape(8, 8)
    upside_down = Image.Exif()
    upside_down[0x0112] = 3
    Image.fromarray(pixels).save(root / "train" / "a" / "0.png", exif=upside_down)
    np.testing.assert_array_equal(all_images(read_folder(root).train)[0, 0], pixels[::-1, ::-1])


@pytest.mark.parametrize("workers", [0, 2])
def test_images_that_do_not_fit_are_decoded_each_time(make_images: MakeImages, workers: int) -> None:
    root = make_images("data", {"a": 5, "b": 5})
    held, decoded = read_folder(root), read_folder(root, cache_bytes=10 * 3 * 64 - 1, workers=workers)
    assert isinstance(held.train.dataset, TensorDataset)
    assert not isinstance(decoded.train.dataset, TensorDataset)
    assert torch.equal(all_images(held.train), all_images(decoded.train))
    assert (held.mean, held.std) == (decoded.mean, decoded.std)
    assert isinstance(read_folder(root, cache_bytes=10 * 3 * 64).train.dataset, TensorDataset)


def test_statistics_are_of_the_training_part(make_images: MakeImages) -> None:
    root = make_images("data/train", {"a": 2, "b": 2}).parent
    make_images("data/valid", {"a": 3}, size=(8, 8))
    data = read_folder(root)
    expected = all_images(data.train).numpy() / 255
    np.testing.assert_allclose(data.mean, expected.mean((0, 2, 3)), rtol=1e-9)
    np.testing.assert_allclose(data.std, expected.std((0, 2, 3)), rtol=1e-9)


def test_fingerprint_is_of_files_and_sizes(make_images: MakeImages) -> None:
    root = make_images("data", {"a": 2, "b": 2})
    before = read_folder(root).fingerprint
    assert read_folder(root).fingerprint == before
    (root / "a" / "0.png").rename(root / "a" / "9.png")
    assert read_folder(root).fingerprint != before


@pytest.mark.parametrize("cache_bytes", [0, 1 << 30])
def test_an_unreadable_image_stops_the_reading_and_is_named(make_images: MakeImages, cache_bytes: int) -> None:
    root = make_images("data", {"a": 3, "b": 3})
    broken = root / "b" / "1.png"
    broken.write_bytes(broken.read_bytes()[:60])
    with pytest.raises(UsageError, match=f"unreadable image {re.escape(str(broken))} .*pass --skip-unreadable"):
        read_folder(root, cache_bytes=cache_bytes)

    data = read_folder(root, cache_bytes=cache_bytes, skip_unreadable=True)
    assert list(data.skipped) == [str(broken)]
    assert len(data.train) + len(data.valid) == 5
    assert 4 not in [*data.train.indices, *data.valid.indices]


def test_more_than_one_unreadable_image_is_counted(make_images: MakeImages) -> None:
    root = make_images("data", {"a": 3, "b": 3})
    for name in ("a/0", "b/0", "b/2"):
        (root / f"{name}.png").write_text("text")
    with pytest.raises(UsageError, match=r"a/0\.png .* and 2 more"):
        read_folder(root)


def test_a_class_without_readable_images_is_an_error(make_images: MakeImages) -> None:
    root = make_images("data", {"a": 3, "b": 2})
    (root / "b" / "0.png").write_text("text")
    with pytest.raises(UsageError, match="class 'b' must hold at least 2 readable images, got 1"):
        read_folder(root, skip_unreadable=True)


def test_what_cannot_be_a_data_set_is_refused(make_images: MakeImages, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nowhere, which does not exist"):
        read_folder(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="file, which is a file"):
        read_folder(tmp_path / "file")
    (tmp_path / "empty" / "a").mkdir(parents=True)
    with pytest.raises(UsageError, match=r"no images in .*empty: DATA must hold one sub-folder"):
        read_folder(tmp_path / "empty")
    with pytest.raises(UsageError, match="at least two classes, got only 'cat'"):
        read_folder(make_images("one", {"cat": 3}))
    half = make_images("half", {"cat": 3, "dog": 0})
    with pytest.raises(UsageError, match=rf"no images in {re.escape(str(half / 'dog'))}"):
        read_folder(half)
    root = make_images("strange/train", {"a": 1, "b": 1}).parent
    make_images("strange/valid", {"a": 1, "bird": 1})
    with pytest.raises(UsageError, match="got 'bird', which is none of them"):
        read_folder(root)
    root = make_images("hollow/train", {"a": 1, "b": 1}).parent
    make_images("hollow/valid", {"a": 1, "b": 0})
    with pytest.raises(UsageError, match=rf"no images in {re.escape(str(root / 'valid' / 'b'))}"):
        read_folder(root)
