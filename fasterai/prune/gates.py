"""Gates of experts, watched and closed while a model runs: a closed expert is one that is not there."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fasterai.graph.experts import ExpertGraph, expert_graph
from fasterai.model.inputs import positional
from fasterai.prune.surgery.plan import tensor_of, tensors_of

__all__ = ["Gates", "Which", "check_any", "check_left", "read_which", "without_experts"]

#: Experts by their numbers, of each mixture or by its name.
Which = Sequence[int] | Mapping[str, Sequence[int]]
#: Functions by which a gate's layer works its logits out.
PRODUCTS = frozenset((F.linear, torch.matmul, torch.mm, torch.addmm, Tensor.matmul, Tensor.mm, Tensor.__matmul__))


class Gates(TorchFunctionMode):
    """While it is entered, the logits of some experts are minus infinity, so that a softmax or a choice passes them by.

    Args:
        model: The model that runs.
        experts: Its mixtures.
        closed: Name of a mixture -> numbers of the experts to close.

    Attributes:
        logits: Name of a mixture -> its gate's logits `(..., expert)` of the passes so far.
    """

    def __init__(self, model: nn.Module, experts: ExpertGraph, closed: Mapping[str, Sequence[int]]) -> None:
        super().__init__()
        tensors = tensors_of(model)
        self._closed = closed
        self._names = {id(tensor_of(tensors, p)): name for name, places in experts.gates.items() for p, _ in places}
        self.logits: dict[str, list[Tensor]] = {name: [] for name in experts.gates}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        name = self._gate_of((*args, *(kwargs or {}).values())) if func in PRODUCTS else None
        if name is None:
            return made
        gone = self._closed.get(name, ())
        if len(gone):
            made = made.index_fill(-1, torch.as_tensor(list(gone), device=made.device), -math.inf)
        self.logits[name].append(made.detach())
        return made

    def _gate_of(self, arguments: Sequence[Any]) -> str | None:
        """Return the mixture whose gate's weight is among a product's arguments, as it stands or transposed."""
        for x in arguments:
            if isinstance(x, Tensor):
                name = self._names.get(id(x)) or self._names.get(id(x._base))
                if name is not None:
                    return name
        return None


@contextmanager
def without_experts(model: nn.Module, example_inputs: Any, which: Which) -> Iterator[None]:
    """Run a model as if some experts were not there: their gates' logits are minus infinity.

    A softmax is then one over the rest, and a choice of the highest is made among the rest. What `remove_experts` leaves
    computes the same. Gradients pass, so that a model can be trained so.

    Args:
        model: The model, wrapped or not; as before once the block is left.
        example_inputs: A tensor or tuple that the model runs on.
        which: Numbers of the experts, of each mixture, or by the name of the mixture.

    Raises:
        ValueError: There is no mixture, no such expert, or too few are left.
    """
    experts = expert_graph(model, positional(example_inputs))
    with Gates(model, experts, read_which(experts, which)):
        yield


def read_which(experts: ExpertGraph, which: Which) -> dict[str, list[int]]:
    """Return name of a mixture -> numbers of the experts that go, in order, for those that lose some.

    Raises:
        TypeError: A number is none.
        ValueError: There is no mixture or no such expert, none is named, or too few are left.
    """
    check_any(experts)
    if isinstance(which, Mapping):
        for name in which:
            if name not in experts.experts:
                raise ValueError(f"which must name mixtures of {', '.join(experts.experts)}, got {name!r}")
    by_name = dict(which) if isinstance(which, Mapping) else dict.fromkeys(experts.experts, which)
    found = {name: _numbers(name, numbers, experts.experts[name]) for name, numbers in by_name.items()}
    if not any(found.values()):
        raise ValueError(f"which must name at least one expert, got {which!r}")
    check_left(experts, {name: len(numbers) for name, numbers in found.items()}, f"which={which!r}")
    return {name: numbers for name, numbers in found.items() if numbers}


def _numbers(name: str, numbers: Sequence[int], count: int) -> list[int]:
    if isinstance(numbers, str) or not isinstance(numbers, Sequence):
        raise TypeError(f"which must be numbers of experts, got {numbers!r} ({type(numbers).__name__})")
    for n in numbers:
        if isinstance(n, bool) or not isinstance(n, int):
            raise TypeError(f"which must be numbers of experts, got {n!r} ({type(n).__name__})")
        if not 0 <= n < count:
            raise ValueError(f"which must be experts 0 to {count - 1} of {name}, got {n}")
    return sorted(set(numbers))


def check_any(experts: ExpertGraph) -> None:
    """Refuse a model without mixtures of stacked experts.

    Raises:
        ValueError: It has none.
    """
    if not experts.experts:
        raise ValueError(
            "model must hold a mixture: stacks (expert, out, in) that meet the softmax of a gate's linear layer, got none; "
            "stack experts that are modules of their own"
        )


def check_left(experts: ExpertGraph, gone: Mapping[str, int], given: str) -> None:
    """Refuse to leave a mixture with no expert, or with fewer than its gate chooses.

    Args:
        experts: The mixtures.
        gone: Name of a mixture -> how many of its experts go.
        given: The argument that says so, and its value.

    Raises:
        ValueError: There is no mixture, or too few are left of one.
    """
    check_any(experts)
    for name, count in gone.items():
        left, least = experts.experts[name] - count, experts.top_k.get(name, 1)
        if left < least:
            why = f"the {least} experts that its gate chooses" if name in experts.top_k else "one expert"
            argument, _, value = given.partition("=")
            raise ValueError(f"{argument} must leave {name} at least {why}, got {value} of {experts.experts[name]}")
