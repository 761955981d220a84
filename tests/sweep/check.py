"""One network: a random half of what may go is silenced and removed, and the outputs before and after are compared.

A comparison of outputs that depend on nothing proves nothing. So weights are scaled until every layer hands on numbers of
scale 1, norms get random statistics, and a network whose outputs do not hear of its inputs or of the masks is called `blind`.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from fasterai.graph.channels import channel_graph
from fasterai.model.inputs import batch_of, listed_samples
from fasterai.prune.removal import mask_channels_, remove

__all__ = ["Row", "check", "difference", "outputs", "randomize_"]

#: How far an output may move, as a share of its scale.
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-5}
#: How far it must move at least when the inputs change or half of the channels fall silent.
POWER = 1e-3
Inputs = tuple[Any, ...]


@dataclass(frozen=True)
class Row:
    """What came of one network.

    Attributes:
        verdict: `pass`, `refused` (with the reason), `failed` or `blind`.
        moved: How far the outputs moved at the removal, as a share of their scale.
        left: Share of the parameters that is left.
        groups: Number of groups of channels that could go.
        stayed: How many of them stayed.
        graph: Seconds of the processor for the channel graph.
        seconds: Seconds of the processor for all.
        stays: What share of the parameters cannot shrink, and why.
        why: What it says where not all went well.
    """

    verdict: str
    moved: float = 0.0
    left: float = 1.0
    groups: int = 0
    stayed: int = 0
    graph: float = 0.0
    seconds: float = 0.0
    stays: str = ""
    why: str = ""


def check(model: nn.Module, inputs: Inputs) -> Row:
    """Silence half, remove it, compare: the row for a network; it is changed."""
    randomize_(model.eval(), inputs)
    dense, heard = outputs(model, inputs), outputs(model, tree_map(_another, inputs))
    if difference(dense, heard) < POWER:
        return Row("blind", why="the outputs do not depend on the inputs")
    trains = not _training(copy.deepcopy(model), inputs)
    model.eval()
    start = time.process_time()
    try:
        graph = channel_graph(model, inputs)
    except ValueError as error:
        return Row("refused", why=str(error))
    traced = time.process_time() - start
    dice = np.random.default_rng(0)
    mask_channels_(model, graph, [dice.permutation(g.channels) >= g.channels // 2 for g in graph.groups])
    masked = outputs(model, inputs)
    elsewhere = [(other, found) for other in others(inputs) if (found := _tried(model, other)) is not None]
    removed = time.process_time()
    removal = remove(model, inputs, measure=False)
    moved = max(
        difference(masked, outputs(model, inputs)),
        *(difference(found, outputs(model, other)) for other, found in elsewhere),
        0.0,
    )
    seconds = traced + time.process_time() - removed
    dtype = next(model.parameters()).dtype
    left = removal.parameters[1] / removal.parameters[0]
    row = Row("pass", moved, left, len(graph.groups), len(removal.refused), traced, seconds, _stays(removal.kept_because))
    if trains and (problem := _training(model, inputs)):
        return Row(**{**vars(row), "verdict": "failed", "why": problem})
    if not moved <= TOLERANCE[dtype]:
        return Row(**{**vars(row), "verdict": "failed", "why": "the outputs moved"})
    if not removal.removed:
        row = Row(**{**vars(row), "verdict": "refused", "why": "" if row.stays else "nothing may go"})
    elif difference(dense, masked) < POWER:
        row = Row(**{**vars(row), "verdict": "blind", "why": "the outputs do not depend on the masks"})
    return row


def _stays(kept_because: Mapping[str, float], least: float = 0.02) -> str:
    """The reasons that keep at least two in a hundred of the parameters, the largest first."""
    return "; ".join(f"{share:.0%} {why}" for why, share in kept_because.items() if share >= least).replace("%", " %")


def outputs(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """The numbers among what a network returns."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # some draw numbers in eval mode too
        found = tree_leaves(model(*inputs))
    return [x.clone() for x in found if isinstance(x, Tensor) and x.is_floating_point()]


def difference(before: list[Tensor], after: list[Tensor]) -> float:
    """The largest difference of an output as a share of that output's scale; infinity where shapes differ."""
    worst = 0.0
    for a, b in zip(before, after, strict=True):
        if a.shape != b.shape:
            return float("inf")
        if not a.numel():
            continue
        scale = a.abs().where(a.isfinite(), 0).max()
        moved = float((a - b).abs().where(a != b, 0).max() / scale.clamp_min(1e-30))
        worst = max(worst, float("inf") if math.isnan(moved) else moved)
    return worst


def others(inputs: Inputs) -> Iterator[Inputs]:
    """Other inputs: of another batch size, larger images, shorter sequences; a network need not take them all."""
    if count := listed_samples(inputs):
        yield batch_of(tree_map(_another, inputs), count + 1)
        return
    yield tree_map(lambda x: torch.cat([_another(x), x]) if isinstance(x, Tensor) and x.dim() else x, inputs)
    if all(isinstance(x, Tensor) and x.dim() >= 4 and x.is_floating_point() for x in inputs):
        yield tree_map(lambda x: torch.cat([x, x.flip(-1)[..., : max(32, x.shape[-1] // 2)]], -1), inputs)
    elif all(isinstance(x, Tensor) and x.dim() >= 2 for x in inputs):
        yield tree_map(lambda x: x[:, :-2] if not x.is_floating_point() else x, inputs)


def _tried(model: nn.Module, inputs: Inputs) -> list[Tensor] | None:
    """What a network returns on other inputs; None if it does not take them."""
    try:
        return outputs(model, inputs)
    except Exception:  # whatever its code raises
        return None


def _training(model: nn.Module, inputs: Inputs) -> str:
    """Train one step in training mode, and say what goes wrong; nothing where the network does not train before, by itself."""
    try:
        found = [x for x in tree_leaves(model.train()(*inputs)) if isinstance(x, Tensor) and x.requires_grad]
    except Exception as error:  # such as a batch norm over a single number, or a detector without targets
        message = f"{type(error).__name__}: {error}"
        return "" if "more than 1 value per channel" in message or "targets" in message else f"training mode: {message}"
    if not found:
        return ""
    sum(x.square().mean() for x in found).backward()
    trained = [p for p in model.parameters() if p.grad is not None]
    if wrong := [p.shape for p in trained if p.grad.shape != p.shape]:
        return f"a gradient of another shape than its weight: {wrong[0]}"
    torch.optim.SGD(trained, 1e-9).step()
    return "" if trained else "no weight gets a gradient"


def _another(x: Any) -> Any:
    """Other pixels of another contrast, or the same tokens in another order."""
    if not isinstance(x, Tensor) or x.dim() == 0:
        return x
    return x.flip(-1) * 2 + 0.5 if x.is_floating_point() else x.flip(-1)


@torch.no_grad()
def randomize_(model: nn.Module, inputs: Inputs) -> None:
    """Weights by which every layer hands on numbers of scale 1, and norms with statistics of their own."""
    dice = torch.Generator().manual_seed(0)
    in_norms = {id(p) for m in model.modules() if "Norm" in type(m).__name__ for p in m.parameters(recurse=False)}
    for name, parameter in model.named_parameters():
        if id(parameter) in in_norms or bool((parameter == parameter.flatten()[0]).all()):
            _unlike(parameter, name, dice)
    seen: set[int] = set()
    with _hooks(model, lambda module, given, result: _rescaled(module, given, result, seen, dice)):
        model(*inputs)


def _unlike(parameter: Tensor, name: str, dice: torch.Generator) -> None:
    """A norm's parameter, or one whose numbers are all the same, gets others: in (0.5, 1.5) if it is a scale, else around 0."""
    noise = torch.rand(parameter.shape, generator=dice, dtype=torch.float64).to(parameter)
    is_bias = name.endswith("bias") or parameter.dim() == 2 or (parameter.dim() > 2 and not parameter.any())
    parameter.copy_((noise - 0.5) * 0.4 if is_bias else noise + 0.5)


@contextmanager
def _hooks(model: nn.Module, hook: Any) -> Iterator[None]:
    handles = [m.register_forward_hook(hook) for m in model.modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _rescaled(module: nn.Module, given: Any, result: Any, seen: set[int], dice: torch.Generator) -> Any:
    """What a layer hands on after its weights, or its statistics, have been made to fit what it is given."""
    if id(module) in seen or not isinstance(result, Tensor):
        return None
    seen.add(id(module))
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
        _fit_statistics(module, given[0], dice)
    elif isinstance(module, nn.Linear | nn.modules.conv._ConvNd) or type(module).__name__ == "Conv1D":
        _fit_weight(module, given)
    else:
        return None
    return type(module).forward(module, *given)


def _fit_weight(module: Any, given: Any) -> None:
    kept = None if module.bias is None else module.bias.clone()
    if kept is not None:
        module.bias.zero_()
    scale = type(module).forward(module, *given).std(unbiased=False)
    if scale > 1e-9:
        module.weight.div_(scale)
    if kept is not None:
        module.bias.copy_(kept)


def _fit_statistics(module: Any, x: Tensor, dice: torch.Generator) -> None:
    channels = x.transpose(0, 1).flatten(1)
    noise = torch.rand((2, module.num_features), generator=dice, dtype=torch.float64).to(x)
    variance = channels.var(1, unbiased=False).clamp_min(channels.var(unbiased=False) * 0.5 + 1e-3)
    module.running_mean.copy_(channels.mean(1) + (noise[0] - 0.5) * variance.sqrt())
    module.running_var.copy_(variance * (noise[1] + 0.5))
