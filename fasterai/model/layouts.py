"""Layouts of parameters: the axis of each of their dimensions, told by the module that holds them.

To make a module class of your own known, or a parameter whose dimensions stand in another order:
`register_axes(MyLinear, weight=("in", "out"))`. Subclasses inherit it; the closest registered class counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import singledispatch

from torch import nn

from fasterai.core.checks import check_choice
from fasterai.core.types import Layout

__all__ = ["Reading", "by_dimensions", "read_module", "register_axes"]

KINDS = ("convolution", "linear", "attention", "recurrent", "embedding", "other")
KERNEL_AXES: dict[int, tuple[str, ...]] = {1: ("width",), 2: ("height", "width"), 3: ("depth", "height", "width")}


#: The linear layer of Hugging Face's GPT-2, which holds its weight turned.
TURNED = ("transformers.pytorch_utils", "Conv1D")


@dataclass(frozen=True)
class Reading:
    """Kind of a module, and the layouts of its parameters.

    Attributes:
        kind: One of `KINDS`.
        layouts: Parameter name -> layout; names that the module has not got, or holds as None, do not count.
    """

    kind: str
    layouts: Mapping[str, Layout]


def _plain(shape: Sequence[int], *axes: str) -> Layout:
    return Layout(tuple(shape), tuple(frozenset({a}) for a in axes))


def by_dimensions(shape: Sequence[int]) -> Layout:
    """Return the usual layout for a shape: (out), (out, in), (expert, out, in) or (out, in, *kernel)."""
    usual = {1: ("out",), 2: ("out", "in"), 3: ("expert", "out", "in")}
    axes = usual.get(len(shape)) or ("out", "in", *KERNEL_AXES.get(len(shape) - 2, ()))
    if len(axes) != len(shape):
        raise ValueError(f"a target must have 1 to 5 dimensions, got shape {tuple(shape)}; register_axes names them")
    return _plain(shape, *axes)


@singledispatch
def read_module(module: nn.Module) -> Reading | None:
    """Return the kind and layouts of a module; None if its class is not known. `register_axes` adds classes.

    A wrapper that holds a weight of its inner module as `<name>_raw`, and sets the inner one anew at each pass, is read as the
    inner module is: fastai's `WeightDropout` does so with `weight_hh_l0` of an LSTM.
    """
    if any((c.__module__, c.__name__) == TURNED for c in type(module).__mro__):
        return _matrices(module, "linear", ("in", "out"), ["weight"])
    inner = module._modules.get("module")
    raw = [n for n in module._parameters if n.endswith("_raw") and hasattr(inner, n.removesuffix("_raw"))]
    if not raw or not isinstance(inner, nn.RNNBase | nn.Linear):
        return None
    return _matrices(module, "linear" if isinstance(inner, nn.Linear) else "recurrent", ("out", "in"), raw)


@read_module.register(nn.modules.conv._ConvNd)
def _(module: nn.modules.conv._ConvNd) -> Reading:
    weight = module._parameters.get("weight")
    if weight is None or isinstance(weight, nn.parameter.UninitializedParameter):
        return Reading("convolution", {})
    shape, groups = tuple(weight.shape), module.groups
    kernel = KERNEL_AXES[len(shape) - 2]
    first, second = ("in", "out") if module.transposed else ("out", "in")
    if groups == 1:
        return Reading("convolution", {"weight": _plain(shape, first, second, *kernel)})
    view = (groups, shape[0] // groups, *shape[1:])
    axes = tuple(frozenset({a}) for a in (first, second, *kernel))
    return Reading("convolution", {"weight": Layout(view, (frozenset({"out", "in"}), *axes))})


def _matrices(module: nn.Module, kind: str, axes: tuple[str, ...], names: Iterable[str]) -> Reading:
    found = {n: p for n in names if (p := module._parameters.get(n)) is not None and p.dim() == len(axes)}
    return Reading(kind, {n: _plain(p.shape, *axes) for n, p in found.items()})


@read_module.register(nn.Linear)
def _(module: nn.Linear) -> Reading:
    return _matrices(module, "linear", ("out", "in"), ["weight"])


@read_module.register(nn.MultiheadAttention)
def _(module: nn.MultiheadAttention) -> Reading:
    names = ["in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"]
    return _matrices(module, "attention", ("out", "in"), names)


@read_module.register(nn.RNNBase)
@read_module.register(nn.RNNCellBase)
def _(module: nn.Module) -> Reading:
    return _matrices(module, "recurrent", ("out", "in"), [n for n in module._parameters if n.startswith("weight")])


@read_module.register(nn.Embedding)
@read_module.register(nn.EmbeddingBag)
def _(module: nn.Module) -> Reading:
    return _matrices(module, "embedding", ("in", "out"), ["weight"])


@read_module.register(nn.Bilinear)
def _(module: nn.Bilinear) -> Reading:
    return _matrices(module, "other", ("out", "in", "in"), ["weight"])


def register_axes(module_type: type[nn.Module], *, kind: str = "linear", **axes: Sequence[str]) -> None:
    """Register the axes of a module class's parameters, so that they can be targets.

    Args:
        module_type: The class; its subclasses inherit the reading.
        kind: Kind of module for the default targets.
        **axes: Parameter name -> the axis of each of its dimensions, of `out`, `in`, `expert`, `depth`, `height`, `width`.

    Raises:
        TypeError: `module_type` is not a module class.
        ValueError: `kind` or an axis is not known. Where a module of the class is first read: it has no such parameter, or one
            of other dimensions.

    >>> class Turned(nn.Module): ...           # a linear layer that holds (in, out)
    >>> register_axes(Turned, weight=("in", "out"))
    """
    if not (isinstance(module_type, type) and issubclass(module_type, nn.Module)):
        raise TypeError(f"module_type must be a subclass of torch.nn.Module, got {module_type!r}")
    check_choice("kind", kind, KINDS)
    for name, names in axes.items():
        for axis in names:
            check_choice(name, axis, ("out", "in", "expert", "depth", "height", "width"))

    def read(module: nn.Module) -> Reading:
        found = {n: p for n in axes if (p := module._parameters.get(n)) is not None}
        if type(module) is module_type and module._parameters and not any(hasattr(module, n) for n in axes):
            own = ", ".join(module._parameters)
            named = ", ".join(f"{n}=" for n in axes)
            raise ValueError(
                f"register_axes({module_type.__name__}, ...) must name a parameter of the class ({own}), "
                f"got {named or 'none'}; call it anew: register_axes({module_type.__name__}, {own.split(',')[0]}=(...))"
            )
        for n, p in found.items():
            if p.dim() != len(axes[n]):
                raise ValueError(f"{n} must have {len(axes[n])} dimensions {tuple(axes[n])}, got shape {tuple(p.shape)}")
        return Reading(kind, {n: _plain(p.shape, *axes[n]) for n, p in found.items()})

    read_module.register(module_type, read)
