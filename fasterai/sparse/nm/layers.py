"""The layers of N:M training: Linear and convolutions whose inputs make whole groups, and what stays dense, with the reason."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from torch import nn

from fasterai.core.checks import unknown
from fasterai.core.types import Target
from fasterai.model.targets import LayerTypes, Selection, TargetsLike, find_targets, match
from fasterai.sparse.nm.choice import groups_dim

__all__ = ["Skip", "choose_layers", "inputs_of", "misfits"]

#: True for all layers that do not divide, or names and globs of layers that stay dense.
Skip = bool | str | Iterable[str]
DEFAULT_KINDS = ("convolution", "linear")


def choose_layers(
    model: nn.Module, m: int, targets: TargetsLike | None, layer_type: LayerTypes | None, skip: Skip
) -> Selection:
    """Choose the weights whose inputs are to be grouped by m.

    By default these are all of Linear layers and convolutions, but those with fewer than m inputs, as a first convolution of
    three colours or a depthwise one.

    Raises:
        ValueError: A name matches nothing, a layer's inputs are not a multiple of m and `skip` does not name it, or nothing is
            left.
        TypeError: `targets`, `layer_type` or `skip` is of the wrong type.
    """
    found = find_targets(model, fits=_misfit, coarse=False, targets=targets, layer_type=layer_type)
    left_out = dict(found.left_out)
    chosen = list(found.targets)
    if targets is None and layer_type is None:
        left_out |= {t.name: f"{t.kind} weights only when named in targets=" for t in chosen if t.kind not in DEFAULT_KINDS}
        few = {t.name: f"its {inputs_of(t)} inputs are fewer than a group of {m}" for t in chosen if inputs_of(t) < m}
        left_out = few | left_out
    left_out |= dict.fromkeys(_skipped(chosen, skip), "as skip= says")
    chosen = [t for t in chosen if t.name not in left_out]
    uneven = misfits(chosen, m)
    if uneven and skip is not True:
        raise _refusal(uneven, m)
    left_out |= {name: f"its {inputs} inputs are not a multiple of {m}" for name, inputs in uneven.items()}
    chosen = [t for t in chosen if t.name not in left_out]
    if not chosen:
        shown = "; ".join(f"{name}: {why}" for name, why in list(left_out.items())[:5])
        raise ValueError(f"targets must be left, got none in {type(model).__name__} ({shown})")
    return replace(found, targets=tuple(chosen), left_out=left_out)


def inputs_of(target: Target) -> int:
    """Return the number of inputs that one output reads, by which groups are made."""
    return target.layout.shape[groups_dim(target.layout)]


def misfits(targets: Iterable[Target], m: int) -> dict[str, int]:
    """Find the targets whose inputs are not a multiple of m: name -> number of inputs."""
    return {t.name: inputs_of(t) for t in targets if inputs_of(t) % m}


def _misfit(target: Target) -> str | None:
    if "in" in target.layout.names:
        return None
    return f"targets must have inputs to make groups of, got a parameter of shape {target.layout.shape}"


def _skipped(chosen: Iterable[Target], skip: Skip) -> list[str]:
    """Find the targets that the user names to stay dense."""
    if isinstance(skip, bool):
        return []
    patterns = [skip] if isinstance(skip, str) else list(skip) if isinstance(skip, Iterable) else [skip]
    known, found = list(chosen), []
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(
                f"skip must be True, False, or names or globs of layers, got {pattern!r} ({type(pattern).__name__})"
            )
        hits = [t.name for t in known if match(pattern, t)]
        if not hits:
            raise unknown("skip", pattern, (t.name for t in known), "the name of a layer or a glob over them, of")
        found += hits
    return found


def _refusal(uneven: dict[str, int], m: int) -> ValueError:
    shown = ", ".join(f"{name} with {inputs}" for name, inputs in list(uneven.items())[:5])
    more = f" and {len(uneven) - 5} more" if len(uneven) > 5 else ""
    first = next(iter(uneven))
    return ValueError(
        f"targets must have a multiple of {m} inputs, got {shown}{more}; leave them dense with skip=True, or by name with "
        f"skip=[{first.removesuffix('.weight')!r}, ...]"
    )
