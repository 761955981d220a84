"""Exact removal over many networks, as a table in Markdown: `python -m tests.sweep [--dtype float64] [NAME ...]`.

In each network a random half of the channels of every group is silenced and removed; the outputs before and after are compared.
A network passes if they agree to 1e-4 of their scale (1e-5 in float64) with the shape unchanged. What stayed is counted.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable

import numpy as np
import torch
import torchvision
from torch import Tensor, nn

from fasterai.prune.graph import channel_graph
from fasterai.prune.removal import mask_channels_, remove

CLASSIFIERS = (
    *("alexnet", "vgg11_bn", "resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2", "densenet121", "squeezenet1_0"),
    *("googlenet", "inception_v3", "mobilenet_v2", "mobilenet_v3_small", "shufflenet_v2_x0_5", "mnasnet0_5", "efficientnet_b0"),
    *("efficientnet_v2_s", "regnet_x_400mf", "regnet_y_400mf", "convnext_tiny", "vit_b_16", "swin_t", "swin_v2_t", "maxvit_t"),
)
SEGMENTATION = ("fcn_resnet50", "deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large")
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-5}


def build(name: str) -> nn.Module:
    """A network with random weights; heads that start at zero are given some, so that outputs have a scale."""
    torch.manual_seed(0)
    options: dict[str, object] = {"weights": None}
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = False
    if name in SEGMENTATION:
        options["weights_backbone"] = None
    zoo = torchvision.models.segmentation if name in SEGMENTATION else torchvision.models
    model = getattr(zoo, name)(**options)
    for module in model.modules():
        if isinstance(module, nn.Linear) and not module.weight.any():
            nn.init.normal_(module.weight, std=0.02)
    return model.eval()


def first_output(model: nn.Module, x: Tensor) -> Tensor:
    """The tensor that counts among what a network returns."""
    with torch.no_grad():
        output = model(x)
    if isinstance(output, dict):
        output = output["out"]
    return output[0] if isinstance(output, tuple) else output


def sweep(name: str, dtype: torch.dtype) -> str:
    """One row of the table."""
    model = build(name).to(dtype)
    side = 299 if name == "inception_v3" else 224 if name in CLASSIFIERS else 96
    x = torch.randn(1, 3, side, side, dtype=dtype)
    start = time.perf_counter()
    graph = channel_graph(model, (x,))
    traced = time.perf_counter() - start
    dice = np.random.default_rng(0)
    kept = [dice.permutation(g.channels) >= g.channels // 2 for g in graph.groups]
    mask_channels_(model, graph, kept)
    before = first_output(model, x)
    removal = remove(model, x)
    after = first_output(model, x)
    seconds = time.perf_counter() - start
    moved = float((after - before).abs().max() / before.abs().max())
    passed = after.shape == before.shape and moved <= TOLERANCE[dtype]
    left = removal.parameters[1] / removal.parameters[0]
    stayed = len(removal.refused)
    why = next(iter(removal.refused.values()), "")[:60]
    verdict = "pass" if passed else "FAILED"
    return (
        f"| {name} | {verdict} | {moved:.0e} | {left:.3f} | {len(graph.groups)} | {stayed} | {traced:.1f} s | {seconds:.1f} s |"
        + (f" {why} |" if stayed else " |")
    )


def guarded(run: Callable[[], str], name: str) -> str:
    """A row also where all fails."""
    try:
        return run()
    except ValueError as error:
        return f"| {name} | refused | | | | | | | {str(error)[:80]} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=[*CLASSIFIERS, *SEGMENTATION])
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, torchvision {torchvision.__version__}, {arguments.dtype}, one thread\n")
    print("| network | removal | outputs moved by | parameters left | groups | groups that stayed | graph | all | why |")
    print("|---|---|--:|--:|--:|--:|--:|--:|---|")
    for name in arguments.names:
        print(guarded(lambda name=name: sweep(name, getattr(torch, arguments.dtype)), name), flush=True)


if __name__ == "__main__":
    main()
