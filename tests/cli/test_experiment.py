from __future__ import annotations

import gc
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import Subset, TensorDataset

from fasterai.cli import experiment, pictures, training
from fasterai.cli.data import Data
from fasterai.cli.errors import UsageError
from fasterai.cli.experiment import Job, compare, finished_report
from fasterai.cli.training import Recipe
from tests.messages import heard

STEPS = 3  # of an epoch: 20 images in batches of at most 8
EPOCHS = 3


def make_network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.3), nn.Flatten(), nn.Linear(216, 2))


def make_job(folder: Path, criteria: str = "large_final", sparsity: float = 0.9, **changes: Any) -> Job:
    folder.mkdir(exist_ok=True)
    pixels = torch.randint(0, 256, (26, 3, 8, 8), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    images = TensorDataset(pixels, torch.arange(26) % 2)
    parts = Subset(images, range(20)), Subset(images, range(20, 26))
    data = Data(*parts, ("a", "b"), (0.5,) * 3, (0.3,) * 3, 8, "six")
    axes = {
        "sparsity": sparsity,
        "granularity": "weight",
        "context": "global",
        "criteria": criteria,
        "schedule": "one_cycle",
    }
    recipe = Recipe(EPOCHS, 8, 1e-2, 0, torch.device("cpu"))
    arguments = {"arch": "tiny", **axes}
    settings = {"command": "test", "arguments": arguments, "make_network": make_network, "axes": axes, "data": data}
    return Job(**(settings | {"recipe": recipe, "folder": folder} | changes))


def interrupt_at(monkeypatch: pytest.MonkeyPatch, steps: Iterable[int]) -> None:
    """Ctrl-C in the midst of these steps, counted over all runs."""
    whole, moments = training.augment, set(steps)
    count = 0

    def augment(*args: Any, **kwargs: Any) -> Tensor:
        nonlocal count
        count += 1
        if count in moments:
            raise KeyboardInterrupt
        return whole(*args, **kwargs)

    monkeypatch.setattr(training, "augment", augment)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return a == b


def without_seconds(report: dict[str, Any]) -> dict[str, Any]:
    for result in report["results"].values():
        result.pop("seconds")
    return report


def written(folder: Path) -> dict[str, Any]:
    return {
        "dense": load_file(folder / "dense.safetensors"),
        "sparse": load_file(folder / "sparse.safetensors"),
        "masks": torch.load(folder / "sparsifier.pt", weights_only=True),
        "report": without_seconds(json.loads((folder / "report.json").read_text())),
    }


# Steps 1 to 9 are dense, 10 to 18 sparse; an interrupted epoch is taken from its beginning again.
MOMENTS = {
    "first step": [1],
    "second dense epoch": [5],
    "first sparse step": [10],
    "second sparse epoch": [14],
    "last step": [18],
    "again and again": [5, 8, 14, 20, 23],
}


#: The criterion that remembers is interrupted at every moment, each of the others at two of them.
INTERRUPTED = [
    *(("updating_movement", moment) for moment in MOMENTS),
    *(("large_final", moment) for moment in ("second dense epoch", "last step")),
    *(("random", moment) for moment in ("first sparse step", "again and again")),
    *(("taylor", moment) for moment in ("first step", "second sparse epoch")),
]


@pytest.mark.parametrize(("criteria", "moment"), INTERRUPTED)
def test_a_resumed_run_equals_an_uninterrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, criteria: str, moment: str
) -> None:
    monkeypatch.setattr(pictures, "write_training", lambda *_: None)
    monkeypatch.setattr(pictures, "write_sparsity", lambda *_: None)
    compare(make_job(tmp_path / "whole", criteria))

    interrupt_at(monkeypatch, MOMENTS[moment])
    for _ in MOMENTS[moment]:
        with pytest.raises(KeyboardInterrupt):
            compare(make_job(tmp_path / "broken", criteria))
        assert not (tmp_path / "broken" / "report.json").exists()
        torch.rand(3)  # whatever happens in between
    compare(make_job(tmp_path / "broken", criteria))

    assert same(written(tmp_path / "broken"), written(tmp_path / "whole"))
    assert not (tmp_path / "broken" / "checkpoint.pt").exists()


def test_an_interrupted_end_is_made_up_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compare(make_job(tmp_path / "whole"))
    whole = experiment.output.save_weights
    monkeypatch.setattr(experiment.output, "save_weights", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        compare(make_job(tmp_path / "broken"))
    monkeypatch.setattr(experiment.output, "save_weights", whole)
    compare(make_job(tmp_path / "broken"))
    assert same(written(tmp_path / "broken"), written(tmp_path / "whole"))


def test_an_interrupted_run_ends_without_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt_at(monkeypatch, [14])
    with heard() as said:
        with pytest.raises(KeyboardInterrupt):
            compare(make_job(tmp_path))
        gc.collect()
    assert said == []


def test_both_trainings_start_alike_and_see_the_same_batches(tmp_path: Path) -> None:
    report = compare(make_job(tmp_path, sparsity=0.0))
    assert report["history"]["dense"] == report["history"]["sparse"]
    assert same(load_file(tmp_path / "dense.safetensors"), load_file(tmp_path / "sparse.safetensors"))


def test_report_counts_what_was_written(tmp_path: Path) -> None:
    report = compare(make_job(tmp_path))
    sparse, dense = load_file(tmp_path / "sparse.safetensors"), load_file(tmp_path / "dense.safetensors")

    # 6x3x3x3 + 2x216 = 594 weights, 535 of them pruned (0.9 x 594 = 534.6); 20 more in biases and norms.
    assert sum(layer["pruned"] for layer in report["layers"]) == 535
    assert {layer["name"]: layer["weights"] for layer in report["layers"]} == {"0.weight": 162, "5.weight": 432}
    for layer in report["layers"]:
        assert layer["zeros"]["sparse"] == int((sparse[layer["name"]] == 0).sum())
        assert layer["zeros"]["dense"] == int((dense[layer["name"]] == 0).sum())
    assert report["results"]["sparse"]["weights"] == 594 + 20
    assert 535 <= report["results"]["sparse"]["zeros"] <= 535 + 20
    assert report["schedule"][0] == [0.0, 0.0]
    assert report["schedule"][-1] == [3.0, 535 / 594]
    assert report == json.loads((tmp_path / "report.json").read_text())
    assert {path.name for path in tmp_path.iterdir()} == {
        "dense.safetensors", "sparse.safetensors", "sparsifier.pt", "report.json", "training.png", "sparsity.png",
    }  # fmt: skip


def test_the_dense_training_can_be_left_out(tmp_path: Path) -> None:
    compare(make_job(tmp_path / "both"))
    report = compare(make_job(tmp_path / "sparse", with_dense=False))
    assert list(report["results"]) == ["sparse"]
    assert not (tmp_path / "sparse" / "dense.safetensors").exists()
    weights = [load_file(tmp_path / name / "sparse.safetensors") for name in ("both", "sparse")]
    assert same(*weights)


def test_resuming_with_other_arguments_names_what_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt_at(monkeypatch, [5])
    with pytest.raises(KeyboardInterrupt):
        compare(make_job(tmp_path))
    other = {**make_job(tmp_path).arguments, "sparsity": 0.5, "data": "elsewhere"}
    with pytest.raises(UsageError, match=r"DATA was None and is 'elsewhere'; --sparsity was 0\.9 and is 0\.5$"):
        compare(make_job(tmp_path, arguments=other))


def test_other_files_are_told_in_words(tmp_path: Path) -> None:
    arguments = {"files": "one"}
    compare(make_job(tmp_path, arguments={**make_job(tmp_path).arguments, **arguments}))
    with pytest.raises(UsageError, match="the files in DATA are others now"):
        finished_report(tmp_path, {**make_job(tmp_path).arguments, "files": "other"})


def test_a_complete_run_is_found_again(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    assert finished_report(tmp_path, job.arguments) is None
    report = compare(job)
    assert finished_report(tmp_path, job.arguments) == report
