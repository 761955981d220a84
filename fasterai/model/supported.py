"""Checks that a model can be followed and cut, and the place in a user's code at which an error arose."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves, tree_map

from fasterai.model.names import plain_name, unwrap
from fasterai.model.running import evaluating, undisturbed

__all__ = [
    "check_inputs",
    "check_model",
    "check_runs",
    "check_whole",
    "directions",
    "is_followed",
    "is_weight_normed",
    "lengths_of",
    "kernels",
    "network_in",
    "recomputed",
    "said",
    "shapes_of_inputs",
    "way_out",
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
#: Modules of torch.ao that compute in floats, as networks have them before they are prepared.
FLOAT = (
    *("torch.ao.quantization.stubs.", "torch.ao.nn.quantized.modules.functional_modules.FloatFunctional"),
    "torch.ao.nn.intrinsic.modules.fused.",
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
    names = (f"{c.__module__}.{c.__qualname__}" for c in type(module).__mro__)
    return any(name.startswith(start) and not name.startswith(FLOAT) for name in names)


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


def recomputed(model: nn.Module) -> dict[str, str]:
    """Return the parameters and buffers, by plain name, of modules that recompute their weight in each forward pass.

    These are parametrised, or have a mask of `torch.nn.utils`: a `weight` to cut is not theirs. What works channel by channel,
    as weight norms and spectral norms do, is followed instead.

    Returns:
        Name -> the reason for which it stays, and the way out.
    """
    found: dict[str, str] = {}
    for prefix, module in model.named_modules():
        way = way_out(module, "")
        if way is not None and not is_followed(module):
            reason = f"its module recomputes its weight in each forward pass; {way} would take that away"
            tensors = [*module.named_parameters(prefix), *module.named_buffers(prefix)]
            found |= {plain_name(name): reason for name, _ in tensors}
    return found


def way_out(module: nn.Module, name: str) -> str | None:
    """Return the call that makes a plain parameter of a weight which a module recomputes; None where it recomputes none.

    >>> way_out(nn.utils.parametrizations.spectral_norm(nn.Linear(2, 2)), "model.head")
    'torch.nn.utils.parametrize.remove_parametrizations(model.head, "weight")'
    """
    if nn.utils.parametrize.is_parametrized(module):
        attribute = next(iter(module.parametrizations))  # type: ignore[arg-type]
        return f'torch.nn.utils.parametrize.remove_parametrizations({name or "module"}, "{attribute}")'
    own = module._parameters.keys()
    masked = next((a.removesuffix("_orig") for a in own if a.endswith("_orig")), None)
    if masked is not None:
        if any(type(hook).__name__ == "SpectralNorm" for hook in module._forward_pre_hooks.values()):
            return f'torch.nn.utils.remove_spectral_norm({name or "module"}, "{masked}")'
        return f'torch.nn.utils.prune.remove({name or "module"}, "{masked}")'
    normed = next((a[:-2] for a in own if a.endswith("_g") and f"{a[:-2]}_v" in own), None)
    return None if normed is None else f'torch.nn.utils.remove_weight_norm({name or "module"}, "{normed}")'


def is_weight_normed(module: nn.Module) -> bool:
    """Tell if all weights that a module recomputes are rows scaled to lengths, `g v / |v|`, as torch's weight norms do."""
    if nn.utils.parametrize.is_parametrized(module):
        kinds = [[type(one) for one in parts] for parts in module.parametrizations.values()]  # type: ignore[operator,union-attr]
        return all(kind == [nn.utils.parametrizations._WeightNorm] for kind in kinds)
    hooks = [h for h in module._forward_pre_hooks.values() if type(h).__module__.startswith("torch.nn.utils.")]
    return bool(hooks) and all(isinstance(h, WeightNorm) for h in hooks)


def is_followed(module: nn.Module) -> bool:
    """Tell if what a module makes its weight of is zero where its weight is, channel by channel: rows, and columns, may go."""
    if is_weight_normed(module):
        return True
    if nn.utils.parametrize.is_parametrized(module):
        lists = [*module.parametrizations.values()]  # type: ignore[operator,union-attr]
        return all(_keeps_zeros(one) for one in lists)
    hooks = [h for h in module._forward_pre_hooks.values() if type(h).__module__.startswith("torch.nn.utils.")]
    return bool(hooks) and all(isinstance(h, SpectralNorm) for h in hooks)


@torch.no_grad()
def _keeps_zeros(parts: Any) -> bool:
    """Tell if a parametrisation keeps the shape, and makes zeros of a row of zeros, and of a column of zeros."""
    whole = getattr(parts, "original", None)
    if whole is None or whole.dim() < 2 or whole.is_meta:
        return False
    trial = copy.deepcopy(parts).eval()
    for d in (0, 1):
        trial.original.copy_(whole)
        trial.original.select(d, 0).zero_()
        made = trial()
        if made.shape != whole.shape or bool(made.select(d, 0).any()):
            return False
    return True


def kernels(module: nn.Module) -> Iterator[str]:
    """Yield the names, within a convolution that recomputes its weight, of the parameters that have the weight's shape."""
    if isinstance(module, nn.modules.conv._ConvNd) and is_followed(module):
        held = {id(tensor): name for name, tensor in module.named_parameters()}
        yield from (held[id(tensor)] for _, tensor in directions(module) if id(tensor) in held)


def directions(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights that a module makes of others: (attribute, rows of the weight before), which have the same shape."""
    if not is_followed(module):
        return
    if nn.utils.parametrize.is_parametrized(module):
        lists = module.parametrizations.items()  # type: ignore[operator,union-attr]
        yield from ((a, parts.original1 if hasattr(parts, "original1") else parts.original) for a, parts in lists)
        return
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm | SpectralNorm):
            yield hook.name, getattr(module, f"{hook.name}_{'v' if isinstance(hook, WeightNorm) else 'orig'}")


def lengths_of(module: nn.Module, attribute: str) -> Tensor | None:
    """Return the lengths that a weight norm gives the rows of a weight; None where there is none."""
    if nn.utils.parametrize.is_parametrized(module, attribute):
        return getattr(module.parametrizations[attribute], "original0", None)  # type: ignore[index]
    return module._parameters.get(f"{attribute}_g")
