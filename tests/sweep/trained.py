"""One network in training: its masks move for some steps, what is silent goes, and the same optimizer trains what is left.

`python -m tests.sweep --trained` does it for whole zoos. The task is a fixed answer to the inputs, so that the loss can fall.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fasterai.callbacks.plain import attach
from fasterai.prune.removal import remove
from fasterai.sparse.sparsifier import Sparsifier
from tests.sweep.check import TOLERANCE, Inputs, Row, difference, outputs

__all__ = ["trained"]

STEPS = 6


def trained(model: nn.Module, inputs: Inputs, steps: int = STEPS, lr: float = 3e-3) -> Row:
    """Train half of every group to silence, remove it, train on: the row for a network; it is changed."""
    start = time.process_time()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    dice = torch.Generator().manual_seed(0)
    wanted = [torch.randn(x.shape, generator=dice, dtype=torch.float64).to(x) for x in outputs(model.eval(), inputs)]
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr)
    try:
        masks = Sparsifier(model, "coupled", sparsity=0.5, schedule="agp", example_inputs=inputs, round_to=1)
    except ValueError as error:
        return Row("refused", why=str(error))
    with attach(optimizer, masks, total_steps=steps, model=model):
        before = _losses(model, inputs, wanted, optimizer, steps)
    masked = outputs(model.eval(), inputs)
    removal = remove(model, inputs, optimizer=optimizer, measure=False)
    moved = difference(masked, outputs(model.eval(), inputs))
    misfits = [name for name, p in model.named_parameters() if not _fits(optimizer, p)]
    after = _losses(model, inputs, wanted, optimizer, steps)
    left = removal.parameters[1] / removal.parameters[0]
    found = {"moved": moved, "left": left, "groups": len(removal.groups), "stayed": len(removal.refused)}
    why = ""
    if not moved <= TOLERANCE[wanted[0].dtype]:
        why = "the outputs moved"
    elif misfits:
        why = f"the optimizer's state of {misfits[0]} does not fit"
    elif not (before[-1] > 0 and min(after[-2:]) < after[0]):
        why = f"the loss does not fall after it: {after[0]:.4g} to {after[-1]:.4g}"
    verdict = "failed" if why else "pass" if removal.removed else "refused"
    return Row(verdict, **found, seconds=time.process_time() - start, why=why)


def _losses(
    model: nn.Module, inputs: Inputs, wanted: list[Tensor], optimizer: torch.optim.Optimizer, steps: int
) -> list[float]:
    """Train towards the fixed answers, and return the loss of each step."""
    found = []
    model.train()
    for _ in range(steps):
        given = [x for x in tree_leaves(model(*inputs)) if isinstance(x, Tensor) and x.is_floating_point()]
        loss = torch.stack([(x - y).square().mean() for x, y in zip(given, wanted, strict=False)]).sum()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        found.append(loss.item())
    return found


def _fits(optimizer: torch.optim.Optimizer, parameter: Tensor) -> bool:
    """Tell if the moments of a parameter, if there are any, have its shape."""
    state = optimizer.state.get(parameter, {})
    return all(x.shape == parameter.shape for x in state.values() if isinstance(x, Tensor) and x.dim())
