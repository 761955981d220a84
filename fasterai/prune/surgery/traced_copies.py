"""Traced copies of modules, which run a trace of their code with edits instead of the code.

Code such as `x.reshape(B, N, C)`, with the width of its input where that of its heads is meant, cannot lose heads. So the
module's `forward` is traced by `torch.fx`, for training and for eval mode, the numbers in it are edited, and the module gets a
class of its own whose `forward` is the result. It stays the same object: parameters, names, hooks and attributes are as before,
and undoing is to give it its class back.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

from torch import nn
from torch.fx import Graph

from fasterai.prune.surgery.forks import Tree, code_function, operations
from fasterai.prune.surgery.rewriting import Rewrite, Way, apply_edits
from fasterai.prune.surgery.tracing import KEPT, code_of, plain_class, traced

__all__ = ["change_rewrites", "edited", "put_class", "rewrite_of", "traced_class"]


def rewrite_of(module: nn.Module) -> Rewrite | None:
    """Return how a module was rewritten; None where it runs its own code."""
    return type(module).rewrite if isinstance(module, _Traced) else None


def edited(module: nn.Module, rewrite: Rewrite) -> tuple[Graph, Graph]:
    """Return a module's traces for eval and training mode, edited.

    Raises:
        ValueError: It cannot be traced, does other operations in training, or an edit does not fit.
    """
    graphs = tuple(traced(module, dict(rewrite.given), training) for training in (False, True))
    if operations(graphs[0]) != operations(graphs[1]):
        raise ValueError("its code does other operations in training")
    for graph in graphs:
        apply_edits(graph, rewrite.edits)
    return graphs[0], graphs[1]


class _Traced:
    """Parts that the classes of traced copies share: the rewrite, and how they are copied and pickled."""

    rewrite: Rewrite

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        made = object.__new__(type(self))
        memo[id(self)] = made
        vars(made).update(copy.deepcopy(vars(self), memo))
        return made

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _waiting, (plain_class(cast(nn.Module, self)), self.rewrite), vars(self)


def _waiting(base: type[nn.Module], rewrite: Rewrite) -> Any:
    """Return a module that is traced once a pickle has given it its parts."""

    def restore(self: Any, state: dict[str, Any]) -> None:
        self.__class__ = base
        vars(self).update(state)
        put_class(self, traced_class(self, rewrite))

    return object.__new__(type(base.__name__, (base,), {"__setstate__": restore}))


def traced_class(module: nn.Module, rewrite: Rewrite) -> type[nn.Module]:
    """Make the class of a module's traced copy; to give it to the module is what puts the copy in its place.

    Raises:
        ValueError: The module cannot be traced, or an edit does not fit.
    """
    base, code = plain_class(module), code_of(module)
    forward = _in_one(module, rewrite) if rewrite.ways is None else _by_ways(module, rewrite, rewrite.ways)
    forward.__signature__ = inspect.signature(code)  # type: ignore[attr-defined]
    forward.__doc__ = code.__doc__
    own = {"forward": forward, "rewrite": rewrite, "__module__": base.__module__, "__doc__": base.__doc__, "_stands_for": base}
    if (followed := rewrite.followed()) != rewrite:
        own["follows"] = traced_class(module, followed)
    made: Any = type(base)
    return cast(type[nn.Module], made(f"Traced{base.__name__}", (_Traced, base), own))


def _in_one(module: nn.Module, rewrite: Rewrite) -> Callable[..., Any]:
    """Make the forward of code that takes no decisions."""
    graphs = edited(module, rewrite)
    in_eval, in_training = (code_function(graph) for graph in graphs)
    if graphs[0].python_code("self").src == graphs[1].python_code("self").src:
        return in_eval

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return in_training(self, *args, **kwargs) if self.training else in_eval(self, *args, **kwargs)

    return forward


def _by_ways(module: nn.Module, rewrite: Rewrite, ways: Sequence[Way]) -> Callable[..., Any]:
    """Make the forward of code that decides by sizes."""
    in_eval, in_training = (Tree(module, dict(rewrite.given), rewrite.edits, ways, training) for training in (False, True))

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return in_training.run(self, args, kwargs) if self.training else in_eval.run(self, args, kwargs)

    return forward


def change_rewrites(
    model: nn.Module, rewrites: Mapping[str, Rewrite]
) -> Iterator[tuple[Callable[[], None], Callable[[], None]]]:
    """Give for each module a function that puts its traced copy in its place, and one that takes it back.

    Raises:
        ValueError: There is no such module, it cannot be traced, or an edit does not fit.
    """
    for name, rewrite in rewrites.items():
        try:
            module = model.get_submodule(name)
            before, after = type(module), traced_class(module, rewrite)
        except (AttributeError, ValueError) as error:
            which = name or "the model itself"
            raise ValueError(f"plan must be for this model, got one with edits of {which}, but {error}") from error
        yield _class_setter(module, after), _class_setter(module, before)


def _class_setter(module: nn.Module, to: type[nn.Module]) -> Callable[[], None]:
    return lambda: put_class(module, to)


def put_class(module: nn.Module, to: type[nn.Module]) -> None:
    """Give a module another class; a forward that it has set itself steps aside for a traced one."""
    module.__class__ = to
    held, now = (KEPT, "forward") if not issubclass(to, _Traced) else ("forward", KEPT)
    if held in vars(module):
        vars(module)[now] = vars(module).pop(held)
