"""Study of transformers: half of all widths by one line, beside the dense network and one of these widths from scratch."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasterai.analyze.cost import cost
from fasterai.analyze.latency import compare_latency
from fasterai.core.participant import Participant
from fasterai.export.onnx import ONNXModel, export_onnx
from fasterai.model.outputs import movement
from fasterai.prune.removal import remove
from fasterai.prune.small_files import load_small, save_small
from fasterai.sparse.sparsifier import Sparsifier
from fasterai.study.description import Settings, Size, Study
from fasterai.study.streams import Both, Widths, load_both, make_llama, make_vit
from fasterai.study.workbench import take_steps

__all__ = ["STUDY", "trial"]

VIT, LLAMA = "ViT", "Llama"
DENSE, SMALL, SCRATCH, LONGER = "dense", "half removed", "half from scratch", "half from scratch, equal cost"
WIDTHS = Widths()
BATCHES = (1, 8)


def trial(settings: Settings, seed: int, size: Size, data: Both) -> dict[str, float]:
    """Train a network: dense, dense and pruned meanwhile, or half as wide from the first step on; then measure what is left.

    The half that is removed is masked in steps during the training and taken out at the end; all figures are those of the
    file that is written then, read again. From scratch, half the widths train for as many steps, or for as many as cost what
    the dense network's do.
    """
    what, kind = settings["what"], settings["network"]
    part: Any = data.images if kind == VIT else data.text
    if kind == LLAMA:  # a sequence is more to read than an image
        size = replace(size, epochs=max(1, size.epochs // 2), batch_size=size.batch_size // 2)
    torch.manual_seed(seed)
    network = _make(kind, part, WIDTHS.halved() if what in (SCRATCH, LONGER) else WIDTHS)
    if what != SMALL:
        _train(network, part, size, seed, times=_times(kind, part) if what == LONGER else 1.0)
        return _figures(network, part, size)
    example = part.train[0][:2]
    sparsifier = Sparsifier(network, "coupled", sparsity=0.5, schedule="agp", example_inputs=example, round_to=1)
    _train(network, part, size, seed, [sparsifier])
    moved = _removed(network, example)
    with tempfile.TemporaryDirectory() as folder:
        save_small(Path(folder, "small.safetensors"), network)
        network = load_small(Path(folder, "small.safetensors"), _make(kind, part, WIDTHS)).to(example.device)
        onnx = _exported(network, example, Path(folder, "small.onnx")) if size.name != "tiny" else {}
    return {**_figures(network, part, size), **moved, **onnx, **_times_of(network, kind, part, size)}


def _make(kind: str, part: Any, widths: Widths) -> nn.Module:
    return make_vit(part, widths) if kind == VIT else make_llama(part, widths)


def _times(kind: str, part: Any) -> float:
    """Return how many steps of half the widths cost as much as one of the dense network, by MACs."""
    dense, half = (cost(_make(kind, part, widths), part.train[0][:1]).macs for widths in (WIDTHS, WIDTHS.halved()))
    return dense / half


def _train(
    network: nn.Module, part: Any, size: Size, seed: int, participants: Sequence[Participant] = (), times: float = 1.0
) -> None:
    """Train with AdamW under a one-cycle rate; the order follows from the seed."""
    inputs, wanted = part.train
    per_epoch = max(1, len(inputs) // size.batch_size)
    steps = round(times * size.epochs * per_epoch)
    generator = torch.Generator().manual_seed(seed)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for step in range(steps):
            if step % per_epoch == 0:
                order = torch.randperm(len(inputs), generator=generator)
            rows = order[step % per_epoch * size.batch_size :][: size.batch_size].to(inputs.device)
            yield inputs[rows], wanted[rows]

    optimizer = torch.optim.AdamW(network.parameters(), size.lr)
    take_steps(network, optimizer, batches(), F.cross_entropy, participants, lr=size.lr, steps=steps)


def _removed(network: nn.Module, example: Tensor) -> dict[str, float]:
    """Remove what is silent; return how far the outputs moved, as a share of their scale, and how many groups stayed whole."""
    with torch.no_grad():
        before = network.eval()(example)
        removal = remove(network, example, measure=False)
        moved = movement(before, network(example)).share
    return {"moved": moved, "refused": float(len(removal.refused))}


def _exported(network: nn.Module, example: Tensor, path: Path) -> dict[str, float]:
    """Write an ONNX file, run it, and return how far its outputs are from the network's, and its size."""
    export_onnx(network, example, path)
    with torch.no_grad():
        moved = movement(network(example), ONNXModel(path).outputs((example,))[0]).share
    return {"onnx_moved": moved, "onnx_kB": path.stat().st_size / 1000}


@torch.no_grad()
def _figures(network: nn.Module, part: Any, size: Size) -> dict[str, float]:
    """Measure accuracy and cross-entropy in bits: for each image, or each next character; and what the network costs."""
    network.eval()
    right = bits = 0.0
    for x, y in zip(*(torch.split(rows, 500) for rows in part.test), strict=True):
        logits = network(x)
        right += float((logits.argmax(1) == y).sum())
        bits += float(F.cross_entropy(logits, y, reduction="sum")) / math.log(2)
    count, found = part.test[1].numel(), cost(network, part.train[0][:1])
    cheap = {"parameters": float(found.parameters), "macs": float(found.macs), "file_kB": found.file_bytes / 1000}
    return {"accuracy": right / count, "bits": bits / count, **cheap}


def _times_of(network: nn.Module, kind: str, part: Any, size: Size) -> dict[str, float]:
    """Time a forward pass on one thread beside the dense network and one of half the widths, in turns."""
    models = {"dense": _make(kind, part, WIDTHS), "small": network, "scratch": _make(kind, part, WIDTHS.halved())}
    times = compare_latency(models, part.train[0][:1], batch_sizes=BATCHES, min_run_time=0.01 if size.name == "tiny" else 1.0)
    return {f"{name}_batch{n}_ms": 1000 * times.models[name][n].median for n in BATCHES for name in models}


GRID: list[dict[str, list[Any]]] = [{"network": [VIT, LLAMA], "what": [DENSE, SMALL, SCRATCH, LONGER]}]
TINY: list[dict[str, list[Any]]] = [{"network": [VIT], "what": [SCRATCH, SMALL]}]
SIZES = {
    "tiny": Size("tiny", 64, 40, 8, epochs=1, batch_size=32, lr=2e-3),
    "small": Size("small", 6_000, 2_000, 16, epochs=4, lr=2e-3),
    "full": Size("full", None, None, 32, epochs=30, batch_size=128, lr=1e-3),
}
STUDY = Study(
    name="transformers",
    about="A ViT and a Llama that lose half of all widths, beside dense ones and half ones from scratch",
    trial=trial,
    grids={"tiny": TINY, "small": GRID, "full": GRID},
    x="what",
    lines="network",
    panels="network",
    reference={"what": DENSE},
    sizes=SIZES,
    load=load_both,
)
