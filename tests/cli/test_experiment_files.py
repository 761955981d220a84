"""Files of a run that can be read and hold something else: each is one line of an error, or does no harm."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fasterai.cli import output, pictures, sparsify
from fasterai.cli.errors import UsageError
from fasterai.cli.experiment import compare, finished_report
from fasterai.cli.runs import origin_of
from tests.cli.test_experiment import interrupt_at, make_job

STRANGE = [None, 3, "x", [], {}, [None], {"a": 1}, float("nan")]


def places(value: Any, depth: int) -> Iterator[tuple[Any, ...]]:
    """Paths to the entries of nested dicts and to the first entries of lists."""
    keys = list(value) if isinstance(value, dict) else [0] if isinstance(value, list) and value else []
    for key in keys:
        yield (key,)
        if depth > 1:
            yield from ((key, *more) for more in places(value[key], depth - 1))


def mutants(content: dict[str, Any], depth: int) -> Iterator[tuple[str, Any]]:
    for strange in STRANGE:
        yield f"all = {strange!r}", strange
    for path in places(content, depth):
        for strange in [*STRANGE, "gone"]:
            changed = copy.deepcopy(content)
            inner = changed
            for key in path[:-1]:
                inner = inner[key]
            if strange == "gone":
                del inner[path[-1]]
            else:
                inner[path[-1]] = strange
            yield f"{path} = {strange!r}", changed


def told(do: Callable[[], object], what: str) -> str:
    """The one line of an error, or nothing; anything else than such an error is a failure."""
    try:
        do()
    except UsageError as error:
        return " ".join(str(error).splitlines())
    except Exception as error:
        raise AssertionError(what) from error
    return ""


@pytest.mark.parametrize("step", [5, 14])
def test_checkpoints_of_other_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    for name in ("write_training", "write_sparsity"):
        monkeypatch.setattr(pictures, name, lambda *_: None)
    interrupt_at(monkeypatch, [step])
    with pytest.raises(KeyboardInterrupt):
        compare(make_job(tmp_path))
    path = tmp_path / "checkpoint.pt"
    whole = torch.load(path, weights_only=True)
    counts = {"refused": 0, "went on": 0}
    for i, (what, changed) in enumerate(mutants(whole, 3)):
        if i % 4:  # a quarter of them, for the time that it takes
            continue
        torch.save(changed, path)
        if told(lambda: compare(make_job(tmp_path)), what):
            counts["refused"] += 1
        else:
            (tmp_path / "report.json").unlink()
            counts["went on"] += 1
    assert counts["refused"] > 60, counts
    assert counts["went on"] < counts["refused"] / 2, counts


def test_reports_of_other_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("write_training", "write_sparsity"):
        monkeypatch.setattr(pictures, name, lambda *_: None)
    job = make_job(tmp_path)
    compare(job)
    path = tmp_path / "report.json"
    whole = json.loads(path.read_text())
    assert finished_report(tmp_path, job.arguments) == whole
    refused = 0

    def closing() -> None:
        report = finished_report(tmp_path, job.arguments)
        assert report is not None
        with output.told_unreadable(path):
            sparsify._closing(report, tmp_path)

    for what, changed in mutants(whole, 4):
        path.write_text(json.dumps(changed))
        refused += bool(told(closing, what))
    assert refused > 100


def test_the_settings_of_a_run_are_read_from_its_report(tmp_path: Path) -> None:
    weights = tmp_path / "sparse.safetensors"
    assert origin_of(weights) is None
    report = {
        "command": "sparsify",
        "arguments": {"seed": 3},
        "data": {"image_size": 32, "mean": [0.5] * 3, "std": [0.2] * 3, "classes": ["a", "b"]},
    }
    output.write_report(report, tmp_path)
    origin = origin_of(weights)
    assert origin is not None
    assert (origin.image_size, origin.mean, origin.std, origin.classes, origin.seed) == (
        32, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2), ("a", "b"), 3,
    )  # fmt: skip
    assert origin_of(tmp_path / "other.pth") is None
    refused = 0
    for what, changed in mutants(report, 3):
        (tmp_path / "report.json").write_text(json.dumps(changed))
        refused += "report.json" in told(lambda: origin_of(weights), what)
    assert refused > 60
