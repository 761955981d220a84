"""Gatherers of the evidence that criteria need beyond the weight; they leave the model unchanged.

There is one function per kind of evidence, `(model, targets, source) -> target name -> tensor`. To add one, write it and put it
into `GATHERERS`. A gatherer of the user's own is such a function too, named by the criterion itself.

Over 300 lines, since it is a catalogue: one function for each kind of evidence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from fasterai.core.loop import Batch
from fasterai.core.types import Target
from fasterai.model.dataflow import leaves
from fasterai.model.inputs import arguments, as_batch
from fasterai.model.names import unwrap
from fasterai.model.running import evaluating, undisturbed
from fasterai.units.watching import LARGEST, MEAN, activations, outputs

__all__ = ["GATHERERS", "Gatherer", "NotYetError", "Source", "activations"]


class NotYetError(ValueError):
    """The error for evidence that is missing now, but may be there after a later step of a training."""


#: Draws of random signs for each batch, of which second derivatives are estimated.
DRAWS = 4
WHERE_GRADIENTS_ARE = (
    "they exist after loss.backward() and before optimizer.zero_grad(); call it there, or pass data=[(x, y), ...] and loss="
)


@dataclass(frozen=True)
class Source:
    """The data, loss function and inputs that evidence is computed from.

    Attributes:
        data: Batches given by the user, else None.
        batch: The present batch of the training, else None.
        loss: The loss function `(output, *targets) -> scalar`, else None.
        inputs: Example inputs of the model, else None.
        less: A function that makes of a batch of the user's what the model takes of it, where that is less; else None.

    Raises:
        TypeError: `loss` is no function.
    """

    data: Iterable[Any] | None = None
    batch: Batch | None = None
    loss: Callable[..., Tensor] | None = None
    inputs: tuple[Any, ...] | None = None
    less: Callable[[Batch], Batch] | None = None

    def __post_init__(self) -> None:
        if self.loss is not None and not callable(self.loss):
            raise TypeError(f"loss must be a function (output, *targets), got {self.loss!r}; loss=F.cross_entropy, say")

    def singly(self, what: str) -> list[Source]:
        """Return a source for each batch of the user's data; itself where there is none."""
        if self.data is None:
            return [self]
        return [replace(self, data=[batch], less=None) for batch in self.batches(what)]

    def batches(self, what: str) -> list[Batch]:
        """Return the batches that evidence is computed from: the user's, else the present one of the training.

        Args:
            what: The kind of evidence, for the message.

        Raises:
            ValueError: There are no batches.
        """
        if self.data is not None:
            batches = [as_batch(item) if self.less is None else self.less(as_batch(item)) for item in self.data]
        else:
            batches = [self.batch] if self.batch is not None else []
        if not batches:
            raise ValueError(
                f"data must be given for a criterion that needs {what}: data=[batch, ...], or train with a callback"
            )
        return batches


def gradients(model: nn.Module, targets: Sequence[Target], source: Source) -> dict[str, Tensor]:
    """Compute the gradients dL/dw of the given data; without data, read those of the last backward pass in `parameter.grad`.

    Over several batches it is the root of the mean square, so that `(g w)^2` is averaged over them as in Molchanov et al. 2019.
    """
    if source.data is not None:
        squares: dict[str, Tensor] = {}
        batches = source.batches("gradients")
        for batch in batches:
            found, _ = _differentiate(model, targets, batch, _loss(source), create_graph=False)
            if len(batches) == 1:
                return found
            for name, g in found.items():
                squares[name] = squares.get(name, torch.zeros_like(g)) + g.square() / len(batches)
        return {name: square.sqrt() for name, square in squares.items()}
    missing = [t for t in targets if t.parameter.grad is None]
    if missing:
        # What is frozen may be so for a moment: networks of a GAN take turns. What others have and one lacks, such as an
        # expert that no sample was sent to, may be there at the next step.
        none = len(missing) == len(targets) and any(t.parameter.requires_grad for t in missing)
        error = ValueError if none else NotYetError
        raise error(f"criteria needs gradients, and {missing[0].name} has none: {WHERE_GRADIENTS_ARE}")
    found = {t.name: t.parameter.grad.detach() for t in targets if t.parameter.grad is not None}
    if not any(bool(g.any()) for g in found.values()):
        raise NotYetError(f"criteria needs gradients, and all of them are zero: {WHERE_GRADIENTS_ARE}")
    if wild := [n for n, g in found.items() if not bool(g.isfinite().all())]:  # the next step may have others
        raise NotYetError(
            f"criteria needs finite gradients, and {wild[0]} has one that is infinite or NaN, as after an overflow"
        )
    return found


def hessian_gradients(model: nn.Module, targets: Sequence[Target], source: Source) -> dict[str, Tensor]:
    """Compute Hg, the Hessian times the gradient, which is the gradient of `g . stop(g)`.

    The model's outputs are divided by 200 first, as in the official code (Wang et al. 2020, GraSP).
    """
    loss = _loss(source)

    def tempered(output: Any, *wanted: Any) -> Tensor:
        return loss(tree_map(lambda x: x / 200 if _is_floats(x) else x, output), *wanted)

    total: dict[str, Tensor] = {}
    for batch in source.batches("the Hessian"):
        g, weights = _differentiate(model, targets, batch, tempered, create_graph=True)
        product = torch.stack([(x * x.detach()).sum() for x in g.values()]).sum()
        found = torch.autograd.grad(product, [weights[n] for n in g], materialize_grads=True)
        for name, hg in zip(g, found, strict=True):
            total[name] = total.get(name, torch.zeros_like(hg)) + hg
    return total


def hessian_diagonal(model: nn.Module, targets: Sequence[Target], source: Source) -> dict[str, Tensor]:
    """Compute the second derivatives d2L/dw2 by Hutchinson's estimator, the mean of `v (H v)` over random signs v.

    Each batch has `DRAWS` draws of signs, from a generator of its own; the loss is that of the data, averaged over batches.
    """
    loss, batches = _loss(source), source.batches("the Hessian")
    generator = torch.Generator().manual_seed(0)
    total: dict[str, Tensor] = {}
    for batch in batches:
        g, weights = _differentiate(model, targets, batch, loss, create_graph=True)
        for draw in range(DRAWS):
            signs = {n: torch.randint(0, 2, x.shape, generator=generator).to(x) * 2 - 1 for n, x in g.items()}
            product = torch.stack([(x * signs[n]).sum() for n, x in g.items()]).sum()
            retain = draw + 1 < DRAWS
            found = torch.autograd.grad(product, [weights[n] for n in g], retain_graph=retain, materialize_grads=True)
            for name, hv in zip(g, found, strict=True):
                part = signs[name] * hv / (DRAWS * len(batches))
                total[name] = total[name] + part if name in total else part
    return total


def synaptic_flow(model: nn.Module, targets: Sequence[Target], source: Source) -> dict[str, Tensor]:
    """Compute dR/d|w| in float64 (Tanaka et al. 2020, SynFlow).

    R is the sum of the model's outputs on inputs of ones, with the absolute values of all weights in place of the weights.
    """
    if source.inputs is None and source.data is None and source.batch is None:
        raise ValueError("example_inputs must be given for synflow, which feeds ones of their shape")
    inputs = source.inputs or arguments(model, source.batches("example inputs")[0])
    if not all(map(_is_floats, inputs)):
        raise ValueError("example_inputs must be tensors of floats for synflow, which feeds ones of their shape")
    model = unwrap(model)
    given = leaves(model)
    wide = {id(x): x.detach().abs().double() if x.is_floating_point() else x for x in given.values()}
    held = {n: wide[id(x)].requires_grad_(x.requires_grad) for n, x in given.items()}
    ones = tuple(torch.ones_like(x[:1], dtype=torch.float64) for x in inputs)
    weights = _held_targets(model, held, targets)
    with undisturbed(model), evaluating(model), torch.enable_grad():
        returned = torch.func.functional_call(model, held, ones, tie_weights=False)
        outputs = [x.sum() for x in tree_leaves(returned) if _is_floats(x)]
        if not outputs:
            raise ValueError("model must return tensors of floats for synflow, which adds them up, got none")
        found = torch.autograd.grad(torch.stack(outputs).sum(), list(weights.values()), allow_unused=True)
    return {n: torch.zeros_like(weights[n]) if g is None else g for n, g in zip(weights, found, strict=True)}


def _is_floats(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


Gatherer = Callable[[nn.Module, Sequence[Target], Source], Mapping[str, Tensor]]
GATHERERS: dict[str, Gatherer] = {
    "gradient": gradients,
    "hessian_gradient": hessian_gradients,
    "hessian_diagonal": hessian_diagonal,
    "synaptic_flow": synaptic_flow,
    "activation": activations,
    "activation_max": partial(activations, statistic=LARGEST),
    "activation_mean": partial(activations, statistic=MEAN),
    "outputs": outputs,
}


def _loss(source: Source) -> Callable[..., Tensor]:
    if source.loss is None:
        raise ValueError("loss must be given for a criterion that needs gradients of data: loss=F.cross_entropy, say")
    return source.loss


def _held_targets(model: nn.Module, held: Mapping[str, Tensor], targets: Sequence[Target]) -> dict[str, Tensor]:
    """Find the targets' stand-ins among the leaves; by parameter, since names in compiled sub-modules are longer."""
    by_parameter = {id(p): held[n] for n, p in model.named_parameters()}
    return {t.name: by_parameter[id(t.parameter)] for t in targets}


def _differentiate(
    model: nn.Module, targets: Sequence[Target], batch: Batch, loss: Callable[..., Tensor], create_graph: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the gradients of one batch's loss, and the leaves that they belong to.

    The model runs in its present mode (train or eval), and its buffers are unchanged.
    """
    model = unwrap(model)
    held = leaves(model)
    weights = _held_targets(model, held, targets)
    with undisturbed(model), torch.enable_grad():
        value = loss(torch.func.functional_call(model, held, arguments(model, batch), tie_weights=False), *batch.targets)
        found = torch.autograd.grad(value, list(weights.values()), create_graph=create_graph, allow_unused=True)
    return {n: torch.zeros_like(weights[n]) if g is None else g for n, g in zip(weights, found, strict=True)}, weights
