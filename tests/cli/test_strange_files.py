"""What lies in folders of images besides images."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image

from fasterai.cli import main
from fasterai.cli.errors import UsageError
from fasterai.cli.folders import read_folder

MakeImages = Callable[..., Path]


@pytest.fixture(autouse=True)
def time_limit() -> Iterator[None]:
    """A walk in circles, or a pipe without a writer, must not stop the tests."""

    def stop(*_: object) -> None:
        pytest.fail("it takes too long")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def count(root: Path) -> tuple[int, int]:
    data = read_folder(root, skip_unreadable=True)
    return len(data.train), len(data.valid)


def first_pixel(root: Path) -> list[int]:
    images, _ = read_folder(root).train[[0]]
    return images[0, :, 0, 0].tolist()


@pytest.mark.parametrize("leads_to", [".", "..", "../..", "../../b", "../sub"])
def test_a_link_inside_a_class_reads_nothing_twice(make_images: MakeImages, leads_to: str) -> None:
    root = make_images("data", {"a": 5, "b": 5})
    make_images("data/a", {"sub": 5})
    shutil.copy(root / "a" / "0.png", root / "of no class.png")
    (root / "a" / "sub" / "link").symlink_to(leads_to)
    assert count(root) == (12, 3)  # 10 of a, 5 of b; a fifth of each


def test_links_to_each_other_read_each_class_once(make_images: MakeImages) -> None:
    root = make_images("data", {"a": 10, "b": 5})
    for inside, target in (("a", "b"), ("b", "a")):
        for name in ("0", "x", "y"):
            (root / inside / name).symlink_to(root / target)
    data = read_folder(root)
    assert [data.train[list(range(12))][1].tolist().count(label) for label in (0, 1)] == [8, 4]
    assert len(data.valid) == 3


def test_validation_folders_do_not_lead_to_training_images(make_images: MakeImages) -> None:
    root = make_images("data/train", {"a": 2, "b": 2}).parent
    make_images("data/valid", {"a": 1, "b": 1})
    (root / "valid" / "a" / "link").symlink_to(root / "train" / "a")
    assert count(root) == (4, 2)
    (root / "test").symlink_to(root / "train")
    assert count(root) == (4, 2)
    (root / "valid").rename(root / "other")
    with pytest.raises(UsageError, match=r"no images in .*test/a: every sub-folder is a class with its own"):
        read_folder(root)


def test_links_to_folders_elsewhere_are_followed_once(make_images: MakeImages) -> None:
    root, far = make_images("data", {"a": 5, "b": 5}), make_images("far", {"c": 5, "d": 5, "e": 5})
    (far / "c" / "loop").symlink_to(far / "c")
    (far / "c" / "up").symlink_to(far)
    (root / "c").symlink_to(far / "c")
    for name in ("one", "two"):
        (root / "a" / name).symlink_to(far / "d")
    (root / "loop").symlink_to("loop")
    data = read_folder(root)
    assert data.classes == ("a", "b", "c")
    assert (len(data.train), len(data.valid)) == (16, 4)


def test_a_class_that_is_a_link_to_another_one_is_refused(make_images: MakeImages) -> None:
    root = make_images("data", {"b": 5, "c": 5})
    (root / "a").symlink_to("b")
    with pytest.raises(UsageError, match=r"no images in .*data/a: every sub-folder is a class with its own"):
        read_folder(root)


def test_a_program_of_postscript_is_not_run(make_images: MakeImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_images("data", {"a": 3, "b": 3})
    (root / "a" / "1.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n")
    ran = tmp_path / "ran"
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {ran}\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    with pytest.raises(UsageError, match=r"unreadable image .*a/1\.png \(cannot identify"):
        read_folder(root)
    assert not ran.exists()


RANGES = {
    "floats in [0, 1]": (np.float32, 0.65, 166), "floats of bytes": (np.float32, 100.7, 100),
    "int32 of bytes": (np.int32, 100, 100),
    "uint16": (np.uint16, 40 * 256 + 9, 40), "big-endian uint16": (np.dtype(">u2"), 40 * 256 + 9, 40),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "value", "expected"), RANGES.values(), ids=RANGES)
def test_values_of_other_widths_are_scaled(make_images: MakeImages, kind: type, value: float, expected: int) -> None:
    root = make_images("data/train", {"a": 1, "b": 1}).parent
    make_images("data/valid", {"a": 1})
    (root / "train" / "a" / "0.png").unlink()
    Image.fromarray(np.full((8, 8), value, dtype=kind)).save(root / "train" / "a" / "0.tif")
    assert first_pixel(root) == [expected] * 3


@pytest.mark.parametrize("values", [
    np.array([[0, 70000]], dtype=np.int32), np.array([[-1, 5]], dtype=np.int32), np.array([[0.5, 300]], dtype=np.float32),
    np.array([[0.5, np.nan]], dtype=np.float32), np.array([[-0.5, 0.5]], dtype=np.float32),
], ids=["large", "negative", "large float", "nan", "negative float"])  # fmt: skip
def test_values_without_a_known_range_are_refused_by_name(make_images: MakeImages, values: np.ndarray) -> None:
    root = make_images("data", {"a": 3, "b": 3})
    Image.fromarray(np.tile(values, (8, 4))).save(root / "b" / "deep.tif")
    with pytest.raises(UsageError, match=r"unreadable image .*b/deep\.tif \(its values of 32 bits lie from .*8 or 16 bits"):
        read_folder(root)


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def make_dangling(path: Path) -> None:
    path.symlink_to("nowhere.png")


def make_circle(path: Path) -> None:
    path.symlink_to(path)


@pytest.mark.parametrize("make", [make_pipe, make_dangling, make_circle])
@pytest.mark.parametrize("name", ["0.png", "9.png"])
def test_what_is_no_regular_file_is_named_and_skipped(make_images: MakeImages, make: Callable[[Path], None], name: str) -> None:
    root = make_images("data", {"a": 3, "b": 3})
    (root / "a" / name).unlink(missing_ok=True)
    make(root / "a" / name)
    with pytest.raises(UsageError, match=rf"unreadable image .*a/{name} \(no regular file\)"):
        read_folder(root)
    data = read_folder(root, skip_unreadable=True)
    assert list(data.skipped) == [str(root / "a" / name)]


def test_names_that_are_no_text_are_named_and_skipped(
    make_images: MakeImages, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_images("data", {"a": 3, "b": 3}, size=(32, 32))
    (root / "a" / "2.png").rename(os.fsdecode(bytes(root / "a") + b"/\xff.png"))
    run = ["sparsify", str(root), "--arch", "squeezenet1_1", "--epochs", "1", "--no-dense", "-o", str(tmp_path / "run")]
    assert main(run) == 2
    assert r"a/\xff.png (its name is not UTF-8; rename it); pass --skip-unreadable" in capsys.readouterr().err
    assert main([*run, "--skip-unreadable"]) == 0
    assert r"left out: " in capsys.readouterr().out
    assert r"\\xff.png" in (tmp_path / "run" / "report.json").read_text()

    (root / "b").rename(os.fsdecode(bytes(root) + b"/b\xff"))
    assert main([*run[:-1], str(tmp_path / "other"), "--skip-unreadable"]) == 2
    error = capsys.readouterr().err
    assert "must hold at least 2 readable images, got 0" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("argv", [["demo", "-o", "\udcff"], ["sparsify", "\udcff"], ["prune", "\udcff", "--remove-only"]])
def test_arguments_that_are_no_text_are_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argv: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    assert "must be UTF-8" in capsys.readouterr().err
