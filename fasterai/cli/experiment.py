"""Training of the same network dense and sparse, written to a folder from which an interrupted run can be resumed."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

import fasterai
from fasterai.cli import output, pictures
from fasterai.cli.data import Data
from fasterai.cli.errors import UsageError, told_as_usage
from fasterai.cli.small import WHOLE_CHANNELS, make_small
from fasterai.cli.tables import epoch_line, small_line
from fasterai.cli.training import Recipe, Training, check_epochs
from fasterai.sparse.sparsifier import Sparsifier

__all__ = ["Job", "compare", "finished_report", "make_sparsifier", "versions"]

FORMAT = 1
#: Arguments that nobody gives: hashes of what others name.
CONTENT = {"content": "the weights that --weights names are others now", "files": "the files in DATA are others now"}


@dataclass(frozen=True)
class Job:
    """Description of a comparison: the network, the data and the arguments.

    Attributes:
        command: The command's name.
        arguments: Everything that the result depends on, plain data.
        make_network: Makes the network; called after seeding, once for each training.
        axes: Arguments of the sparsifier: sparsity, granularity, context, criteria, schedule.
        data: The images to train on.
        recipe: Settings of the trainings.
        folder: The folder to write to.
        with_dense: True to train the dense network, too.
        start: Plain data for the report about the trained weights that the network starts from; None if they are random.
    """

    command: str
    arguments: Mapping[str, Any]
    make_network: Callable[[], nn.Module]
    axes: Mapping[str, Any]
    data: Data
    recipe: Recipe
    folder: Path
    with_dense: bool = True
    start: Mapping[str, Any] | None = None

    @property
    def stages(self) -> tuple[str, ...]:
        """Names of the trainings, in their order."""
        return ("dense", "sparse") if self.with_dense else ("sparse",)


def compare(job: Job) -> dict[str, Any]:
    """Train every stage, resume where an earlier run stopped, and write the folder.

    Returns:
        The report, as in report.json.
    """
    output.remove_parts(job.folder)
    checkpoint = output.load_checkpoint(job.folder)
    if checkpoint is not None:
        check_same(checkpoint["arguments"], job.arguments, job.folder)
    done: dict[str, Any] = {}
    if checkpoint is not None:
        with output.told_unreadable(job.folder / output.CHECKPOINT):
            done = _check_done(job, checkpoint["done"], checkpoint["stage"])
    for stage in job.stages:
        if stage in done:
            continue
        with _begin(job, stage) as training:
            if checkpoint is not None and checkpoint["stage"] == stage:
                with output.told_unreadable(job.folder / output.CHECKPOINT):
                    training.load_state_dict(checkpoint["state"])
                print(f"{stage}: going on after epoch {len(training.history)} of {job.recipe.epochs}", flush=True)
            while not training.is_done:
                print(epoch_line(stage, training.run_epoch(), job.recipe.epochs, training.seconds), flush=True)
                _save(job, done, stage, training.state_dict())
            done[stage] = _finish(job, stage, training)
        _save(job, done, None, {})
    report = _report(job, done) | {"small": _small(job)}
    pictures.write_all(report, job.folder)
    output.write_report(report, job.folder)  # its presence says that the run is complete
    output.remove_checkpoint(job.folder)
    return report


def _check_done(job: Job, done: dict[str, Any], stage: str | None) -> dict[str, Any]:
    """Return what a checkpoint says of the stages that are done, if a report can be made of it."""
    if list(done) != list(job.stages[: len(done)]) or stage not in (None, *job.stages[len(done) : len(done) + 1]):
        raise ValueError(f"stages must be {', '.join(job.stages)}, got {', '.join(map(str, [*done, stage]))}")
    json.dumps(done, allow_nan=False)  # as the report will have it
    names = {name for name, _ in job.make_network().named_parameters()} if done else set()
    for record in done.values():
        _result(record)
        if not names == set(record["zeros"]) == set(record["weights"]):
            raise ValueError("zeros and weights must be of the network's parameters")
        check_epochs(record["history"], record["trace"], record["seconds"])
    if len(done) == len(job.stages):
        _report(job, done)
    return done


def finished_report(folder: Path, arguments: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the report of a complete run with the same arguments; None if the folder holds no complete run.

    Raises:
        UsageError: The run was made with other arguments.
    """
    report = output.load_report(folder)
    if report is not None:
        check_same(report["arguments"], arguments, folder)
    return report


def check_same(before: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> None:
    """Refuse to resume with other arguments.

    Raises:
        UsageError: They differ; each difference is named.
    """
    names = sorted(name for name in set(before) | set(now) if before.get(name) != now.get(name))
    differences = [f"{_flag(name)} was {before.get(name)!r} and is {now.get(name)!r}" for name in names if name not in CONTENT]
    differences = differences or [CONTENT[name] for name in names]
    if differences:
        raise UsageError(f"--resume must be with the arguments of the run in {folder}: {'; '.join(differences)}")


def _flag(name: str) -> str:
    return "DATA" if name == "data" else f"--{name.replace('_', '-')}"


def make_sparsifier(network: nn.Module, job: Job) -> Sparsifier:
    """Make the sparsifier of the sparse training.

    Raises:
        UsageError: The axes do not go with each other or with the network.
    """
    inputs = job.data.examples(2, job.recipe.device)
    with told_as_usage():
        return Sparsifier(network, **job.axes, loss=nn.functional.cross_entropy, example_inputs=inputs)


def _begin(job: Job, stage: str) -> Training:
    torch.manual_seed(job.recipe.seed)
    network = job.make_network().to(job.recipe.device)
    sparsifier = make_sparsifier(network, job) if stage == "sparse" else None
    return Training(network, job.data, job.recipe, sparsifier, stage)


def _save(job: Job, done: Mapping[str, Any], stage: str | None, state: Mapping[str, Any]) -> None:
    content = {"arguments": dict(job.arguments), "done": dict(done), "stage": stage, "state": dict(state)}
    output.save_checkpoint(content, job.folder)


def _finish(job: Job, stage: str, training: Training) -> dict[str, Any]:
    """Write a stage's weights, and return its part of the report."""
    training.finish()
    sparsifier = training.sparsifier
    output.save_weights(training.network, output.file_of(job.folder, stage), job.data.classes)
    if sparsifier is not None:
        output.save_masks(sparsifier, job.folder)
    parameters = dict(training.network.named_parameters())
    return {
        "history": training.history,
        "trace": [list(point) for point in training.trace],
        "seconds": training.seconds,
        "zeros": {name: int((p == 0).sum()) for name, p in parameters.items()},
        "weights": {name: p.numel() for name, p in parameters.items()},
        "sparsity": None if sparsifier is None else sparsifier.report().to_dict(),
    }


def _small(job: Job) -> dict[str, Any] | None:
    """Make the small network, and return its part of the report; None if the granularity removes no whole channels."""
    if job.axes["granularity"] not in WHOLE_CHANNELS:
        return None
    networks = {}
    for stage in job.stages:
        networks[stage] = job.make_network().to(job.recipe.device)
        networks[stage].load_state_dict(load_file(output.file_of(job.folder, stage)))
    small = make_small(networks, job.data, job.recipe, job.folder)
    print(small_line(small), flush=True)
    return small


def _report(job: Job, done: Mapping[str, Any]) -> dict[str, Any]:
    reached = done["sparse"]["sparsity"]
    return {
        "format": FORMAT,
        "command": job.command,
        "arguments": dict(job.arguments),
        "versions": versions(),
        "device": str(job.recipe.device),
        "data": job.data.summary(),
        "start": None if job.start is None else dict(job.start),
        "results": {stage: _result(record) for stage, record in done.items()},
        "layers": [
            {
                "name": row["name"],
                "shape": list(row["shape"]),
                "weights": done["sparse"]["weights"][row["name"]],
                "units": row["units"],
                "pruned": row["pruned"],
                "zeros": {stage: record["zeros"][row["name"]] for stage, record in done.items()},
            }
            for row in reached["rows"]
        ],
        "left_out": reached["left_out"],
        "granularity": reached["granularity"],
        "history": {stage: record["history"] for stage, record in done.items()},
        "schedule": done["sparse"]["trace"],
    }


def _result(record: Mapping[str, Any]) -> dict[str, float]:
    last = record["history"][-1]
    zeros, weights = sum(record["zeros"].values()), sum(record["weights"].values())
    return {
        "accuracy": last["accuracy"],
        "validation_loss": last["validation_loss"],
        "sparsity": last["sparsity"],
        "zeros": zeros,
        "weights": weights,
        "seconds": round(record["seconds"], 3),
    }


def versions() -> dict[str, str]:
    """Return the versions of the packages that a result depends on."""
    import numpy as np
    import torchvision

    found = {"fasterai": fasterai.__version__, "python": platform.python_version(), "torch": torch.__version__}
    return found | {"torchvision": torchvision.__version__, "numpy": np.__version__}
