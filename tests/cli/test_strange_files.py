"""What lies in folders of images besides images."""

from __future__ import annotations

import io
import os
import shutil
import signal
import struct
import subprocess
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image

from fasterai.cli import main
from fasterai.cli.errors import UsageError
from fasterai.cli.folders import read_folder
from tests.beside import Beside, waits_for

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


def png(width: int, height: int, bits: int, colour: int, row: bytes, rows: int) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    pixels = zlib.compress((b"\0" + row) * rows, 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def plain(mode: str, colour: object, size: tuple[int, int] = (8, 8)) -> Image.Image:
    return Image.new(mode, size, colour)


def palette() -> Image.Image:
    image = plain("P", 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    return image


RED, GREEN = plain("RGB", (255, 0, 0)), plain("RGB", (0, 255, 0))
#: File name, content, and the colour that it is read as.
WHOLE = {
    "moving GIF: its first picture": ("x.gif", saved(RED, "GIF", save_all=True, append_images=[GREEN]), [255, 0, 0]),
    "CMYK": ("x.tif", saved(plain("CMYK", (255, 0, 0, 0)), "TIFF"), [0, 255, 255]),
    "palette": ("x.png", saved(palette(), "PNG"), [10, 20, 30]),
    "transparent palette": ("x.png", saved(palette(), "PNG", transparency=1), [10, 20, 30]),
    "LA: the transparency is dropped": ("x.png", saved(plain("LA", (70, 0)), "PNG"), [70, 70, 70]),
    "RGBA: the transparency is dropped": ("x.png", saved(plain("RGBA", (10, 20, 30, 0)), "PNG"), [10, 20, 30]),
    "1 bit": ("x.png", saved(plain("1", 1), "PNG"), [255, 255, 255]),
    "16 bits, grey": ("x.png", png(8, 8, 16, 0, struct.pack(">H", 40 * 256 + 9) * 8, 8), [40, 40, 40]),
    "16 bits, colours": ("x.png", png(8, 8, 16, 2, struct.pack(">HHH", 256, 40 * 256, 65535) * 8, 8), [1, 40, 255]),
    "mixed case": ("x.JpEg", saved(plain("RGB", (90, 90, 90)), "JPEG"), [90, 90, 90]),
    "another format's name": ("x.jpg", saved(plain("RGB", (10, 20, 30)), "PNG"), [10, 20, 30]),
    "one pixel": ("x.png", saved(plain("RGB", (10, 20, 30), (1, 1)), "PNG"), [10, 20, 30]),
    "one column": ("x.png", saved(plain("RGB", (10, 20, 30), (1, 3000)), "PNG"), [10, 20, 30]),
}


@pytest.mark.parametrize(("name", "content", "colour"), WHOLE.values(), ids=WHOLE)
def test_images_of_every_kind_are_read_as_they_look(
    make_images: MakeImages, name: str, content: bytes, colour: list[int]
) -> None:
    root = make_images("data/train", {"a": 1, "b": 1}).parent
    make_images("data/valid", {"a": 1})
    (root / "train" / "a" / "0.png").unlink()
    (root / "train" / "a" / name).write_bytes(content)
    data = read_folder(root, image_size=8)
    assert [channel.unique().tolist() for channel in data.train[[0]][0][0]] == [[value] for value in colour]
    assert len(data.train) == 2


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
BROKEN = {
    "of no bytes": ("x.png", b"", "cannot identify"),
    "of more pixels than memory": ("x.png", png(20_000, 20_000, 8, 2, b"", 1), r"exceeds limit of \d+ pixels"),
    "of 2^62 pixels": ("x.png", png(2**31 - 1, 2**31 - 1, 8, 2, b"", 1), r"exceeds limit of \d+ pixels"),
    **{f"cut short: {kind}": (f"x.{kind}", saved(NOISE, format)[:-100], "") for kind, format in {
        "png": "PNG", "jpg": "JPEG", "gif": "GIF", "webp": "WEBP", "tif": "TIFF", "bmp": "BMP", "ppm": "PPM",
    }.items()},
}  # fmt: skip


@pytest.mark.parametrize(("name", "content", "reason"), BROKEN.values(), ids=BROKEN)
def test_images_that_are_broken_are_named_and_skipped(make_images: MakeImages, name: str, content: bytes, reason: str) -> None:
    root = make_images("data", {"a": 3, "b": 3})
    (root / "a" / name).write_bytes(content)
    with pytest.raises(UsageError, match=rf"unreadable image .*a/{name} \(.*{reason}.+\); pass --skip-unreadable"):
        read_folder(root)
    data = read_folder(root, skip_unreadable=True)
    assert list(data.skipped) == [str(root / "a" / name)]
    assert len(data.train) + len(data.valid) == 6


def test_text_that_unpacks_to_more_than_memory_is_not_unpacked(make_images: MakeImages) -> None:
    root = make_images("data", {"a": 3, "b": 3})
    whole = (root / "a" / "0.png").read_bytes()
    packed = b"k\0\0" + zlib.compress(bytes(200_000_000), 1)
    text = struct.pack(">I", len(packed)) + b"zTXt" + packed + struct.pack(">I", zlib.crc32(b"zTXt" + packed))
    (root / "a" / "0.png").write_bytes(whole[:33] + text + whole[33:])  # after the header
    with pytest.raises(UsageError, match=r"a/0\.png \(Decompressed data too large"):
        read_folder(root)


def test_folders_are_no_images_whatever_they_are_called(make_images: MakeImages) -> None:
    root = make_images("data", {"a": 3, "b": 3})
    make_images("data/a", {"x.jpg": 2})
    (root / "b" / "y.png").mkdir()
    data = read_folder(root)
    assert len(data.train) + len(data.valid) == 8
    assert data.classes == ("a", "b")


@pytest.mark.parametrize("link", [os.link, os.symlink])
def test_a_file_in_both_parts_is_told(make_images: MakeImages, link: Callable[[Path, Path], None]) -> None:
    root = make_images("data/train", {"a": 3, "b": 3}).parent
    make_images("data/valid", {"a": 2, "b": 2})
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert count(root) == (6, 4)
    for n in (0, 1):
        (root / "valid" / "b" / f"{n}.png").unlink()
        link(root / "train" / "a" / "2.png", root / "valid" / "b" / f"{n}.png")
    with pytest.warns(
        UserWarning, match=r"^2 of 4 images to validate on .*valid/b/0\.png is the same file as .*train/a/2\.png$"
    ):
        assert count(root) == (6, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        os.symlink(root / "train" / "b" / "0.png", root / "train" / "b" / "more of it.png")  # to weigh it more
        shutil.rmtree(root / "valid" / "b")
        assert count(root) == (7, 2)


def test_a_file_that_the_split_puts_into_both_parts_is_told(make_images: MakeImages) -> None:
    root = make_images("data", {"a": 1, "b": 3})
    os.symlink(root / "a" / "0.png", root / "a" / "1.png")
    with pytest.warns(UserWarning, match=r"1 of 2 images to validate on are trained on as well"):
        assert count(root) == (3, 2)


DENIED = """
import ctypes, os, sys
from pathlib import Path
from fasterai.cli import main
import fasterai.cli.sparsify, PIL.PngImagePlugin
if os.geteuid() == 0:  # what root may do all the same
    assert ctypes.CDLL(None).capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()) == 0
for place in sys.argv[1:]:
    assert main(["sparsify", place, "-o", place + "-run"]) == 2
"""
DENIALS = {
    "a/0.png": "unreadable image {0}/a/0.png (Permission denied); pass --skip-unreadable to leave such files out",
    "a": "{0}/a: Permission denied",
    ".": "{0}: Permission denied",
}


def told_of_denials(folder: Path, environment: Mapping[str, str]) -> tuple[list[Path], int, list[str]]:
    roots = [folder / f"data{i}" for i in range(len(DENIALS))]
    for path in (root / label / f"{i}.png" for root in roots for label in "ab" for i in range(3)):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(path)
    denied = [root / name for root, name in zip(roots, DENIALS, strict=True)]
    command = [sys.executable, "-c", DENIED, *map(str, roots)]
    try:
        for path in denied:
            path.chmod(0)
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    finally:
        for path in denied:
            path.chmod(0o755)
    return roots, done.returncode, done.stderr.splitlines()


@waits_for(told_of_denials)
def test_what_may_not_be_read_is_one_line(beside: Beside) -> None:
    roots, status, lines = beside(told_of_denials)
    wanted = [f"fasterai: error: {words.format(root)}" for root, words in zip(roots, DENIALS.values(), strict=True)]
    assert (lines, status) == (wanted, 0)


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
