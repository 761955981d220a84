from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from fasterai.cli.errors import UsageError
from fasterai.cli.output import (
    check_free,
    check_new_folder,
    holds_run,
    load_checkpoint,
    load_report,
    new_folder,
    prepare_folder,
    remove_checkpoint,
    remove_parts,
    save_checkpoint,
    save_weights,
    write_report,
)

#: What a checkpoint holds at least.
KEYS = {"arguments": {}, "done": {}, "stage": None, "state": {}}


def test_checkpoints_and_reports_come_back(tmp_path: Path) -> None:
    assert not holds_run(tmp_path)
    assert load_checkpoint(tmp_path) is None
    assert load_report(tmp_path) is None
    save_checkpoint({"step": 3, "weights": torch.ones(2), **KEYS}, tmp_path)
    assert holds_run(tmp_path)
    assert load_checkpoint(tmp_path)["step"] == 3
    remove_checkpoint(tmp_path)
    assert not holds_run(tmp_path)
    write_report({"command": "ä", "arguments": {}}, tmp_path)
    assert holds_run(tmp_path)
    assert load_report(tmp_path) == {"command": "ä", "arguments": {}}


@pytest.mark.parametrize(("name", "load"), [("checkpoint.pt", load_checkpoint), ("report.json", load_report)])
def test_broken_files_are_named(tmp_path: Path, name: str, load) -> None:
    (tmp_path / name).write_text("{broken")
    with pytest.raises(UsageError, match=rf"cannot read .*{name} .*delete it to start again"):
        load(tmp_path)


def test_weights_are_written_with_the_classes(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)).to(memory_format=torch.channels_last)
    save_weights(network, tmp_path / "w.safetensors", ("cat", "dog"))
    with safe_open(tmp_path / "w.safetensors", "pt") as file:
        assert json.loads(file.metadata()["classes"]) == ["cat", "dog"]
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert found.keys() == network.state_dict().keys()
    assert all(torch.equal(found[name], value) for name, value in network.state_dict().items())


def test_a_file_in_the_place_of_the_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(UsageError, match=r"--output must be a folder, got .*taken"):
        prepare_folder(tmp_path / "taken")
    prepare_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()


def test_a_new_folder_gets_its_name_when_all_went_well(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "small"
    with new_folder(folder) as part:
        (part / "file").write_text("whole")
        assert not folder.exists()
    assert [path.name for path in folder.iterdir()] == ["file"]
    assert [path.name for path in folder.parent.iterdir()] == ["small"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_of_a_folder_that_failed_nothing_is_left(tmp_path: Path, error: type[BaseException]) -> None:
    def fail() -> None:
        with new_folder(tmp_path / "small") as part:
            (part / "file").write_text("half")
            raise error

    with pytest.raises(error):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_a_new_folder_may_be_empty_and_nothing_else(tmp_path: Path) -> None:
    check_new_folder(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    check_new_folder(tmp_path / "empty")
    (tmp_path / "full" / "something").mkdir(parents=True)
    with pytest.raises(UsageError, match=r"--output must be a new folder, got .*full, which is not empty"):
        check_new_folder(tmp_path / "full")
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"--output must be a folder, got .*file, which is a file"):
        check_new_folder(tmp_path / "file")


def take_away(folder: Path) -> None:
    folder.rmdir()


def put_a_file(folder: Path) -> None:
    folder.rmdir()
    folder.write_text("")


@pytest.mark.parametrize("spoil", [take_away, put_a_file])
@pytest.mark.parametrize("write", [
    lambda folder: save_checkpoint({"weights": torch.ones(2)}, folder), lambda folder: write_report({}, folder),
    lambda folder: save_weights(nn.Linear(2, 2), folder / "dense.safetensors", ("a", "b")),
], ids=["checkpoint", "report", "weights"])  # fmt: skip
def test_what_cannot_be_written_is_named(tmp_path: Path, spoil, write) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    spoil(folder)
    with pytest.raises(UsageError, match=rf"{folder}/\w+\.\w+ cannot be written \(.*\); see that its folder is there"):
        write(folder)


#: In a process of its own, where no file may be larger than 1 KiB, which a full disk tells in the same way.
FULL_DISK = """
import resource, sys
from pathlib import Path
import torch
from fasterai.cli.errors import UsageError
from fasterai.cli.output import new_folder, save_checkpoint, save_weights
folder = Path(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (1024, resource.RLIM_INFINITY))
def make():
    with new_folder(folder / "small") as part:
        (part / "file").write_bytes(bytes(10_000))
for write in (
    lambda: save_checkpoint({"step": 2, "weights": torch.ones(10_000)}, folder),
    lambda: save_weights(torch.nn.Linear(100, 100), folder / "dense.safetensors", ("a", "b")), make,
):
    try:
        write()
    except UsageError as error:
        print(error)
"""


def test_what_a_killed_run_left_half_written_is_removed_and_nothing_else(tmp_path: Path) -> None:
    for name in (".checkpoint.pt.0123abcd.part", ".mine.part", "my.0123abcd.part", ".0123abcd", "report.json"):
        (tmp_path / name).write_text("")
    remove_parts(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".0123abcd", ".mine.part", "my.0123abcd.part", "report.json"]


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    save_checkpoint({"step": 1, **KEYS}, tmp_path)
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    names = [line.split(" cannot be written (File too large)")[0] for line in done.stdout.splitlines()]
    assert names == [str(tmp_path / name) for name in ("checkpoint.pt", "dense.safetensors", "small")]
    assert load_checkpoint(tmp_path)["step"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_a_folder_that_cannot_be_written_to_is_told_before_the_training() -> None:
    with pytest.raises(UsageError, match=r"--output must be a folder that can be written to, got /proc/self/fdinfo \(.+\)$"):
        prepare_folder(Path("/proc/self/fdinfo"))


@pytest.mark.parametrize("inside", ["small", "deep/small"])
def test_of_a_new_folder_it_is_told_before_the_work_and_by_its_own_name(inside: str) -> None:
    wanted = rf"--output must be a folder that can be written to, got /proc/self/fdinfo/{inside} \("
    with pytest.raises(UsageError, match=wanted):
        check_new_folder(Path("/proc/self/fdinfo") / inside)


def test_a_new_folder_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"--output must be a folder, got .*file/small \(Not a directory\)"):
        check_new_folder(tmp_path / "file" / "small")


def test_what_was_half_written_alone_leaves_a_folder_free(tmp_path: Path) -> None:
    (tmp_path / ".checkpoint.pt.0123abcd.part").write_text("")
    check_free(tmp_path)
    (tmp_path / "notes").write_text("")
    with pytest.raises(UsageError, match="which is not empty; pass another one"):
        check_free(tmp_path)
