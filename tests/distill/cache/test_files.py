"""File of a cached teacher: rows in any order and number, whole files only, and nothing foreign is read."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fasterai.core.files import written_files
from fasterai.distill.cache.files import HEAD, RowWriter, described_by, read_cache
from fasterai.distill.cache.rows import RowForm

KEYS = torch.tensor([5, -3, 2**62, 0, -(2**63)])


def write(path: Path, batches: list[tuple[Tensor, Tensor]], top_k: int | None = None, dtype: str = "float16") -> int:
    with written_files(path) as place, ExitStack() as files:
        writer = RowWriter(place, files)
        for keys, logits in batches:
            form = RowForm(tuple(logits.shape[1:]), dtype, top_k)
            writer.add(form, keys, form.pack(logits))
        assert writer.form is not None or not batches
        return writer.finish(described_by(writer.form or RowForm((), dtype), [("x", "float32", (2,))], "sum", "Net"))


@pytest.mark.parametrize("top_k", [None, 2, 3])
@pytest.mark.parametrize("shape", [(3,), (5, 3), (3, 2, 2)])
def test_rows_come_back_by_their_keys(tmp_path: Path, shape: tuple[int, ...], top_k: int | None):
    logits = torch.randn(5, *shape)
    path = tmp_path / "a.safetensors"
    assert write(path, [(KEYS[:2], logits[:2]), (KEYS[2:], logits[2:])], top_k) == 5
    file = read_cache(path)
    assert file.keys.tolist() == sorted(KEYS.tolist())
    assert (file.form.shape, file.form.dtype, file.form.top_k) == (shape, "float16", top_k)
    assert file.inputs == [("x", "float32", (2,))]
    for i, key in enumerate(KEYS.tolist()):
        row = file.rows[file.keys.tolist().index(key)]
        found = file.form.unpack({name: x[row][None] for name, x in file.parts.items()})
        expected = file.form.unpack(file.form.pack(logits[i : i + 1]))
        assert torch.equal(found, expected)
    assert [one.name for one in tmp_path.iterdir()] == ["a.safetensors"]
    assert load_file(path)["logits"].dtype is torch.float16  # others can read it
    assert path.stat().st_size == HEAD + file.nbytes + -file.nbytes % 8 + 5 * 16


def test_a_sample_that_comes_several_times_is_one_row(tmp_path: Path):
    logits = torch.randn(5, 3)
    again = logits + 1e-4
    assert write(tmp_path / "a", [(KEYS, logits), (KEYS[1:3], again[1:3]), (KEYS[:1], again[:1])]) == 5
    file = read_cache(tmp_path / "a")
    assert len(file.keys) == 5
    assert len(file.parts["logits"]) == 8
    assert (file.rows < 5).all()


def test_a_sample_with_two_answers_is_refused(tmp_path: Path):
    logits = torch.randn(5, 3)
    for top_k in (None, 2):
        with pytest.raises(ValueError, match="teacher must answer alike for the same sample, got logits that differ by 2"):
            write(tmp_path / "a", [(KEYS, logits), (KEYS[:1], logits[:1] + 2)], top_k, "float32")
        assert list(tmp_path.iterdir()) == []
    nearly = torch.tensor([[1.0, 1.0001, 0.0]])
    assert write(tmp_path / "a", [(KEYS[:1], nearly), (KEYS[:1], nearly[:, [1, 0, 2]])], 1) == 1  # which is larger, is rounding


def test_rows_of_two_shapes_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"data must give logits of one shape, got \(6, 3\) after \(5, 3\); pad all samples"):
        write(tmp_path / "a", [(KEYS, torch.randn(5, 5, 3)), (KEYS, torch.randn(5, 6, 3))])
    assert list(tmp_path.iterdir()) == []


def test_no_rows_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="data must hold at least one sample, got none"):
        write(tmp_path / "a", [])


def test_logits_stay_on_the_disk(tmp_path: Path):
    write(tmp_path / "a", [(KEYS, torch.randn(5, 3))])
    content = bytearray((tmp_path / "a").read_bytes())
    file = read_cache(tmp_path / "a")
    with (tmp_path / "a").open("rb+") as opened:  # what is mapped follows the file
        opened.seek(HEAD)
        opened.write(bytes(30))
    assert (file.parts["logits"] == 0).all()
    assert any(content[HEAD : HEAD + 30])


def spoiled(path: Path, what: str) -> None:
    if what == "cut":
        path.write_bytes(path.read_bytes()[:-9])
        return
    if what == "foreign":
        save_file({"w": torch.ones(2)}, path)
        return
    if what == "text":
        path.write_text("no file of this kind")
        return
    content = bytearray(path.read_bytes())
    header = json.loads(content[8:HEAD])
    metadata = header["__metadata__"]
    changes = {
        "format": lambda: metadata.update(format="another-1"),
        "shape": lambda: metadata.update(shape="[4]"),
        "shape of text": lambda: metadata.update(shape='["a"]'),
        "dtype": lambda: metadata.update(dtype='"float32"'),
        "top_k": lambda: metadata.update(top_k="9"),
        "inputs": lambda: metadata.update(inputs="[[1]]"),
        "no entry": lambda: metadata.pop("kind"),
        "no part": lambda: header.update(other=header.pop("logits")),
        "keys": lambda: content.__setitem__(slice(-80, -40), content[-80:-40][::-1]),
        "rows": lambda: content.__setitem__(slice(-8, None), (5).to_bytes(8, "little")),
    }
    changes[what]()
    text = json.dumps(header).encode().ljust(HEAD - 8)
    path.write_bytes((HEAD - 8).to_bytes(8, "little") + text + content[HEAD:])


@pytest.mark.parametrize(
    "what",
    [
        "cut",
        "foreign",
        "text",
        "format",
        "shape",
        "shape of text",
        "dtype",
        "top_k",
        "inputs",
        "no entry",
        "no part",
        "keys",
        "rows",
    ],
)
def test_what_is_no_such_file_is_refused(tmp_path: Path, what: str):
    path = tmp_path / "a"
    write(path, [(KEYS, torch.randn(5, 3))])
    read_cache(path)
    spoiled(path, what)
    with pytest.raises(ValueError, match="path must be a file that cache_teacher wrote, got"):
        read_cache(path)


def test_a_missing_file_is_an_error_of_the_system(tmp_path: Path):
    with pytest.raises(OSError, match="a"):
        read_cache(tmp_path / "a")
