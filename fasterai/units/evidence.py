"""Gatherers of the evidence that criteria need beyond the weight; they leave the model unchanged.

There is one function per kind of evidence, `(model, targets, source) -> target name -> tensor`. To add one, write it and put it
into `GATHERERS`. A gatherer of the user's own is such a function too, named by the criterion itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from fasterai.core.criteria import Criterion
from fasterai.core.loop import Batch
from fasterai.core.types import Target
from fasterai.model.dataflow import leaves
from fasterai.model.inputs import arguments, as_batch
from fasterai.model.names import unwrap
from fasterai.model.running import evaluating, undisturbed

__all__ = ["GATHERERS", "Gatherer", "NotYetError", "Source", "gather"]


class NotYetError(ValueError):
    """The error for evidence that is missing now, but may be there after a later step of a training."""


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
    """

    data: Iterable[Any] | None = None
    batch: Batch | None = None
    loss: Callable[..., Tensor] | None = None
    inputs: tuple[Any, ...] | None = None

    def batches(self, what: str) -> list[Batch]:
        """Return the batches that evidence is computed from: the user's, else the present one of the training.

        Args:
            what: The kind of evidence, for the message.

        Raises:
            ValueError: There are no batches.
        """
        if self.data is not None:
            batches = [as_batch(item) for item in self.data]
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
        # What is frozen may be so for a moment: networks of a GAN take turns.
        error = ValueError if any(t.parameter.requires_grad for t in missing) else NotYetError
        raise error(f"criteria needs gradients, and {missing[0].name} has none: {WHERE_GRADIENTS_ARE}")
    found = {t.name: t.parameter.grad.detach() for t in targets if t.parameter.grad is not None}
    if not any(bool(g.any()) for g in found.values()):
        raise NotYetError(f"criteria needs gradients, and all of them are zero: {WHERE_GRADIENTS_ARE}")
    wild = next((n for n, g in found.items() if not bool(g.isfinite().all())), None)
    if wild is not None:  # an overflow, after which the next step may have others
        raise NotYetError(f"criteria needs finite gradients, and {wild} has one that is infinite or NaN, as after an overflow")
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


@dataclass(frozen=True)
class Statistic:
    """A number computed for each input feature, from its values over batch and positions.

    Attributes:
        part: The result of one call of the layer: `(N, C)` -> `(C,)`.
        join: The joined result of two calls.
        finish: The number itself, of the joined result of all calls and the count of values.
    """

    part: Callable[[Tensor], Tensor]
    join: Callable[[Tensor, Tensor], Tensor]
    finish: Callable[[Tensor, int], Tensor]


NORM = Statistic(lambda x: x.square().sum(0), torch.add, lambda total, n: total.sqrt())
LARGEST = Statistic(lambda x: x.abs().amax(0), torch.maximum, lambda total, n: total)
MEAN = Statistic(lambda x: x.abs().sum(0), torch.add, lambda total, n: total / n)


def activations(model: nn.Module, targets: Sequence[Target], source: Source, statistic: Statistic = NORM) -> dict[str, Tensor]:
    """Compute a statistic of each input feature, by default the 2-norm (Sun et al. 2023); it broadcasts against the weight."""
    found: dict[str, tuple[Tensor, int]] = {}
    inner = unwrap(model)
    handles = []
    try:
        for target in targets:
            handles.append(target.module.register_forward_pre_hook(_watch_inputs(target, statistic, found)))
        with undisturbed(inner), evaluating(inner), torch.no_grad():
            for batch in source.batches("activations"):
                inner(*arguments(inner, batch))
    finally:
        for handle in handles:
            handle.remove()
    unseen = [t.name for t in targets if t.name not in found]
    if unseen:
        raise ValueError(f"targets must be layers whose inputs can be watched, got {unseen[0]}; leave it out with targets=")
    return {t.name: _spread(statistic.finish(*found[t.name]), t) for t in targets}


Gatherer = Callable[[nn.Module, Sequence[Target], Source], Mapping[str, Tensor]]
GATHERERS: dict[str, Gatherer] = {
    "gradient": gradients,
    "hessian_gradient": hessian_gradients,
    "synaptic_flow": synaptic_flow,
    "activation": activations,
    "activation_max": partial(activations, statistic=LARGEST),
    "activation_mean": partial(activations, statistic=MEAN),
}


def gather(criterion: Criterion, model: nn.Module, targets: Sequence[Target], source: Source) -> dict[str, dict[str, Tensor]]:
    """Run the criterion's own gatherers, and return gatherer's name -> target's name -> tensor.

    Raises:
        TypeError: One returns something else than tensors by name.
        ValueError: A target is missing, or a tensor does not broadcast against its weight.
    """
    return {
        name: {t.name: _brought(f"gatherer {name} of criterion {criterion.title}", found, t) for t in targets}
        for name, gatherer in criterion.gatherers.items()
        for found in [gatherer(unwrap(model), targets, source)]
    }


def _brought(gatherer: str, found: Any, target: Target) -> Tensor:
    """Check the result of a gatherer for a target, and return the tensor."""
    if not isinstance(found, Mapping):
        raise TypeError(f"{gatherer} must return a dict of target names to tensors, got a {type(found).__name__}")
    value, shape = found.get(target.name), tuple(target.parameter.shape)
    if not isinstance(value, Tensor):
        raise ValueError(f"{gatherer} must return a tensor for every target, got {value!r} for {target.name}")
    if not _broadcasts(value, shape):
        raise ValueError(
            f"{gatherer} must return tensors that broadcast against the weight, got shape {tuple(value.shape)} "
            f"for {target.name} of shape {shape}"
        )
    return value.detach()


def _broadcasts(value: Tensor, shape: tuple[int, ...]) -> bool:
    sizes = tuple(value.shape)
    return len(sizes) <= len(shape) and all(n in (1, m) for n, m in zip(sizes[::-1], shape[::-1], strict=False))


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


def _watch_inputs(
    target: Target, statistic: Statistic, found: dict[str, tuple[Tensor, int]]
) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        features = _features(target, args)
        if features is not None:
            rows = features.float().reshape(-1, features.shape[-1])
            part, count = statistic.part(rows), len(rows)
            before, so_far = found.get(target.name, (None, 0))
            found[target.name] = (part if before is None else statistic.join(before, part), so_far + count)

    return hook


def _features(target: Target, args: tuple[Any, ...]) -> Tensor | None:
    """Return the features that a layer's weight reads, in the last dimension, `(..., C)`; None if the input hides them."""
    if target.attribute == "in_proj_weight" and isinstance(target.module, nn.MultiheadAttention):
        same = len(args) >= 3 and args[0] is args[1] and args[1] is args[2]
        return args[0] if same else None
    if not args or target.attribute != "weight" or target.kind not in ("convolution", "linear"):
        return None
    x: Tensor = args[0]
    if target.kind == "convolution":
        channels = x.dim() - (len(target.parameter.shape) - 1)
        return x.movedim(channels, -1)
    return x


def _spread(norms: Tensor, target: Target) -> Tensor:
    """Lay out one number per input, `(C,)`, so that they broadcast against the weight.

    For a convolution weight `(8, 3, 5, 5)` the shape `(3,)` becomes `(1, 3, 1, 1)`.
    """
    layout = target.layout
    sizes = [n if "in" in names else 1 for n, names in zip(layout.shape, layout.axes, strict=True)]
    spread = norms.view(sizes)
    if layout.shape == tuple(target.parameter.shape):
        return spread
    return spread.expand(layout.shape).reshape(target.parameter.shape)
