"""Plan of a removal as data: it can be printed, saved, and carried out again on a fresh model.

Over 300 lines, since a plan is described, made and held against a model in one place.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import numpy as np
from torch import Tensor, nn

from fasterai.display import Shown, Table, counted
from fasterai.graph.channels import ChannelGraph, Place
from fasterai.graph.inputs import InputCut
from fasterai.graph.labels import Array, Flags
from fasterai.model.cuts import input_place
from fasterai.model.names import own_tensors, plain_name, unwrap, walk_tensors
from fasterai.model.slim_norms import can_be_slim
from fasterai.model.supported import directions
from fasterai.prune.surgery.modules import HEADS, STREAMS, WIDTHS, new_sizes
from fasterai.prune.surgery.rewriting import Rewrite
from fasterai.prune.surgery.slim_attention import SlimMultiheadAttention

__all__ = ["Plan", "check_plan", "cut_normed", "make_plan", "tensor_of", "tensors_of"]


@dataclass(frozen=True, repr=False)
class Plan(Shown):
    """Plan of a removal: the indices to keep, and the sizes and scales that change with them.

    Attributes:
        shapes: Name of each parameter and buffer that shrinks -> its shape before.
        keep: Its name and dimension -> the indices that stay.
        attributes: (module name, attribute, value before, value after); one of a module's config as `config.attribute`.
        slim: Names of `nn.MultiheadAttention` modules that lose heads -> heads that stay; of norms over fewer channels ->
            how many there were before anything was removed.
        scales: Names of weights of norms that average over what goes -> by how much what stays of them grows. With a share r
            of the channels, the others silent, the mean of squares is 1 / r of what it was: the weight grows by its root.
        inputs: What stays of those inputs that lose indices.
        rewrites: Names of modules that run a traced copy of their code -> the edits of it.
    """

    shapes: Mapping[str, tuple[int, ...]]
    keep: Mapping[Place, Array]
    attributes: tuple[tuple[str, str, Any, Any], ...]
    slim: Mapping[str, int]
    scales: Mapping[str, float] = field(default_factory=dict)
    inputs: tuple[InputCut, ...] = ()
    rewrites: Mapping[str, Rewrite] = field(default_factory=dict)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy or pickle; those of earlier versions know of no rewrites."""
        vars(self).update({"rewrites": {}, **state})

    @property
    def cut(self) -> dict[Place, Array]:
        """The indices that stay, as followers of the model hear of them: of tensors and of inputs."""
        inputs = {input_place(one.argument, one.dim): np.asarray(one.keep, np.int64) for one in self.inputs}
        return {**self.keep, **inputs}

    def shape_after(self, name: str) -> tuple[int, ...]:
        """Return the shape of a parameter or buffer after the removal."""
        return tuple(len(self.keep[name, d]) if (name, d) in self.keep else n for d, n in enumerate(self.shapes[name]))

    def __bool__(self) -> bool:
        return bool(self.keep)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, ready for JSON."""
        return {
            "shapes": {n: list(s) for n, s in self.shapes.items()},
            "keep": [[n, d, kept.tolist()] for (n, d), kept in self.keep.items()],
            "attributes": [list(a) for a in self.attributes],
            "slim": dict(self.slim),
            "scales": dict(self.scales),
        } | self._later()

    def _later(self) -> dict[str, Any]:
        """Return the parts that earlier versions did not have, where there is anything in them."""
        inputs = [one.to_dict() for one in self.inputs]
        rewrites = {name: rewrite.to_dict() for name, rewrite in self.rewrites.items()}
        return {key: value for key, value in (("inputs", inputs), ("rewrites", rewrites)) if value}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """Make a plan from the data of `to_dict`."""
        return cls(
            {n: tuple(s) for n, s in data["shapes"].items()},
            {(n, d): np.asarray(kept, np.int64) for n, d, kept in data["keep"]},
            tuple((m, a, _tupled(before), _tupled(after)) for m, a, before, after in data["attributes"]),
            dict(data["slim"]),
            dict(data.get("scales", {})),
            tuple(InputCut.from_dict(one) for one in data.get("inputs", ())),
            {name: Rewrite.from_dict(one) for name, one in data.get("rewrites", {}).items()},
        )

    def _line(self) -> str:
        sizes = counted(len(self.attributes), "size")
        return (
            f"<Plan: {counted(len(self.shapes), 'tensor')} shrink, {sizes} change>" if self else "<Plan: nothing is taken out>"
        )

    def _parts(self) -> Iterator[Table | str]:
        body = [(n, "x".join(map(str, s)), "x".join(map(str, self.shape_after(n)))) for n, s in self.shapes.items()]
        body += [(f"{m}.{a}", str(before), str(after)) for m, a, before, after in self.attributes]
        lines = [f"{name}: {before} -> {after}" for name, before, after in body]
        if lines:
            yield Table(("tensor or size", "before", "after"), body, text=lines)
        yield from (f"input {one.words}" for one in self.inputs)
        yield from (f"{n}: times {factor:.4g}" for n, factor in self.scales.items())
        for name, rewrite in self.rewrites.items():
            yield f"{name or 'the model itself'}: runs a traced copy of its code, {counted(len(rewrite.edits), 'edit')}"
        if not (lines or self.scales):
            yield "nothing is taken out"


def _tupled(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def tensors_of(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Return name -> (module, attribute) of each parameter and buffer; tied ones come once, under their first name."""
    found: dict[int, tuple[str, nn.Module, str]] = {}
    for name, module, attribute, tensor in walk_tensors(unwrap(model)):
        found.setdefault(id(tensor), (name, module, attribute))
    return {name: (module, attribute) for name, module, attribute in found.values()}


def make_plan(model: nn.Module, graph: ChannelGraph, kept: Sequence[Flags], *, streams: bool = False) -> Plan:
    """Plan the removal of the channels of each group that are not kept.

    Args:
        model: The model, dense; not changed.
        graph: Its channel graph.
        kept: For each group a bool array over its channels, True = stays.
        streams: True if models' own modules that keep a number of the size of a stream get a new one.
    """
    gone: dict[Place, list[Array]] = {}
    for group, keep in zip(graph.groups, kept, strict=True):
        for place, indices in (*group.places.items(), *group.along.items()) if not keep.all() else ():
            gone.setdefault(place, []).append(indices[~keep].ravel())
    tensors = tensors_of(model)
    shapes = {n: tuple(tensor_of(tensors, n).shape) for n in dict.fromkeys(n for n, _ in gone)}
    staying: dict[Place, Array] = {
        (n, d): np.setdiff1d(np.arange(shapes[n][d]), np.concatenate(lost)) for (n, d), lost in gone.items()
    }
    bare = Plan(shapes, staying, (), {})
    attributes, slim = _sizes(model, bare, graph, kept)
    if streams:
        attributes += tuple(_stream_sizes(unwrap(model), bare, {(name, attribute) for name, attribute, _, _ in attributes}))
    inputs = tuple(_input_cuts(graph, kept))
    rescaled = {n: staying[n, 0] for n in sorted(graph.rescaled) if (n, 0) in staying}
    scales = {n: math.sqrt(shapes[n][0] / len(left)) for n, left in rescaled.items()}
    return Plan(shapes, staying, attributes, slim, scales, inputs)


def _input_cuts(graph: ChannelGraph, kept: Sequence[Flags]) -> Iterator[InputCut]:
    """Find what stays of the inputs whose features are among the channels that go."""
    gone: dict[Place, list[Array]] = {}
    for group, keep in zip(graph.groups, kept, strict=True):
        for place, indices in group.inputs.items() if not keep.all() else ():
            gone.setdefault(place, []).append(indices[~keep].ravel())
    for (argument, d), lost in gone.items():
        size = graph.input_sizes[argument, d]
        left = np.setdiff1d(np.arange(size), np.concatenate(lost))
        yield InputCut(argument, d, tuple(left.tolist()), size)


def tensor_of(tensors: Mapping[str, tuple[nn.Module, str]], name: str) -> Tensor:
    """Return a parameter or buffer by its name in `tensors_of`."""
    module, attribute = tensors[name]
    parameter = module._parameters.get(attribute)
    tensor = parameter if parameter is not None else module._buffers[attribute]
    assert tensor is not None
    return tensor


def check_plan(model: nn.Module, plan: Plan) -> None:
    """Refuse a plan whose shapes and sizes before the removal are not the model's.

    Raises:
        ValueError: It was made for another model, or was carried out already.
    """
    problem = next(_misfits(unwrap(model), plan), None)
    if problem is not None:
        raise ValueError(f"plan must be for this model, got one {problem}")


def _misfits(model: nn.Module, plan: Plan) -> Iterator[str]:
    tensors, modules = tensors_of(model), {plain_name(name): module for name, module in model.named_modules()}
    for name, shape in plan.shapes.items():
        if name not in tensors:
            yield f"that cuts {name}, which is missing here"
        elif tuple(tensor_of(tensors, name).shape) != tuple(shape):
            yield f"where {name} is {tuple(shape)}, here {tuple(tensor_of(tensors, name).shape)}"
    for (name, d), kept in plan.keep.items():
        size = plan.shapes[name][d] if name in plan.shapes and d < len(plan.shapes[name]) else 0
        if not (kept.size and kept.min() >= 0 and kept.max() < size):
            yield f"that keeps indices of {name} which do not exist"
    for module, attribute, before, _ in plan.attributes:
        if module not in modules or not _has(modules[module], attribute):
            yield f"that sets {module}.{attribute}, which is missing here"
        elif attrgetter(attribute)(modules[module]) != before:
            yield f"where {module}.{attribute} is {before}, here {attrgetter(attribute)(modules[module])}"
    yield from (f"that rewrites {name}, which is missing here" for name in plan.rewrites if name not in modules)
    for name in plan.slim:
        if not name and not can_be_slim(model):
            yield "that takes heads from the model itself; put the attention into an nn.Sequential"
        elif not (can_be_slim(m := modules.get(name)) or isinstance(m, nn.MultiheadAttention | SlimMultiheadAttention)):
            yield f"that takes heads from {name}, which is no nn.MultiheadAttention here"


def _has(module: nn.Module, attribute: str) -> bool:
    owner, _, own = attribute.rpartition(".")
    return hasattr(getattr(module, owner, None) if owner else module, own)


def _sizes(
    model: nn.Module, plan: Plan, graph: ChannelGraph, kept: Sequence[Flags]
) -> tuple[tuple[tuple[str, str, Any, Any], ...], dict[str, int]]:
    """Find the attributes of modules that change with a plan, and the attentions that lose heads.

    Returns:
        (module name, attribute, value before, value after) for each attribute; name of an attention -> heads that stay.
    """
    changed: list[tuple[str, str, Any, Any]] = []
    slim: dict[str, int] = {}
    heads = _heads(plan, graph, kept)
    names = {id(getattr(module, attribute)): name for name, (module, attribute) in tensors_of(model).items()}
    for prefix, module in unwrap(model).named_modules():
        name = plain_name(prefix)
        dot = f"{name}." if name else ""
        held = [*own_tensors(module), *directions(module)]
        own = {a: names[id(t)] for a, t in held if names[id(t)] in plan.shapes}
        if isinstance(module, nn.MultiheadAttention | SlimMultiheadAttention):
            made = (*heads.get(f"{dot}in_proj_weight", ()), *heads.get(f"{dot}q_proj_weight", ()))
            lost = [width for width in made if width.dim == 0]  # what it reads may come in several indices each, too
            reads_less = any((f"{dot}{which}_proj_weight", 1) in plan.keep for which in ("in", "q", "k", "v"))
            if lost or reads_less:  # torch's own insists on heads that fill the width that it reads
                slim[name] = lost[0].channels[1] if lost else module.num_heads
                changed += [(name, *c) for c in _differing(module, _attention_widths(dot, plan))]
            continue
        if own:
            old = {a: tuple(t.shape) for a, t in held}
            new = old | {a: plan.shape_after(n) for a, n in own.items()}
            keep = {(a, d): plan.keep[n, d] for a, n in own.items() for d in range(len(old[a])) if (n, d) in plan.keep}
            changed += [(name, *c) for c in _differing(module, new_sizes(module, old, new, keep))]
        elif name in graph.normed:
            changed += [(name, *c) for c in _bare_sizes(module, plan, graph.normed[name])]
        size, places = graph.counted.get(name, (0, frozenset()))
        if places & plan.keep.keys():
            slim[name] = vars(module).get("dense_size", size)
        changed += [(name, *c) for c in _parent_sizes(module, dot, heads)]
    return tuple(changed), slim


def _differing(module: nn.Module, sizes: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    return [(a, getattr(module, a), value) for a, value in sizes.items() if getattr(module, a) != value]


def _attention_widths(dot: str, plan: Plan) -> dict[str, int]:
    """Find the widths of an attention that change: of its output, of the keys and of the values."""
    inputs = {"kdim": f"{dot}k_proj_weight", "vdim": f"{dot}v_proj_weight"}
    places = {"embed_dim": (f"{dot}out_proj.weight", 0)} | {
        a: (own if own in plan.shapes else f"{dot}in_proj_weight", 1) for a, own in inputs.items()
    }
    return {a: len(plan.keep[place]) for a, place in places.items() if place in plan.keep}


def cut_normed(normed: Mapping[str, Sequence[tuple[Place, int] | None]], keep: Mapping[Place, Array]) -> dict[str, Any]:
    """Renumber the channels that norms without parameters normalise (`ChannelGraph.normed`) after a removal.

    >>> place = ("conv.weight", 0)
    >>> cut_normed({"norm": [(place, 0), (place, 1), None]}, {place: np.array([1])})  # channel 0 goes, 1 becomes 0
    {'norm': ((('conv.weight', 0), 0), None)}
    """
    left = {place: {int(old): new for new, old in enumerate(kept)} for place, kept in keep.items()}

    def followed(at: tuple[Place, int] | None) -> tuple[Place, int] | None:
        return at if at is None or at[0] not in left else (at[0], left[at[0]][at[1]])

    stays = {
        name: [at for at in goes_with if at is None or at[0] not in left or at[1] in left[at[0]]]
        for name, goes_with in normed.items()
    }
    return {name: tuple(followed(at) for at in goes_with) for name, goes_with in stays.items()}


def _bare_sizes(module: nn.Module, plan: Plan, goes_with: Sequence[tuple[Place, int] | None]) -> list[tuple[str, Any, Any]]:
    """Find the attributes of a norm without parameters that change, as if it had a weight as long as what it normalises."""
    staying = {place: set(kept.tolist()) for place, kept in plan.keep.items()}
    is_kept = [at is None or at[0] not in staying or at[1] in staying[at[0]] for at in goes_with]
    kept = np.flatnonzero(is_kept)
    if len(kept) == len(goes_with):
        return []
    old, new = {"weight": (len(goes_with),)}, {"weight": (len(kept),)}
    return _differing(module, new_sizes(module, old, new, {("weight", 0): kept}))


@dataclass(frozen=True)
class _Width:
    """Dimension of a weight in which each channel takes several indices, as heads do: channels and size, before and after."""

    dim: int
    channels: tuple[int, int]
    sizes: tuple[int, int]


def _heads(plan: Plan, graph: ChannelGraph, kept: Sequence[Flags]) -> dict[str, list[_Width]]:
    """Find, by weight, the dimensions in which each channel takes several indices, as heads do."""
    found: dict[str, list[_Width]] = {}
    for group, keep in zip(graph.groups, kept, strict=True):
        for (name, d), indices in group.places.items():
            if indices.shape[1] > 1 and not keep.all():
                sizes = plan.shapes[name][d], plan.shape_after(name)[d]
                found.setdefault(name, []).append(_Width(d, (group.channels, int(keep.sum())), sizes))
    return found


def _parts_of(module: nn.Module, depth: int = 3) -> Iterator[str]:
    """Give the names of the modules below one, but for lists of blocks and for what keeps numbers of its own."""
    for name, child in module.named_children():
        yield name
        if depth > 1 and not isinstance(child, nn.ModuleList) and not any(isinstance(vars(child).get(n), int) for n in HEADS):
            yield from (f"{name}.{inner}" for inner in _parts_of(child, depth - 1))


def _parent_sizes(module: nn.Module, dot: str, heads: Mapping[str, Sequence[_Width]]) -> list[tuple[str, Any, Any]]:
    """Find the numbers of heads that a module keeps about the layers below it, and widths of those directly below it."""
    changed: dict[str, tuple[str, Any, Any]] = {}
    parts = sorted(_parts_of(module), key=lambda name: name.count("."))
    found = [(name, width) for name in parts for width in heads.get(f"{dot}{name}.weight", ())]
    for name, width in found:
        is_direct = "." not in name.removesuffix(".conv")
        for names, (before, after) in ((HEADS, width.channels), (WIDTHS, width.sizes)):
            for attribute in names if is_direct or names is HEADS else ():
                if vars(module).get(attribute) == before:
                    changed.setdefault(attribute, (attribute, before, after))
    return list(changed.values())


def _stream_holders(module: nn.Module) -> dict[str, nn.Module]:
    """Return the modules whose weights show a stream's width that a module keeps; none for torch's but `nn.Transformer`."""
    if isinstance(module, nn.Transformer):
        return {f"{name}.": inner for name, inner in module.named_modules() if name.endswith("linear1")}
    if type(module).__module__.startswith("torch.nn."):
        return {}
    return {"": module} | {f"{key}.": child for key, child in module._modules.items() if child is not None}


def _stream_sizes(model: nn.Module, plan: Plan, known: set[tuple[str, str]]) -> Iterator[tuple[str, str, Any, Any]]:
    """Find the widths that modules other than torch's keep, where all parameters of that width get the same new one."""
    for prefix, module in model.named_modules():
        widths = {a: n for a in STREAMS if isinstance(n := vars(module).get(a), int) and not isinstance(n, bool)}
        holders = _stream_holders(module)
        if not (widths and holders):
            continue
        name = plain_name(prefix)
        dot = f"{name}." if name else ""
        after: dict[int, set[int]] = {}
        by_role: dict[tuple[int, bool], set[int]] = {}
        for path, holder in holders.items():
            for own, tensor in holder._parameters.items():
                for d, n in enumerate(tensor.shape if tensor is not None else ()):
                    left = len(plan.keep.get((f"{dot}{path}{own}", d), range(n)))
                    after.setdefault(n, set()).add(left)
                    if tensor is not None and tensor.dim() > 1:
                        by_role.setdefault((n, d == 1), set()).add(left)
        for attribute, n in widths.items():
            # Where what the module reads and what it makes become different, its width is that of what it reads.
            found = after.get(n, set()) if len(after.get(n, ())) == 1 else by_role.get((n, True), set())
            if len(found) == 1 and found != {n} and (name, attribute) not in known:
                yield name, attribute, n, next(iter(found))
