"""Targets: the parameters of a model that can be pruned, and the names that select them.

Over 300 lines, since which parameters are targets, and what those that are not are told, is one question.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from fasterai.core.checks import unknown
from fasterai.core.types import Target
from fasterai.model.layouts import by_dimensions, read_module
from fasterai.model.names import owner, plain_name, unwrap, walk_parameters
from fasterai.model.supported import directions, is_followed, lengths_of, way_out

__all__ = [
    "LayerTypes",
    "Selection",
    "TargetsLike",
    "find_targets",
    "match",
    "resolve",
]

#: What is pruned if nothing is named: at fine granularities all of these, at coarser ones the first found.
DEFAULT_KINDS = ("convolution", "linear", "attention", "recurrent")

#: How the parts of adapters are called in peft, torchtune, diffusers and loralib.
ADAPTERS = ("lora", "hada_", "lokr_", "oft_", "boft_", "vera_")
ADAPTER = "a low-rank adapter beside frozen weights, only when named: what is zero in it leaves its product with them dense"
LAZY = "a lazy layer without weights yet: run one batch through the model first"

TargetsLike = str | Iterable[str] | Callable[[str, nn.Parameter], bool]
LayerTypes = type[nn.Module] | Iterable[type[nn.Module]]


@dataclass(frozen=True)
class Selection:
    """Targets of a run.

    Attributes:
        targets: In the order of `model.named_parameters()`.
        left_out: Parameter name -> why it is no target.
        named: The names of the targets that the user named; the others are defaults.
    """

    targets: tuple[Target, ...]
    left_out: Mapping[str, str] = field(default_factory=dict)
    named: frozenset[str] = frozenset()


def all_targets(model: nn.Module) -> list[Target]:
    """List every parameter that could be a target, tied ones once, under their first name."""
    found: dict[int, Target] = {}
    worked_out = _worked_out(model)
    for name, module, attribute, parameter in walk_parameters(model):
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            continue
        reading = read_module(module)
        known = reading.layouts.get(attribute) if reading else None
        kind = reading.kind if reading and known else "other"
        weight, weights_kind = worked_out.get(name, ("", kind))
        if id(parameter) in found:
            first = found[id(parameter)]
            kind = kind if first.kind == "other" or kind == "embedding" else first.kind
            layout = known if known and first.kind == "other" else first.layout
            aliases = first.aliases if name == first.name else (*first.aliases, name)
            found[id(parameter)] = Target(first.name, first.module, first.attribute, kind, layout, aliases)
        elif known or 1 <= parameter.dim() <= 5:
            layout = known or by_dimensions(parameter.shape)
            aliases = (weight,) if weight else ()
            found[id(parameter)] = Target(name, module, attribute, weights_kind, layout, aliases)
    return list(found.values())


def _worked_out(model: nn.Module) -> dict[str, tuple[str, str]]:
    """Find the parameters of which layers make weights channel by channel: name -> the weight's name, the layer's kind.

    So a layer with a weight norm is known by its own name, as any other.
    """
    names = {id(p): name for name, _, _, p in walk_parameters(model)}
    found: dict[str, tuple[str, str]] = {}
    for prefix, module in model.named_modules():
        if not is_followed(module) or (reading := read_module(module)) is None:
            continue
        for attribute, rows in directions(module):
            lengths = lengths_of(module, attribute)
            weight = plain_name(f"{prefix}.{attribute}" if prefix else attribute)
            found |= {names[id(p)]: (weight, reading.kind) for p in (rows, lengths) if p is not None and p.dim() > 1}
    return found


def _recomputing(model: nn.Module) -> dict[str, str]:
    """Find the modules that recompute their weight from other parameters: name -> the cause. Masks there would be lost."""
    result = {}
    for name, module in model.named_modules():
        if nn.utils.parametrize.is_parametrized(module):
            kinds = {a: type(p[0]).__name__.lstrip("_") for a, p in module.parametrizations.items()}  # type: ignore[union-attr]
            result[plain_name(name)] = ", ".join(f"{kind} on {a}" for a, kind in kinds.items())
        elif any(a.endswith(("weight_g", "weight_orig")) for a in module._parameters):
            hooks = {type(h).__name__ for h in module._forward_pre_hooks.values()}
            result[plain_name(name)] = ", ".join(sorted(hooks)) or "torch.nn.utils.prune"
    return result


def match(pattern: str, target: Target) -> int:
    """Rate how well a name fits a target: 0 no match, then glob, container, module, and parameter as the closest.

    A name is a parameter's (`layer1.0.conv1.weight`), a module's (`layer1.0.conv1`), that of a container of modules
    (`layer1`), or a glob over parameters or modules (`layer*.conv1`).
    """
    best = 0
    for name in (target.name, *target.aliases):
        module = name.rpartition(".")[0]
        if pattern == name:
            return 4
        if pattern == module:
            best = max(best, 3)
        elif pattern and module.startswith(pattern + "."):
            best = max(best, 2)
        elif any(c in pattern for c in "*?[") and (fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(module, pattern)):
            best = max(best, 1)
    return best


def resolve(values: Mapping[str, float], targets: Sequence[Target], argument: str) -> dict[str, float]:
    """Turn values per name or glob into values per target; the closest name decides, of equally close ones the last.

    Raises:
        ValueError: A name matches no target; the known ones are listed. Or a tied parameter gets two values.
    """
    result: dict[str, float] = {}
    closeness: dict[str, int] = {}
    chosen_by: dict[str, str] = {}
    for pattern, value in values.items():
        hits = [(t.name, fit) for t in targets if (fit := match(pattern, t))]
        if not hits:
            raise unknown(argument, pattern, (t.name for t in targets), "the name of a target or a glob over them, of")
        for name, fit in hits:
            # Two full names of one parameter are two names of a tied one; of globs and containers the later counts.
            if fit == closeness.get(name) and fit >= 3 and value != result[name]:
                raise ValueError(
                    f"{argument} must give a tied parameter one value, got {result[name]!r} for {chosen_by[name]!r} and "
                    f"{value!r} for {pattern!r}, which are both {name}"
                )
            if fit >= closeness.get(name, 0):
                result[name], closeness[name], chosen_by[name] = value, fit, pattern
    return result


def find_targets(
    model: nn.Module,
    *,
    fits: Callable[[Target], str | None],
    coarse: bool,
    targets: TargetsLike | None = None,
    layer_type: LayerTypes | None = None,
    raw: bool = False,
) -> Selection:
    """Find the parameters to prune.

    Args:
        model: The model, wrapped or not.
        fits: Parameter -> why it cannot be a target at this granularity, None if it can.
        coarse: True where units are coarser than weights, blocks or N:M groups; the default then is the convolutions, or, in a
            model without any, the linear and attention weights.
        targets: Names, globs, or a predicate of (name, parameter); default by kind.
        layer_type: Module classes whose known parameters are the targets.
        raw: True if raw parameters, and the lengths of weight norms, are targets by default: where the data flow tells what
            their dimensions are.

    Raises:
        ValueError: A name matches nothing, a named parameter does not fit, nothing is left, or a named one is parametrised
            (what the defaults or `layer_type` give is left out then).
    """
    model = unwrap(model)
    candidates = all_targets(model)
    walk = walk_parameters(model)
    lazy = {name: (m, attribute) for name, m, attribute, p in walk if isinstance(p, nn.parameter.UninitializedParameter)}
    if targets is not None:
        _refuse_lazy([n for n in lazy if not callable(targets) and _is_named(n, targets)])
        chosen = _by_name(candidates, targets, _recomputing(model))
        reasons = {t.name: "not named in targets" for t in candidates if t not in chosen}
    elif layer_type is not None:
        chosen = _by_type(candidates, layer_type)
        reasons = {t.name: "not of layer_type" for t in candidates if t not in chosen}
    else:
        _refuse_lazy([n for n, place in lazy.items() if _would_be_chosen(*place, candidates, coarse)])
        chosen, reasons = _by_kind(candidates, coarse)
        chosen += [t for t in candidates if raw and t.kind == "other" and t.parameter.dim() > 1]
        adapters = _adapters(model)
        reasons |= {t.name: ADAPTER for t in chosen if t.name in adapters}
        chosen = [t for t in chosen if t.name not in adapters]
    parametrised = _parametrised(model, candidates, raw)
    if targets is not None:
        _refuse_parametrised(model, chosen, parametrised)
    else:
        chosen = [t for t in chosen if t.name not in parametrised]
        reasons |= {n: f"{which} works its weight out anew in each forward pass" for n, which in parametrised.items()}
    kept = []
    for target in chosen:
        reason = fits(target)
        if reason is None:
            kept.append(target)
        elif targets is not None or coarse:
            raise ValueError(f"{reason}, for {target.name}")
        else:
            reasons[target.name] = reason
    if not kept:
        shown = "; ".join(f"{name}: {why}" for name, why in list(reasons.items())[:5]) or "it has no parameters"
        raise ValueError(f"no targets found in {type(model).__name__} ({shown}); name some with targets=")
    shapes = {t.name: t.layout.shape for t in candidates}
    plain = {name: why for name, why in reasons.items() if shapes[name][1:]}
    plain |= dict.fromkeys(lazy, LAZY)
    return Selection(tuple(kept), plain, frozenset(t.name for t in kept) if targets is not None else frozenset())


def _refuse_lazy(names: Sequence[str]) -> None:
    if names:
        raise ValueError(
            f"model must have run once before, since lazy layers have no weights until then, got {', '.join(names[:5])}; run "
            "one batch through it, or leave the layer out with targets="
        )


def _is_named(name: str, targets: str | Iterable[str]) -> bool:
    """Tell if one of some names, globs or containers means a parameter that has no shape yet."""
    patterns = [targets] if isinstance(targets, str) else [p for p in targets if isinstance(p, str)]
    stand_in = Target(name, nn.Identity(), "weight", "other", by_dimensions((1, 1)))
    return not name.endswith("bias") and any(match(p, stand_in) for p in patterns)


def _would_be_chosen(module: nn.Module, attribute: str, candidates: Sequence[Target], coarse: bool) -> bool:
    """Tell if a lazy layer's weight would be a default target if it had its shape."""
    is_convolution = isinstance(module, nn.modules.conv._ConvNd)
    other_convolutions = any(t.kind == "convolution" for t in candidates)
    return attribute == "weight" and (is_convolution or (isinstance(module, nn.Linear) and not (coarse and other_convolutions)))


def _adapters(model: nn.Module) -> set[str]:
    """Find the weights of low-rank adapters: of a part that is called so, in a module whose own weights are frozen.

    In `fc.base_layer.weight` (frozen), `fc.lora_A.default.weight` and `fc.lora_B.default.weight` the last two are found.
    """
    frozen = {name for name, _, _, p in walk_parameters(model) if not p.requires_grad}
    found = set()
    for name, _, _, p in walk_parameters(model):
        parts = name.split(".")
        at = next((i for i, part in enumerate(parts) if part.lower().startswith(ADAPTERS)), None)
        above = "" if not at else ".".join(parts[:at]) + "."
        if p.requires_grad and at is not None and any(other.startswith(above) for other in frozen):
            found.add(name)
    return found


def _by_name(candidates: Sequence[Target], targets: TargetsLike, recomputing: Mapping[str, str]) -> list[Target]:
    if isinstance(targets, type):
        raise TypeError(f"targets must be names, globs or a predicate, got the class {targets.__name__}; pass layer_type=")
    if callable(targets):
        return [t for t in candidates if targets(t.name, t.parameter)]
    patterns = [targets] if isinstance(targets, str) else list(targets)
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"targets must be names, globs or a predicate, got {pattern!r} ({type(pattern).__name__})")
        if not any(match(pattern, t) for t in candidates):
            owner, _, attribute = pattern.rpartition(".")
            which = f"{owner or 'the model'} works its weight out anew in each forward pass, by {recomputing.get(owner)}"
            hint = f"{which}: remove that first" if owner in recomputing and attribute.startswith("weight") else None
            known = (t.name for t in candidates)
            raise unknown("targets", pattern, known, "the name of a parameter or module, or a glob, of", hint)
    chosen = []
    for t in candidates:
        fit = max((match(p, t) for p in patterns), default=0)
        # A module or a container stands for its known weights; a bias or a norm's scale has to be named itself.
        if fit == 4 or (fit and (t.kind != "other" or len(t.layout.shape) > 1)):
            chosen.append(t)
    return chosen


def _by_type(candidates: Sequence[Target], layer_type: LayerTypes) -> list[Target]:
    types = (layer_type,) if isinstance(layer_type, type | str) else tuple(layer_type)
    for t in types:
        if not (isinstance(t, type) and issubclass(t, nn.Module)):
            raise TypeError(f"layer_type must be module classes, got {t!r}")
    chosen = [t for t in candidates if isinstance(t.module, types) and len(t.layout.shape) > 1]
    if not chosen:
        present = sorted({type(t.module).__name__ for t in candidates})
        wanted = ", ".join(t.__name__ for t in types)
        raise ValueError(f"layer_type must match a layer of the model, got {wanted}; it has {', '.join(present)}")
    return chosen


def _by_kind(candidates: Sequence[Target], coarse: bool) -> tuple[list[Target], dict[str, str]]:
    kinds: tuple[str, ...] = DEFAULT_KINDS
    if coarse:
        convolutional = any(t.kind == "convolution" for t in candidates)
        kinds = ("convolution",) if convolutional else ("linear", "attention")
    chosen = [t for t in candidates if t.kind in kinds]
    why = {
        "embedding": "embeddings only when named in targets=",
        "other": "raw parameters only when named in targets=",
    }
    fallback = f"at this granularity the {' and '.join(kinds)} weights are the default"
    return chosen, {t.name: why.get(t.kind, fallback) for t in candidates if t.kind not in kinds}


def _parametrised(model: nn.Module, candidates: Sequence[Target], raw: bool) -> dict[str, str]:
    """Find the parameters of modules that recompute their weight, weight norms aside if `raw`: name -> the module and how."""
    causes, modules = _recomputing(model), _modules(model)
    found = {}
    for target in candidates if causes else ():
        name = owner(target.name)
        if name in causes and not (raw and is_followed(modules[name])):
            found[target.name] = f"{name or type(model).__name__} ({causes[name]})"
    return found


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    return {plain_name(name): module for name, module in model.named_modules()}


def _refuse_parametrised(model: nn.Module, chosen: Sequence[Target], parametrised: Mapping[str, str]) -> None:
    for target in (target for target in chosen if target.name in parametrised):
        name = owner(target.name)
        way = way_out(_modules(model)[name], f"model.{name}" if name else "model")
        raise ValueError(
            f"targets must not be parametrised, got {parametrised[target.name]}: the forward pass uses a weight that is worked "
            f"out anew; take it away first with {way}, or leave the layer out with targets="
        )
