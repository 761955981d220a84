"""Checks that a model can be followed and cut, and the place in a user's code at which an error arose."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves, tree_map

from fasterai.model.names import plain_name, unwrap
from fasterai.model.running import evaluating, undisturbed

__all__ = [
    "check_inputs",
    "check_model",
    "check_runs",
    "check_whole",
    "network_in",
    "recomputed",
    "said",
    "shapes_of_inputs",
    "where",
]

#: Beginning of a class's full name -> what it is called, and what to do.
WRAPPERS = (
    ("torch.nn.parallel.distributed.", "DistributedDataParallel", "prune model.module before wrapping: DDP notes the sizes"),
    ("torch.distributed.fsdp.", "FSDP", "prune the model before it is sharded: each process holds a part of each parameter"),
    ("torch._dynamo.", "torch.compile", "prune the module inside (model._orig_mod), and compile the small one"),
    ("torch.jit.", "a TorchScript module", "prune the nn.Module that it was made of"),
    ("torch.ao.", "a module of torch.ao's quantisation", "prune first, and quantise the small model"),
)
HERE = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "")
TORCH = os.path.join(os.path.dirname(os.path.abspath(torch.__file__)), "")
PYTHON = os.path.join(os.path.dirname(os.path.abspath(os.__file__)), "")


def check_model(model: object, name: str = "model", *, holds_values: bool = False) -> nn.Module:
    """Return the model if it is a module whose parameters have shapes, or refuse it.

    Args:
        model: The module.
        name: The argument's name, for messages.
        holds_values: Refuse parameters on the meta device, too.

    Raises:
        TypeError: It is no module.
        ValueError: A lazy module has not been run yet, or a parameter has no values.
    """
    if not isinstance(model, nn.Module):
        kind = type(model).__name__
        raise TypeError(f"{name} must be a torch.nn.Module, got {model!r} ({kind}){network_in(model)}")
    for key, parameter in model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ValueError(f"{name} must be initialised, got {key} without a shape; run the lazy module once on its inputs")
        if holds_values and parameter.is_meta:
            raise ValueError(f"{name} must hold its weights, got {key} on the meta device")
    return model


def network_in(value: object) -> str:
    """Return the repair for a learner or trainer given where its network is meant; empty for anything else.

    >>> class Trainer:
    ...     model = nn.ReLU()
    >>> network_in(Trainer()), network_in("resnet18")
    ('; pass trainer.model', '')
    """
    if not isinstance(getattr(value, "model", None), nn.Module):
        return ""
    kind = type(value).__name__
    return f"; pass {'learn' if kind.endswith('Learner') else kind.lower()}.model"


def check_whole(model: object) -> nn.Module:
    """Return the model if channels can be removed from it: unwrapped, with plain parameters that hold values.

    Raises:
        TypeError: It is no module.
        ValueError: It is wrapped, scripted, compiled, sharded, quantised, lazy or without values.
    """
    for name, module in check_model(model).named_modules():
        found = next(((kind, repair) for start, kind, repair in WRAPPERS if _is_of(module, start)), None)
        if found is None and getattr(module, "_compiled_call_impl", None) is not None:
            found = "compiled in place", "compile it after the removal"
        if found is not None:
            place = f"{name}, which is {found[0]}" if name else found[0]
            raise ValueError(f"model must be the bare network, got {place} ({type(module).__name__}); {found[1]}")
    for name, parameter in check_model(model, holds_values=True).named_parameters():
        if is_traceable_wrapper_subclass(parameter) or parameter.is_quantized:
            kind = type(parameter.data).__name__
            raise ValueError(f"model must hold plain parameters, got {name}, a {kind}; prune before sharding or quantising")
    return check_model(model)


def _is_of(module: nn.Module, start: str) -> bool:
    return any(f"{c.__module__}.{c.__qualname__}".startswith(start) for c in type(module).__mro__)


def check_inputs(model: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Refuse inputs that the model fails on, and models whose outputs hold no tensor to compare.

    Raises:
        ValueError: It fails on them, and where; or it returns no tensor.
    """
    outputs = check_runs(model, inputs)
    if not any(isinstance(x, Tensor) for x in tree_leaves(outputs)):
        kind = type(outputs).__name__
        raise ValueError(f"model must return tensors, alone or in tuples, lists and dicts, to be compared, got {kind}")


def check_runs(model: nn.Module, inputs: tuple[Any, ...]) -> Any:
    """Run the model in eval mode and return its output, or refuse inputs that it fails on.

    Raises:
        ValueError: It fails on the inputs; where.
    """
    inner = unwrap(model)
    with undisturbed(inner), evaluating(inner), torch.no_grad():
        try:
            return inner(*tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, inputs))
        except Exception as error:
            is_dict = any(isinstance(x, Mapping) for x in inputs)
            raise ValueError(
                f"example_inputs must be arguments that the model runs on, got {shapes_of_inputs(inputs)}: {said(error)}"
                + ("; a dict is one argument: for keywords wrap the model" if is_dict else "")
            ) from error


def shapes_of_inputs(inputs: tuple[Any, ...]) -> str:
    """Describe inputs in short: `2x3x64x64 float32`, or `{ids: 2x5 int64}`."""
    return ", ".join(map(_shown, inputs)) or "no arguments"


def _shown(x: Any) -> str:
    if isinstance(x, Mapping):
        return f"{{{', '.join(f'{key}: {_shown(value)}' for key, value in x.items())}}}"
    if isinstance(x, list | tuple):
        return f"({', '.join(map(_shown, x))})"
    return _shape(x) if isinstance(x, Tensor) else type(x).__name__


def _shape(x: Tensor) -> str:
    return f"{'x'.join(map(str, x.shape)) or 'a single'} {str(x.dtype).removeprefix('torch.')}"


def said(error: BaseException) -> str:
    """Describe an error in one line, with the place in the user's code at which it arose."""
    first = next((line for line in str(error).splitlines() if line.strip()), "no message")
    return f"{type(error).__name__}: {first}{where(error)}"


def where(error: BaseException) -> str:
    """Describe the innermost place of an error outside of torch and this library: ` (forward, line 12 of net.py)`."""
    trace, last = error.__traceback__, None
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if not file.startswith((TORCH, HERE, "<")) and (not file.startswith(PYTHON) or "site-packages" in file):
            last = trace
        trace = trace.tb_next
    if last is None:
        return ""
    code = last.tb_frame.f_code
    return f" ({code.co_name}, line {last.tb_lineno} of {os.path.basename(code.co_filename)})"


def recomputed(model: nn.Module) -> frozenset[str]:
    """Return the parameters and buffers, by plain name, of modules that recompute their weight in each forward pass.

    These are parametrised, or have a weight norm or a mask of `torch.nn.utils`: a `weight` to cut is not theirs.
    """
    found: set[str] = set()
    for prefix, module in model.named_modules():
        own = module._parameters.keys()
        has_hook = any(a.endswith("_orig") or (a.endswith("_g") and f"{a[:-2]}_v" in own) for a in own)
        if has_hook or nn.utils.parametrize.is_parametrized(module):
            found |= {plain_name(name) for name, _ in [*module.named_parameters(prefix), *module.named_buffers(prefix)]}
    return frozenset(found)
