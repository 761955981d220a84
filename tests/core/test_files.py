"""Files that are whole or as they were: after kills, on full disks, under links; and nothing else of the library writes."""

from __future__ import annotations

import ast
import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from fasterai.core.files import PART, untied, write_file, write_saved, write_tensors, written_files

PACKAGE = Path(__file__).resolve().parents[2] / "fasterai"
SETUP = """
import json, os, resource, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)  # a fork of a process whose threads compute waits for them without end
from torch import nn
from fasterai.cli import output
from fasterai.core import files
from fasterai.prune.small_files import save_small
from fasterai.sparse.sparsifier import Sparsifier

folder = Path(sys.argv[1])
def network(value):
    model = nn.Sequential(nn.Linear(200, 300), nn.Linear(300, 5))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
    return model
def sparsifier(value):
    return Sparsifier(network(value), "weight", sparsity=0.0, schedule="one_shot")
programs = {}
def program(value):
    from fasterai.export.program import export_program
    if not programs:  # the writing is what is looked at: each network is exported once, before the process forks
        x = torch.ones(2, 200)
        programs.update({v: torch.export.export(network(v).eval(), (x,), strict=False) for v in (1, 2)})
        torch.export.export = lambda model, *_, **__: programs[int(model[0].bias[0])]
    export_program(network(value), torch.ones(2, 200), folder / "m.pt2")
WRITERS = {
    "m.pt": lambda value: sparsifier(value).save_model(folder / "m.pt"),
    "m.safetensors": lambda value: save_small(folder / "m.safetensors", network(value)),
    "checkpoint.pt": lambda value: output.save_checkpoint(network(value).state_dict(), folder),
    "dense.safetensors": lambda value: output.save_weights(network(value), folder / "dense.safetensors", ["a"] * 5),
    "report.json": lambda value: output.write_report({"0.weight": [float(value)] * 20_000}, folder),
    "m.pt2": program,
}
def use(place):
    global folder
    folder = Path(place)
    folder.mkdir(parents=True)
def in_a_child(function):
    # The signal that a fork of this process was ended by, or its status.
    child = os.fork()
    if not child:
        status = 1
        try:
            status = function() or 0
        finally:
            os._exit(status)
    status = os.waitpid(child, 0)[1]
    return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
"""
NAMES = ["m.pt", "m.safetensors", "checkpoint.pt", "dense.safetensors", "report.json", "m.pt2"]


def run(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", SETUP + code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def value_in(path: Path) -> float:
    """The one number that a whole file of the setup holds; an error for a part of one."""
    if path.suffix == ".json":
        values = json.loads(path.read_text())["0.weight"]
    elif path.suffix == ".pt2":
        values = torch.export.load(path).state_dict["0.weight"].flatten().tolist()
    else:
        found = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
        values = torch.cat([x.flatten() for x in found.values()]).tolist()
    assert len(values) >= 20_000
    assert len(set(values)) == 1
    return values[0]


def visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not (path.name.startswith(".") and path.name.endswith(PART)))


#: Where a process is killed: in the call of this number of a function that the writing goes through, or after so many bytes.
POINTS = [("open", 1), ("write", 1), ("write", 60_000), ("settle", 1), ("fsync", 1), ("replace", 1)]
KILLS = """
left = 0
def killing(before):
    def killed(*arguments, **options):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return before(*arguments, **options)
    return killed
import io
class Killing(io.BufferedWriter):
    def write(self, data):
        global left
        left -= len(data)
        if left <= 0:
            super().write(data[:left or None])
            self.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().write(data)
new_file = files._new_file
PATCHES = {"open": (os, killing(os.open)), "settle": (files, killing(files._settle)), "fsync": (os, killing(os.fsync)),
    "replace": (Path, killing(Path.replace)), "write": (files, lambda part: Killing(new_file(part).detach()))}
def killed(name, at, number):
    global left
    left = number
    module, function = PATCHES[at]
    setattr(module, {"settle": "_settle", "write": "_new_file"}.get(at, at), function)
    WRITERS[name](2)
base = folder
for name, at, number in json.loads(sys.argv[2]):
    use(base / name / f"{at}{number}")
    WRITERS[name](1)
    print(in_a_child(lambda: killed(name, at, number)), flush=True)
"""


def test_a_process_that_is_killed_while_it_writes_leaves_the_file_of_before(tmp_path: Path):
    tried = [(n, at, number) for n in NAMES for at, number in POINTS]
    result = run(KILLS, tmp_path, json.dumps(tried))
    assert result.stdout.split() == [str(-signal.SIGKILL)] * len(tried), result.stderr
    for name, at, number in tried:
        folder = tmp_path / name / f"{at}{number}"
        assert visible(folder) == [name], at
        assert value_in(folder / name) == 1, at
    assert len(tried) == 36


def test_kills_at_any_time_leave_a_whole_file(tmp_path: Path):
    code = "print(1, flush=True)\nvalue = 0\nwhile True:\n    value += 1\n    WRITERS['m.pt'](value)\n"
    command = [sys.executable, "-c", SETUP + code, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        while not (tmp_path / "m.pt").exists():
            time.sleep(0.01)
        for _ in range(30):  # the file may be looked at, or the process be gone, at any time
            assert value_in(tmp_path / "m.pt") >= 1
        child.kill()
    assert value_in(tmp_path / "m.pt") >= 1
    assert visible(tmp_path) == ["m.pt"]


FULL = """
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
def full(name, limit):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        WRITERS[name](2)
    except (OSError, output.UsageError, ValueError) as error:
        os.write(told, f"{name}: {error}".replace(chr(10), " ").encode() + bytes([10]))
        return 0
    return 1
base, (come, told) = folder, os.pipe()
for name in json.loads(sys.argv[2]):
    use(base / name)
    WRITERS[name](1)
    print([in_a_child(lambda: full(name, limit)) for limit in (0, 100, 4096, 60_000)], flush=True)
os.close(told)
sys.stdout.buffer.write(open(come, "rb").read())
"""


def test_a_full_disk_leaves_the_file_of_before_and_is_told(tmp_path: Path):
    result = run(FULL, tmp_path, json.dumps(NAMES))
    lines = result.stdout.splitlines()
    assert lines[: len(NAMES)] == ["[0, 0, 0, 0]"] * len(NAMES), result.stderr
    for name in NAMES:
        assert [path.name for path in (tmp_path / name).iterdir()] == [name]
        assert value_in(tmp_path / name / name) == 1
        told = [line for line in lines if line.startswith(f"{name}: ")]
        assert len(told) == 4
        assert all("File too large" in line and f"{name}/{name}" in line for line in told), told


def fail(file) -> None:
    file.write(b"ne")
    raise KeyboardInterrupt


def half_of_several(path: Path) -> None:
    with written_files(path) as place:
        place.write_text("ne")
        raise KeyboardInterrupt


def test_a_broken_off_write_leaves_the_old_file_and_nothing_else(tmp_path: Path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt):
        write_file(path, fail)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    with pytest.raises(KeyboardInterrupt):
        half_of_several(path)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_permissions_are_those_of_a_plain_write(tmp_path: Path, mask: int):
    def mode(name: str) -> int:
        return stat.S_IMODE((tmp_path / name).stat().st_mode)

    for name in ("plain", "whole", "several"):
        (tmp_path / f"{name}.old").write_text("old")
        (tmp_path / f"{name}.old").chmod(0o604)
    before = os.umask(mask)
    try:
        for end in ("", ".old"):
            (tmp_path / f"plain{end}").write_bytes(b"new")
            write_file(tmp_path / f"whole{end}", lambda file: file.write(b"new"))
            with written_files(tmp_path / f"several{end}") as place:
                place.write_bytes(b"new")
    finally:
        os.umask(before)
    assert mode("plain") == mode("whole") == mode("several") == 0o666 & ~mask
    assert mode("plain.old") == mode("whole.old") == mode("several.old") == 0o604


def test_a_link_is_followed_and_a_device_and_a_pipe_stay_what_they_are(tmp_path: Path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    write_file(tmp_path / "link", lambda file: file.write(b"new"))
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"
    (tmp_path / "dangling").symlink_to("later")
    write_saved(tmp_path / "dangling", 3)
    assert torch.load(tmp_path / "later", weights_only=True) == 3
    os.mkfifo(tmp_path / "pipe")
    got: list[bytes] = []
    reader = threading.Thread(target=lambda: got.append((tmp_path / "pipe").read_bytes()))
    reader.start()
    write_file(tmp_path / "pipe", lambda file: file.write(b"through"))
    reader.join(10)
    assert got == [b"through"]
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    write_file("/dev/null", lambda file: file.write(b"gone"))
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)


def test_what_cannot_be_written_is_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"gone/file'$") as told:
        write_file(tmp_path / "gone" / "file", lambda file: file.write(b""))
    assert told.value.filename == str(tmp_path / "gone" / "file")
    with pytest.raises(IsADirectoryError):
        write_file(tmp_path, lambda file: file.write(b""))
    with pytest.raises(RuntimeError, match="of its own"):
        write_file(tmp_path / "file", lambda file: (_ for _ in ()).throw(RuntimeError("of its own")))
    name = "ü" * 127  # as long as a name may be
    write_file(tmp_path / name, lambda file: file.write(b"long"))
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_several_files_of_one_writer_arrive_together(tmp_path: Path):
    with written_files(tmp_path / "model.onnx") as place:
        place.write_text("graph")
        place.with_name("model.onnx.data").write_text("weights")
        assert list(tmp_path.glob("model*")) == []
    assert visible(tmp_path) == ["model.onnx", "model.onnx.data"]


CONTENT = """
import sys
sys.path.insert(0, sys.argv[2])
import torch
from torch import nn
from fasterai.core.files import write_tensors
from fasterai.prune.small_files import save_small
metadata = {name: name * 2 for name in ("zebra", "a", "\u00e4", "\\x7f", "quote'", "b\\"", "c", "format")}
for i in range(5):
    write_tensors(f"{sys.argv[1]}.{i}", {"w": torch.ones(3), "b": torch.zeros(2, dtype=torch.float64)}, metadata)
    torch.manual_seed(0)
    save_small(f"{sys.argv[1]}.small{i}", nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.MultiheadAttention(4, 2)))
"""


def test_equal_tensors_and_metadata_are_equal_bytes_in_every_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    other = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    command = [sys.executable, "-c", CONTENT, str(tmp_path / "1"), str(PACKAGE.parent)]
    subprocess.run(command, env=os.environ | {"PYTHONHASHSEED": other}, check=True, timeout=300)
    monkeypatch.setattr(sys, "argv", ["", str(tmp_path / "0"), str(PACKAGE.parent)])
    monkeypatch.setattr(sys, "path", [*sys.path])
    exec(CONTENT, {})
    assert len(list(tmp_path.iterdir())) == 20
    assert len({path.read_bytes() for path in tmp_path.glob("*small*")}) == 1
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 2
    with safe_open(tmp_path / "0.0", "pt") as file:
        assert file.metadata()["zebra"] == "zebrazebra"
        assert file.metadata()["ä"] == "ää"
        assert file.metadata()['b"'] == 'b"b"'
        assert torch.equal(file.get_tensor("w"), torch.ones(3))
        assert file.get_tensor("b").dtype == torch.float64


def test_the_order_of_tensors_and_metadata_makes_no_difference(tmp_path: Path):
    tensors, metadata = {"a": torch.ones(2), "b": torch.zeros(3)}, {"x": "1", "y": "2"}
    write_tensors(tmp_path / "one", tensors, metadata)
    write_tensors(tmp_path / "two", dict(reversed(tensors.items())), dict(reversed(metadata.items())))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert load_file(tmp_path / "one").keys() == {"a", "b"}


def test_tied_tensors_come_once_and_a_part_of_one_is_a_copy(tmp_path: Path):
    whole = torch.arange(6.0).view(2, 3)
    state = {"row": whole[0], "whole": whole, "again": whole, "turned": whole.t(), "empty": torch.ones(0)}
    found = untied(state)
    assert list(found) == ["row", "whole", "turned", "empty"]
    assert all(torch.equal(x, state[name]) and x.is_contiguous() for name, x in found.items())
    write_tensors(tmp_path / "a", found, {})
    assert torch.equal(load_file(tmp_path / "a")["turned"], whole.t())
    with pytest.raises(ValueError, match=r"model must have tensors alone in its state, got a._extra_state \(int\)"):
        untied({"a._extra_state": 3})


# --- nothing else writes ---------------------------------------------------------------------------------------------

#: Calls that write a file, by their last name; `save` and `dump` as well as `torch.save`.
WRITES = {"save", "dump", "save_file", "save_model_file", "savefig", "write_text", "write_bytes", "to_csv", "to_json"}
WRITES |= {"imsave", "savez", "savetxt", "tofile", "save_pretrained", "imwrite", "copyfile", "copy2", "mkstemp"}
WHOLE = {"write_file", "write_saved", "write_tensors", "write_atomically"}
#: What looks alike: (file, function) -> the reason.
ALIKE = {
    ("analyze/cost.py", "_length"): "makes bytes in memory",
    ("distill/cache/files.py", "_begin"): "writes into the temporary folder that `written_files` gives",
    ("export/onnx.py", "_write"): "writes into the temporary folder that `written` gives; os.devnull takes what is printed",
    ("export/program.py", "export_program"): "makes bytes in memory",
    ("callbacks/fastai.py", "_restart_trackers"): "fastai's own file, by fastai",
    ("callbacks/fastai_files.py", "__call__"): "fastai's own file, by fastai",
    ("display.py", "save_figure"): "writes into the open file that it is given",
    ("sparse/masked.py", "save_model"): "hands it on",
    ("sparse/tickets/rounds.py", "run"): "hands it on to Ticket.save",
    ("study/engine.py", "run"): "hands it on to Result.save",
    ("testing/participants.py", "saved"): "makes bytes in memory",
}


def is_write(call: ast.Call) -> bool:
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if name == "export" and ast.unparse(call.func) == "torch.onnx.export":
        return True
    if name == "open" and not ast.unparse(call.func).startswith("Image"):
        modes = [a.value for a in [*call.args, *(k.value for k in call.keywords)] if isinstance(a, ast.Constant)]
        return any(isinstance(mode, str) and set(mode) & set("wax+") and len(mode) <= 3 for mode in modes) or (
            ast.unparse(call.func) == "os.open"
        )
    return name in WRITES


def writes_of(source: str) -> list[tuple[str, str]]:
    """(function, call) of each write that is no part of a call that writes whole files, nor inside `with written(...)`."""
    found: list[tuple[str, str]] = []

    def walk(node: ast.AST, function: str, is_whole: bool) -> None:
        if isinstance(node, ast.FunctionDef):
            function = node.name
        if isinstance(node, ast.With):
            is_whole = is_whole or any("written" in ast.unparse(item.context_expr).split("(")[0] for item in node.items)
        if isinstance(node, ast.Call):
            if not is_whole and is_write(node):
                found.append((function, ast.unparse(node)))
            is_whole = is_whole or ast.unparse(node.func).split(".")[-1] in WHOLE
        for child in ast.iter_child_nodes(node):
            walk(child, function, is_whole)

    walk(ast.parse(source), "", False)
    return found


def test_no_other_place_of_the_library_writes():
    astray = [
        (path.relative_to(PACKAGE).as_posix(), function, call)
        for path in sorted({*PACKAGE.rglob("*.py")} - {PACKAGE / "core" / "files.py"})
        for function, call in writes_of(path.read_text(encoding="utf-8"))
        if (path.relative_to(PACKAGE).as_posix(), function) not in ALIKE
    ]
    assert astray == [], "write through fasterai.core.files, or say in ALIKE why it is no file of the library's"


@pytest.mark.parametrize(
    "source",
    ["torch.save(x, p)", "open(p, 'w')", "p.open('ab')", "p.write_text('')", "figure.savefig(p)", "json.dump(x, f)",
     "torch.onnx.export(m, x, p)", "os.open(p, 1)", "open(p, mode='r+')"],
)  # fmt: skip
def test_the_search_finds_a_write(source: str):
    assert len(writes_of(f"def f():\n    {source}")) == 1
    assert writes_of(f"def f():\n    with written(p) as p:\n        {source}") == []
    assert writes_of("def f():\n    write_file(p, lambda file: torch.save(x, file))\n    open(p)\n    p.open('rb')") == []
