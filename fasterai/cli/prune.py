"""L6. `fasterai prune`: a trained classifier of torchvision is made small, without training."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fasterai.cli.arguments import check_prune_arguments, read_budget
from fasterai.cli.data import Data
from fasterai.cli.errors import UsageError, told_as_usage
from fasterai.cli.experiment import versions
from fasterai.cli.folders import read_data
from fasterai.cli.networks import check_runs, choose_device, how_to_make
from fasterai.cli.output import SMALL, check_new_folder, file_of, new_folder, write_report
from fasterai.cli.pictures import write_removal
from fasterai.cli.runs import origin_of
from fasterai.cli.training import Recipe, evaluate
from fasterai.cli.weights import load_classifier, read_weights
from fasterai.prune.pruner import Pruner
from fasterai.prune.removal import Removal, remove
from fasterai.prune.small_files import save_small

__all__ = ["run"]

FORMAT = 1
IMAGE_SIZE = 224
#: For criteria that need data: how many batches of how many training images.
BATCHES, BATCH_SIZE = 4, 32
#: Files of a run that hold no state dict of weights: what they are, and what tells them.
STATES = {
    "checkpoint.pt": ("the checkpoint", {"arguments", "done", "stage", "state"}),
    "sparsifier.pt": ("the masks' state", {"format", "keep", "granularity"}),
}


@dataclass(frozen=True)
class _Job:
    """Description of a pruning: the network, and the images to run it on.

    Attributes:
        network: The network with its weights, in eval mode.
        inputs: Inputs that it is checked and timed on.
        image_size: The side of the images.
        classes: Number of classes.
        data: Images to measure accuracy on, if any.
        recipe: Settings of runs on them.
        notes: Lines about the weights, to print.
    """

    network: nn.Module
    inputs: Tensor
    image_size: int
    classes: int
    data: Data | None
    recipe: Recipe
    notes: tuple[str, ...]


def run(arguments: argparse.Namespace) -> int:
    """Check everything, then prune, print and write."""
    check_prune_arguments(arguments)
    check_new_folder(arguments.output)
    job = _make_job(arguments)
    print("\n".join([_headline(arguments, job), *job.notes]), end="\n\n", flush=True)
    before = _accuracy(job)
    with told_as_usage():
        removal = _prune(arguments, job)
    print(removal, flush=True)
    if not removal.removed:
        repair = "; pass --sparsity or --budget" if arguments.remove_only else ""
        raise UsageError(f"nothing was removed from {arguments.weights}, and nothing was written{repair}")
    after = _accuracy(job)
    with new_folder(arguments.output) as folder:
        _write(folder, arguments, job, removal, {"before": before, "after": after})
    print(_closing(arguments, job, before, after))
    return 0


def _make_job(arguments: argparse.Namespace) -> _Job:
    device = choose_device(arguments.device)
    _check_no_state(arguments.weights)
    weights = read_weights(arguments.weights)
    origin = origin_of(arguments.weights)
    if origin is not None:  # what is given goes first
        arguments.image_size = arguments.image_size or origin.image_size
    arguments.seed = (0 if origin is None else origin.seed) if arguments.seed is None else arguments.seed
    data = None if arguments.data is None else read_data(arguments)
    if data is not None and origin is not None:
        data = replace(data, mean=origin.mean, std=origin.std)
    image_size = arguments.image_size or IMAGE_SIZE if data is None else data.image_size
    network, classes, left_out = load_classifier(arguments.arch, weights, image_size)
    named = (weights.classes, None if origin is None else origin.classes)
    _check_classes(next((names for names in named if names is not None and len(names) == classes), None), classes, data)
    _check_layers(network, arguments)
    inputs = _noise(arguments.batch, image_size).to(device) if data is None else data.examples(arguments.batch, device)
    check_runs(network.to(device), inputs, arguments.arch, training=False)
    notes = [] if origin is None else [f"image size, normalisation and seed of the run in {arguments.weights.parent}"]
    left = [f"left out, for they serve training alone: {', '.join(sorted({n.split('.')[0] for n in left_out}))}"]
    recipe = Recipe(1, BATCH_SIZE, 1.0, arguments.seed, device)
    return _Job(network, inputs, image_size, classes, data, recipe, tuple(notes + (left if left_out else [])))


def _check_no_state(path: Path) -> None:
    """Refuse the two further files that `fasterai sparsify` writes, by what they hold: neither is a state dict of weights.

    Raises:
        UsageError: It is one of them.
    """
    if path.name not in STATES:
        return
    found: Any = None
    with suppress(Exception):  # told where weights are read
        found = torch.load(path, map_location="cpu", weights_only=True)
    what, keys = STATES[path.name]
    if isinstance(found, Mapping) and keys <= found.keys():
        inside = file_of(path.parent, "sparse")
        repair = f"pass {inside}" if inside.exists() else "pass the sparse.safetensors of a run that is complete"
        raise UsageError(f"WEIGHTS must be a state dict, got {path}, {what} of fasterai sparsify; {repair}")


def _check_classes(names: tuple[str, ...] | None, count: int, data: Data | None) -> None:
    if data is None:
        return
    if count != len(data.classes):
        raise UsageError(f"--data must hold the {count} classes of WEIGHTS, got {len(data.classes)}")
    for own, theirs in zip(names or data.classes, data.classes, strict=True):
        if own != theirs:
            raise UsageError(f"--data must hold the classes of WEIGHTS, got {theirs!r} in the place of {own!r}")


def _check_layers(network: nn.Module, arguments: argparse.Namespace) -> None:
    known = [name for name, _ in network.named_modules() if name]
    for layer in arguments.ignore or ():
        if layer not in known:
            close = difflib.get_close_matches(layer, known, n=3, cutoff=0.5) or known[:3]
            raise UsageError(f"--ignore must be layers of {arguments.arch}, got {layer!r}; such as {', '.join(close)}")


def _noise(count: int, side: int) -> Tensor:
    return torch.randn((count, 3, side, side), generator=torch.Generator().manual_seed(0))


def _accuracy(job: _Job) -> float | None:
    return None if job.data is None else evaluate(job.network, job.data, job.data.valid, job.recipe)[0]


def _prune(arguments: argparse.Namespace, job: _Job) -> Removal:
    if arguments.remove_only:
        return remove(job.network, job.inputs)
    ratio = arguments.sparsity if arguments.budget is None else read_budget(arguments.budget)
    pruner = Pruner(
        job.network,
        ratio,
        arguments.context,
        arguments.criteria,
        ignored_layers=arguments.ignore,
        example_inputs=job.inputs,
        round_to=arguments.round_to,
        data=_batches(job),
        loss=nn.functional.cross_entropy,
    )
    return pruner.prune_model()


def _batches(job: _Job) -> list[tuple[Tensor, Tensor]] | None:
    """Return training images in random order, for criteria that need data; None without data."""
    if job.data is None:
        return None
    order = torch.randperm(len(job.data.train), generator=torch.Generator().manual_seed(job.recipe.seed))
    return list(job.data.batches(job.data.train, torch.split(order, BATCH_SIZE)[:BATCHES], job.recipe.device))


def _write(folder: Path, arguments: argparse.Namespace, job: _Job, removal: Removal, accuracy: dict[str, Any]) -> None:
    save_small(file_of(folder, SMALL), job.network.cpu())
    if arguments.onnx:
        from fasterai.export.onnx import export_onnx

        with told_as_usage():
            export_onnx(job.network, job.inputs.cpu(), folder / "small.onnx")
    write_removal(removal, folder / "small.png")
    known = {name: str(value) if isinstance(value, Path) else value for name, value in vars(arguments).items()}
    report = {
        "format": FORMAT,
        "command": "prune",
        "arguments": {name: value for name, value in known.items() if name not in ("command", "output")},
        "versions": versions(),
        "device": str(job.recipe.device),
        "image_size": job.image_size,
        "classes": job.classes,
        "data": None if job.data is None else job.data.summary(),
        "accuracy": accuracy,
        "removal": removal.to_dict(),
    }
    write_report(report, folder)


def _headline(arguments: argparse.Namespace, job: _Job) -> str:
    parameters, side = sum(p.numel() for p in job.network.parameters()), job.image_size
    found = f"{arguments.arch}: {parameters:,} parameters, {job.classes} classes, {side}x{side} images; {job.recipe.device}"
    return found if job.data is None else f"{found}\n{len(job.data.valid):,} images to validate on ({job.data.validation})"


def _closing(arguments: argparse.Namespace, job: _Job, before: float | None, after: float | None) -> str:
    """Write the accuracy before and after, and the next steps."""
    if before is None or after is None:
        lines = ["accuracy: not measured without images; pass --data FOLDER"]
    else:
        lines = [f"accuracy: {before:.2%} -> {after:.2%} of {len(job.data.valid) if job.data else 0:,} images"]
    if not arguments.remove_only:
        lines.append("the removed channels mattered least, but were not silent: train the small network further")
    make = how_to_make(arguments.arch, job.classes, job.image_size)
    return "\n".join([
        "", *lines, "", "in Python:", "", "from fasterai.prune.all import load_small", "import torchvision", "",
        f"model = torchvision.models.get_model({make})",
        f"load_small({str(file_of(arguments.output, SMALL))!r}, model)",
        "", f"weights, report and picture: {arguments.output}/",
    ])  # fmt: skip
