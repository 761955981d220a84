"""The values that are passed between the layers: layouts of parameters, targets, evidence, limits of a choice, moves.

To add evidence: a `Gatherer` that a criterion names, whose result is in `gathered`; or, for evidence that many criteria need, a
field of `Evidence`, its name in `EVIDENCE`, and a function that gathers it in `fasterai/units/evidence.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["EVIDENCE", "Evidence", "Layout", "Limits", "Move", "Target", "held_parameter", "no_mask"]

#: What a criterion may ask for by name beyond the weight.
EVIDENCE = (
    *("gradient", "initial", "previous", "hessian_gradient", "synaptic_flow"),
    *("activation", "activation_max", "activation_mean", "outputs", "hessian_diagonal"),
)


@dataclass(frozen=True)
class Layout:
    """The meaning of a parameter's dimensions: the axes that each one belongs to.

    A grouped convolution's weight `(O, I/G, *K)` is viewed as `(G, O/G, I/G, *K)`; its first dimension then belongs to
    the axis `out` and to the axis `in`. For all other parameters the view is the parameter's own shape.

    Attributes:
        shape: The view's shape; `parameter.view(shape)` is valid.
        axes: For each dimension of the view the axes it belongs to: `out`, `in`, `expert`, `depth`, `height`, `width`.
    """

    shape: tuple[int, ...]
    axes: tuple[frozenset[str], ...]

    @property
    def names(self) -> frozenset[str]:
        """All axes that the parameter has."""
        return frozenset().union(*self.axes)

    @property
    def has_kernel(self) -> bool:
        """True if there are kernel axes, as a convolution's weight has."""
        return bool(self.names & {"depth", "height", "width"})

    def size(self, axis: str) -> int:
        """Return the number of indices of an axis (1 if the parameter does not have it)."""
        result = 1
        for length, names in zip(self.shape, self.axes, strict=True):
            result *= length if axis in names else 1
        return result


@dataclass(frozen=True)
class Target:
    """A prunable parameter.

    Attributes:
        name: Its name in `model.named_parameters()`, without the prefixes that wrappers add.
        module: The module that holds it.
        attribute: Its name in that module.
        kind: `convolution`, `linear`, `attention`, `recurrent`, `embedding` or `other`.
        layout: The meaning of its dimensions.
        aliases: Further names of the same (tied) parameter.
    """

    name: str
    module: nn.Module
    attribute: str
    kind: str
    layout: Layout
    aliases: tuple[str, ...] = ()

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter itself, looked up anew each time.

        Raises:
            ValueError: The module has lost it, as a parametrisation takes it away.
        """
        return held_parameter(self.name, self.module, self.attribute)

    @property
    def module_name(self) -> str:
        """The module's name; empty for the model itself."""
        return self.name.rpartition(".")[0]


def held_parameter(name: str, module: nn.Module, attribute: str) -> nn.Parameter:
    """Return a parameter of a module; `name` is its full name, for the message.

    Raises:
        ValueError: The module has lost it, as a parametrisation takes it away.
    """
    parameter = module._parameters.get(attribute)
    if parameter is None:
        layer = f"{name.rpartition('.')[0] or 'the model itself'} ({type(module).__name__})"
        raise ValueError(
            f"model must keep the parameters that it had, got {layer} without its {attribute}; remove what recomputes it "
            "(such as a weight norm or torch.nn.utils.prune), or make masks and pruners after it was added"
        )
    return parameter


def no_mask() -> Tensor | None:
    """Return None: nothing is pruned."""
    return None


def _apply(function: Callable[[Tensor], Tensor], masked: Callable[[], Tensor | None]) -> Tensor | None:
    mask = masked()
    return None if mask is None else function(mask)


@dataclass(frozen=True)
class Evidence:
    """The tensors that a criterion may read to score one target.

    Attributes:
        name: The target's name.
        weight: `(O, I, *K)`, or whatever shape the parameter has; never written to.
        gradient: dL/dw, shape of the weight.
        initial: The weight when the sparsifier was made, shape of the weight.
        previous: The weight when the masks last moved, shape of the weight.
        activation: The 2-norm of every input feature over batch and positions; broadcasts against the weight.
        activation_max: The largest magnitude of every input feature, likewise.
        activation_mean: The mean magnitude of every input feature, likewise.
        outputs: What each output is on a sample of batch and positions, `(outputs, samples)`; for rules on units.
        hessian_gradient: Hg, shape of the weight (GraSP).
        synaptic_flow: dR/d|w|, shape of the weight (SynFlow).
        hessian_diagonal: An estimate of the second derivatives d2L/dw2, shape of the weight.
        layout: The meaning of the weight's dimensions; None where a part of the weight is scored alone.
        gathered: Gatherer's name -> tensor from a gatherer of the user's own; broadcasts against the weight.
        masked: A function that returns the mask so far, None where nothing is pruned; `keep` calls it.
    """

    name: str
    weight: Tensor
    gradient: Tensor | None = None
    initial: Tensor | None = None
    previous: Tensor | None = None
    activation: Tensor | None = None
    hessian_gradient: Tensor | None = None
    synaptic_flow: Tensor | None = None
    activation_max: Tensor | None = None
    activation_mean: Tensor | None = None
    outputs: Tensor | None = None
    hessian_diagonal: Tensor | None = None
    layout: Layout | None = None
    gathered: Mapping[str, Tensor] = field(default_factory=dict)
    masked: Callable[[], Tensor | None] = no_mask

    @property
    def keep(self) -> Tensor | None:
        """The mask so far: bool, shape of the weight, True = keep; None where nothing is pruned. Computed at each access."""
        return self.masked()

    def map(self, function: Callable[[Tensor], Tensor]) -> Evidence:
        """Return the same evidence with a function applied to every tensor in it."""
        changed: dict[str, Any] = {
            f.name: function(value) for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)
        }
        if self.gathered:
            changed["gathered"] = {name: function(value) for name, value in self.gathered.items()}
        if self.masked is not no_mask:
            changed["masked"] = partial(_apply, function, self.masked)
        return replace(self, **changed)

    def at_least_float32(self) -> Evidence:
        """Return the same evidence with half precision converted to float32, which gives fewer equal scores.

        Tensors of other types are not copied.
        """
        return self.map(lambda x: x.float() if x.dtype in (torch.float16, torch.bfloat16) else x)


@dataclass(frozen=True)
class Limits:
    """The limits of a choice besides the sparsity.

    Attributes:
        min_keep: The number of units of each target that are kept at least.
        may_fall: True if the number of pruned units may fall, so that some come back; False if it may only rise.
        round_to: A multiple that the kept count of each target is rounded up to; one number, or one for each target.
        make_up: True to remove more units elsewhere for those that rounding keeps, as far as possible; only where all targets
            compete.
        nested: True if pruned units stay pruned while their number rises, and kept units stay kept while it falls. If False,
            all units are chosen anew, and the decisions so far only count for `may_fall`.
    """

    min_keep: int = 1
    may_fall: bool = True
    round_to: int | Mapping[str, int] | None = None
    make_up: bool = False
    nested: bool = True


@dataclass(frozen=True)
class Move:
    """A change of masks: the decisions of the pools that have changed, before and after.

    Attributes:
        before: Pool's name -> bool of the units' shape, True = keep; a pool that was dense is all True.
        after: The same after the move.
    """

    before: Mapping[str, Tensor]
    after: Mapping[str, Tensor]
