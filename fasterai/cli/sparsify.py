"""L6. `fasterai sparsify`: a classifier of torchvision, trained dense and sparse on a folder of images."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fasterai.cli.arguments import check_arguments
from fasterai.cli.data import Data
from fasterai.cli.errors import UsageError
from fasterai.cli.experiment import Job, compare, finished_report, make_sparsifier
from fasterai.cli.folders import read_data
from fasterai.cli.networks import check_runs, choose_device, make_classifier
from fasterai.cli.output import REPORT, SMALL, file_of, holds_run, prepare_folder, told_unreadable
from fasterai.cli.start import Start, make_started, read_start
from fasterai.cli.tables import result_table
from fasterai.cli.training import Recipe

__all__ = ["run"]

AXES = ("sparsity", "granularity", "context", "criteria", "schedule")
NOT_COMPARED = ("command", "output", "resume", "workers")


def run(arguments: argparse.Namespace) -> int:
    """Check everything, then train, print and write."""
    check_arguments(arguments)
    folder: Path = arguments.output
    if holds_run(folder) and not arguments.resume:
        raise UsageError(f"--output must not hold a run, got {folder}; pass --resume to go on with it, or another folder")
    device = choose_device(arguments.device)
    if arguments.weights in [file_of(folder, name) for name in ("dense", "sparse", SMALL)]:
        raise UsageError(f"--weights must not be a file that the run writes, got {arguments.weights}; move it out of {folder}")
    start = read_start(arguments.weights, arguments.arch)
    job = _make_job(arguments, read_data(arguments), device, start)
    report = finished_report(folder, job.arguments) if arguments.resume else None
    if report is None:
        if arguments.resume and not holds_run(folder):
            print(f"{folder} holds no run to go on with: this one begins at the beginning")
        prepare_folder(folder)
        print(_headline(job))
        report = compare(job)
    else:
        print("this run is complete")
    with told_unreadable(folder / REPORT):
        closing = _closing(report, folder)
    print(closing)
    return 0


def _closing(report: Mapping[str, Any], folder: Path) -> str:
    left = [f"left dense: {name} ({reason})" for name, reason in report["left_out"].items()]
    return "\n".join([f"\n{result_table(report)}\n", *left, f"weights, masks, report and pictures: {folder}/"])


def _make_job(arguments: argparse.Namespace, data: Data, device: torch.device, start: Start | None) -> Job:
    """Make the job, and try network and sparsifier once, so that errors come before the dense training."""
    if start is not None and start.mean is not None and start.std is not None:
        data = replace(data, mean=start.mean, std=start.std)
    recipe = Recipe(arguments.epochs, arguments.batch_size, arguments.lr, arguments.seed, device, flip=not arguments.no_flip)
    tensors, began = ({}, None) if start is None else start.fit(arguments.arch, data.classes, data.image_size)
    made = arguments.arch, len(data.classes), data.image_size
    make = functools.partial(make_classifier, *made) if start is None else functools.partial(make_started, *made, tensors)
    axes = {name: getattr(arguments, name) for name in AXES}
    known = _known(arguments, data, start)
    job = Job("sparsify", known, make, axes, data, recipe, arguments.output, not arguments.no_dense, began)
    network = make().to(device)
    check_runs(network, data.examples(2, device), arguments.arch)
    make_sparsifier(network, job)
    return job


def _known(arguments: argparse.Namespace, data: Data, start: Start | None) -> dict[str, Any]:
    """Return the arguments, data and weights that the result depends on, as plain data."""
    known = {name: value for name, value in vars(arguments).items() if name not in NOT_COMPARED}
    known |= {"data": str(arguments.data.resolve()), "image_size": data.image_size, "files": data.fingerprint}
    if start is None:
        return known
    return known | {"weights": start.name, "content": start.fingerprint}


def _headline(job: Job) -> str:
    data, parameters = job.data, sum(p.numel() for p in job.make_network().parameters())
    lines = [
        f"{len(data.train):,} images to train on, {len(data.valid):,} to validate on ({data.validation}), "
        f"{len(data.classes)} classes, {data.image_size}x{data.image_size}",
        f"{job.arguments['arch']}: {parameters:,} weights; {job.recipe.device}",
    ]
    lines += [] if job.start is None else job.start["notes"]
    lines += [f"left out: {path} ({reason})" for path, reason in data.skipped.items()]
    return "\n".join(lines) + "\n"
