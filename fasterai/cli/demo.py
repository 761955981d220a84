"""L6. `fasterai demo`: dense, sparse and small on handwritten digits."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fasterai.cli.arguments import check_seed
from fasterai.cli.data import digits
from fasterai.cli.errors import UsageError
from fasterai.cli.experiment import Job, compare
from fasterai.cli.networks import digits_network
from fasterai.cli.output import check_free, holds_run, load_checkpoint, load_report, prepare_folder, remove_checkpoint
from fasterai.cli.tables import result_table
from fasterai.cli.training import Recipe

__all__ = ["run"]

EPOCHS = 15
NETWORK = "digits CNN"
AXES = {
    "sparsity": 0.75,
    "granularity": "coupled",
    "context": "local",
    "criteria": "large_final",
    "schedule": "one_cycle",
}


def run(arguments: argparse.Namespace, epochs: int = EPOCHS) -> int:
    """Train, print and write; an earlier demo in the folder is replaced."""
    check_seed(arguments.seed)
    folder: Path = arguments.output
    prepare_folder(folder)
    _check_replaceable(folder)
    recipe = Recipe(epochs, 64, 5e-3, arguments.seed, torch.device("cpu"), crop=False, flip=False)
    data = digits(arguments.seed)
    known = {"arch": NETWORK, "seed": arguments.seed, "epochs": epochs, "batch_size": 64, "lr": 5e-3, **AXES}
    print(f"{len(data.train):,} digits to train on, {len(data.valid)} to test on")
    print("the same network dense, then with three of four channels silenced on the way, then without these channels\n")
    with one_thread():
        report = compare(Job("demo", known, digits_network, AXES, data, recipe, folder))
    print(f"\n{result_table(report)}\n\nweights, masks, report and pictures: {folder}/")
    return 0


@contextmanager
def one_thread() -> Iterator[None]:
    """Set torch to one thread for a while, since threads slow down so small a network.

    Where other programs use the cores, threads make it many times slower.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _check_replaceable(folder: Path) -> None:
    if not holds_run(folder):
        check_free(folder)
        return
    report = load_report(folder)
    if (report["command"] != "demo") if report is not None else not _is_demos(load_checkpoint(folder)):
        raise UsageError(f"--output must not hold another run, got {folder}")
    remove_checkpoint(folder)


def _is_demos(checkpoint: Mapping[str, Any] | None) -> bool:
    """Tell if a run that was broken off is a demo's."""
    return checkpoint is not None and checkpoint["arguments"].get("arch") == NETWORK
