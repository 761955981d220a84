"""Small network made of the sparse one by removing silent channels, and the figures of all networks."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fasterai.analyze.comparison import Comparison, compare
from fasterai.analyze.latency import batch_of
from fasterai.cli.data import Data
from fasterai.cli.output import SMALL, file_of
from fasterai.cli.training import Recipe, evaluate
from fasterai.model.running import at_rest
from fasterai.prune.removal import remove
from fasterai.prune.small_files import save_small

__all__ = ["WHOLE_CHANNELS", "make_small"]

#: Granularities whose units are whole outputs, which can be taken out.
WHOLE_CHANNELS = ("coupled", "filter")
EXAMPLES, BATCH = 8, 32
#: Seconds of timing for each network and batch size; where one image takes longer than the second, a batch is not timed.
RUN_TIME, QUICK = 0.3, 0.05


def make_small(networks: Mapping[str, nn.Module], data: Data, recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Remove the silent channels of the sparse network, write the result, and measure it beside the others.

    Args:
        networks: Stage -> trained network, `sparse` the last; none of them is changed.
        data: The images that they were trained on.
        recipe: The settings of their training.
        folder: The folder with the other networks' files, where the small one is written.

    Returns:
        Its part of the report; if there is no small network, the reason.
    """
    small = copy.deepcopy(networks["sparse"])
    inputs = data.examples(EXAMPLES, recipe.device)
    try:
        removal = remove(small, inputs, measure=False)
    except ValueError as error:  # a training that went well is not to fail for it
        return {"why_not": str(error)}
    if not removal.removed:
        return {"why_not": "no removable channel is silent"}
    save_small(file_of(folder, SMALL), small)
    accuracy, loss = evaluate(small, data, data.valid, recipe)
    models = {**networks, SMALL: small}
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it tells of CUDA toolkits without a GPU
    measured = compare(models, inputs[:1], batch_sizes=_batch_sizes(small, inputs[:1]), min_run_time=RUN_TIME)
    return {
        "why_not": "",
        "accuracy": accuracy,
        "validation_loss": loss,
        "costs": {name: _cost(measured, name, folder) for name in models},
        "times": _times(measured),
        "removal": removal.to_dict(),
    }


def _cost(measured: Comparison, name: str, folder: Path) -> dict[str, int]:
    cost = measured.costs[name]
    counts = {"parameters": cost.parameters, "nonzero": cost.nonzero, "macs": cost.macs}
    return counts | {"file_bytes": file_of(folder, name).stat().st_size}


def _times(measured: Comparison) -> dict[str, Any]:
    """Return for each batch size the seconds of a forward pass and the speed relative to the first network."""
    latency = measured.latency
    assert latency is not None
    first = latency.models[measured.first]
    rows = []
    for i, size in enumerate(latency.batch_sizes):
        medians = {name: one[size].median for name, one in latency.models.items()}
        as_fast = {name: latency.ratio(name, size) for name in medians}
        quartiles = {name: list(latency.quartiles[name][i]) for name in medians}
        rows.append({"images": size, "seconds": medians, "as_fast": as_fast, "quartiles": quartiles})
    return {"device": first.device, "threads": first.threads, "batches": rows}


def _batch_sizes(network: nn.Module, image: Tensor) -> tuple[int, ...]:
    """Return (1, 32), or (1,) if a pass of one image takes so long that a batch is not timed."""
    with at_rest(network):
        network(*batch_of((image,), 2))  # warm
        start = time.perf_counter()
        network(image)
        return (1, BATCH) if time.perf_counter() - start < QUICK else (1,)
