"""Check of a removal: channels are removed from the model itself, outputs are compared, and the model is restored.

What fails as a whole is tried in halves. Four silent channels of which number 2 may not go, all in one group:

    removed       result
    0 1 2 3       the outputs move: try halves
    0 1           unchanged: 0 and 1 stay removed
    0 1 + 2 3     the outputs move: try halves of 2 3
    0 1 + 2       the outputs move: 2 alone is refused
    0 1 + 3       unchanged: 3 stays removed

The group keeps channel 2 and loses 0, 1 and 3 after five trial runs.

Over 300 lines, since the search is shown with its numbers, here and in `_largest_part`.
"""

from __future__ import annotations

import copy
import heapq
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from fasterai.graph.channels import ChannelGraph
from fasterai.graph.inputs import InputCut, cut_inputs
from fasterai.graph.labels import Array, Flags
from fasterai.model.names import unwrap
from fasterai.model.outputs import movement, tolerance
from fasterai.model.running import Narrowed, at_rest, copies, without_fast_path
from fasterai.model.supported import check_inputs, said
from fasterai.prune.decisions import Decisions
from fasterai.prune.precise import InFloat64
from fasterai.prune.probes import larger, probes
from fasterai.prune.rewrites import Rewriter
from fasterai.prune.surgery.operate import Surgery
from fasterai.prune.surgery.plan import Plan, make_plan
from fasterai.prune.surgery.rewriting import Rewrite

__all__ = ["Sound", "largest_sound", "outputs_of", "plan_of"]

#: After so many trial runs without one that goes well, the channels of a group are not tried any further.
GIVE_UP = 15


@dataclass
class Sound:
    """Channels that may be removed with the outputs unchanged.

    Attributes:
        kept: For each group the channels to keep.
        refused: Group's name -> the reason why silent channels of it stay.
        stayed: Group's name -> its silent channels that stay.
        difference: The largest change of an output, as a share of the outputs' scale.
        streams: True if sizes that the model's own classes keep as attributes must be changed too (`make_plan`).
        is_blank: True if all outputs were zero before, so that comparing them says nothing.
        rewrites: Names of modules that have to run a traced copy of their code -> the edits of it.
    """

    kept: list[Flags]
    refused: dict[str, str] = field(default_factory=dict)
    stayed: dict[str, tuple[int, ...]] = field(default_factory=dict)
    difference: float = 0.0
    streams: bool = False
    is_blank: bool = False
    rewrites: Mapping[str, Rewrite] = field(default_factory=dict)


def plan_of(model: nn.Module, graph: ChannelGraph, sound: Sound) -> Plan:
    """Return the plan of a removal that was found to be sound."""
    return replace(make_plan(model, graph, sound.kept, streams=sound.streams), rewrites=sound.rewrites)


@dataclass(frozen=True)
class _Verdict:
    """Result of a trial: how far the outputs moved, the reason of a failure or None, and True if the model did not run.

    It has the edits of the modules that ran a traced copy too, and the names of the modules in which the model failed.
    """

    moved: float
    reason: str | None = None
    is_structural: bool = False
    rewrites: Mapping[str, Rewrite] = field(default_factory=dict)
    at: tuple[str, ...] = ()


def largest_sound(
    model: nn.Module,
    graph: ChannelGraph,
    kept: Sequence[Flags],
    inputs: tuple[Any, ...],
    *,
    exact: bool = True,
    rewrite: bool = True,
) -> Sound:
    """Find the most channels, of those not in `kept`, that can be removed with the outputs unchanged.

    What fails is tried in halves: halves of the groups, then, where the outputs move, halves of the channels of one group.
    That takes about `2 log2(n)` trial runs for each channel of n that may not go, and at most `8 (1 + log2(n))` a group.

    Args:
        model: The model, its channels silent already; it is left as it was.
        graph: Its channel graph.
        kept: For each group a bool array over its channels, True for those to keep; at least one of each group stays.
        inputs: Positional arguments of the model.
        exact: True if the outputs have to stay the same; if not, channels are put back only where the model fails without them.
        rewrite: True if modules may run a traced copy of their code, in which sizes that are written into it are put right.

    Raises:
        ValueError: The model does not run on the inputs, or returns no tensors.
    """
    kept = [_at_least_one(k) for k in kept]
    sound = Sound([np.ones_like(k) for k in kept])
    stack = [[i for i, k in enumerate(kept) if not k.all()]]
    if not stack[0]:
        return sound
    trials = _Trials(model, graph, inputs, exact, rewrite)
    first = trials.run(kept)
    if first.reason is None:
        return Sound(kept, difference=first.moved, streams=trials.streams, is_blank=trials.is_blank, rewrites=first.rewrites)
    precise = _in_float64(model, graph, inputs, rewrite) if exact and 0 < first.moved <= trials.rounding else None
    # What is plain in the whole may hide rounding in a part.
    trials.asks_float64 = exact and not 0 < first.moved <= trials.rounding
    _search(precise or trials, sound, kept, stack, None if precise else first)
    if precise is not None:
        trials.streams = precise.streams
        sound.difference = trials.run(sound.kept).moved
    sound.streams, sound.is_blank = (precise or trials).streams, trials.is_blank
    return sound


def _search(
    trials: _Trials, sound: Sound, kept: Sequence[Flags], stack: list[list[int]], verdict_of_all: _Verdict | None
) -> None:
    """Find the groups that can lose their channels, and parts of those that cannot; `sound` is updated.

    Args:
        trials: The model on its probes.
        sound: The result so far.
        kept: For each group the channels to keep.
        stack: Lists of group numbers that are still to be tried, the next one last.
        verdict_of_all: The result of the first list, if it was tried already.
    """
    while stack:
        some = stack.pop()
        if not some:
            continue
        verdict = verdict_of_all or trials.run([kept[i] if i in some else k for i, k in enumerate(sound.kept)])
        verdict_of_all = None
        if verdict.reason is None:
            for i in some:
                sound.kept[i] = kept[i]
            sound.difference, sound.rewrites = verdict.moved, verdict.rewrites
        elif len(some) == 1:
            _largest_part(trials, sound, some[0], kept[some[0]], verdict)
        else:
            stack += [some[len(some) // 2 :], some[: len(some) // 2]]


def _in_float64(model: nn.Module, graph: ChannelGraph, inputs: tuple[Any, ...], rewrite: bool) -> _Trials | None:
    """Make trials on a copy in float64, which tells rounding from a real change; None where the copy does not run."""
    if all(p.dtype is torch.float64 for p in unwrap(model).parameters()):
        return None
    widened = tree_map(lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x, inputs)
    for mode in (nullcontext, InFloat64):  # the second for code that insists on its dtype
        try:
            with mode():
                trials = _Trials(copy.deepcopy(unwrap(model)).double(), graph, widened, True, rewrite)
        except Exception:  # such as a model that cannot be copied
            continue
        if trials.is_float64:
            trials.mode = mode
            return trials
    return None


def _at_least_one(keep: Flags) -> Flags:
    """Keep the last channel of a group that would lose all."""
    if keep.any():
        return keep
    result = keep.copy()
    result[-1] = True
    return result


def _largest_part(trials: _Trials, sound: Sound, i: int, keep: Flags, whole: _Verdict) -> None:
    """Find the channels of one group that may be removed, by halves; the largest untried piece comes next.

    Args:
        trials: The model on its probes.
        sound: The result so far; its entries of the group are set.
        i: The group's number.
        keep: The channels of the group to keep.
        whole: The failed trial of removing all others at once.

    Of four silent channels number 2 may not go; number 4 is in use and not tried:

    >>> from types import SimpleNamespace
    >>> tried = []
    >>> def run(kept):
    ...     removed = np.flatnonzero(~kept[0]).tolist()
    ...     tried.append(removed)
    ...     return _Verdict(1.0, "it is not silent") if 2 in removed else _Verdict(0.0)
    >>> graph = SimpleNamespace(groups=[SimpleNamespace(name="conv.weight", channels=5)])
    >>> sound = Sound([np.ones(5, bool)])
    >>> keep = np.array([False, False, False, False, True])
    >>> _largest_part(SimpleNamespace(graph=graph, run=run), sound, 0, keep, _Verdict(1.0, "it is not silent"))
    >>> tried
    [[0, 1], [0, 1, 2, 3], [0, 1, 2], [0, 1, 3]]
    >>> sound.kept[0].tolist()
    [False, False, True, False, True]
    >>> sound.refused
    {'conv.weight': '1 of its 4 silent channels stay (2): it is not silent'}
    """
    assert whole.reason is not None
    name, silent = trials.graph.groups[i].name, np.flatnonzero(~keep)
    refused = {}
    pieces = [] if whole.is_structural or len(silent) == 1 else _halves(silent)
    bound, count = 8 * (1 + math.ceil(math.log2(len(silent)))), 0
    while pieces and count < bound and (count < GIVE_UP or not sound.kept[i].all()):
        count += 1
        _, _, piece = heapq.heappop(pieces)
        trial = sound.kept[i].copy()
        trial[piece] = False
        verdict = trials.run([trial if j == i else k for j, k in enumerate(sound.kept)])
        if verdict.reason is None:
            sound.kept[i], sound.difference, sound.rewrites = trial, verdict.moved, verdict.rewrites
        elif len(piece) == 1:
            refused[int(piece[0])] = verdict.reason
        else:
            for half in _halves(piece):
                heapq.heappush(pieces, half)
    stayed = tuple(np.flatnonzero(sound.kept[i] & ~keep).tolist())
    sound.stayed[name] = stayed
    sound.refused[name] = _why(stayed, len(silent), whole.reason, refused, count)


def _halves(channels: Array) -> list[tuple[int, int, Array]]:
    """Split channels into two halves, with sort keys that put larger pieces first.

    >>> [half.tolist() for _, _, half in _halves(np.array([0, 1, 2, 3]))]
    [[0, 1], [2, 3]]
    """
    middle = len(channels) // 2
    return [(-len(half), int(half[0]), half) for half in (channels[:middle], channels[middle:])]


def _why(stayed: Sequence[int], silent: int, whole: str, refused: dict[int, str], count: int) -> str:
    reason = refused[min(refused)] if refused and len(stayed) < silent else whole
    if len(stayed) < silent:
        listed = ", ".join(map(str, stayed[:8])) + (", ..." if len(stayed) > 8 else "")
        reason = f"{len(stayed)} of its {silent} silent channels stay ({listed}): {reason}"
    undecided = len(stayed) - len(refused)
    if count and undecided:
        reason += f"; {undecided} of them were not tried alone, after {count} trial runs"
    return reason


class _Trials:
    """Model with the probes to run it on, before and after channels are removed.

    Attributes:
        streams: True once the model has run only with the sizes of its own classes changed too (`make_plan`).
        is_float64: True where all outputs that could move are in float64.
        asks_float64: True where a movement that may be rounding is decided on a copy in float64.
        rounding: The largest movement that may be rounding.
        is_blank: True where all outputs are zero before anything is removed.
        mode: The context in which the model runs.
    """

    mode: Callable[[], AbstractContextManager[Any]] = nullcontext

    def __init__(
        self, model: nn.Module, graph: ChannelGraph, inputs: tuple[Any, ...], exact: bool, rewrite: bool = True
    ) -> None:
        with at_rest(unwrap(model)):
            check_inputs(model, inputs)
        self.graph = graph
        self.streams = self.asks_float64 = False
        self._may_rewrite = rewrite and bool(graph.sized)
        # Where outputs may move anyway, a slice at a wrong place would not be seen.
        self._rewrites = self._may_rewrite and not exact and any(graph.sized.values())
        self._model, self._inputs, self._exact = model, inputs, exact
        with Narrowed() as narrowed:
            runs = [self._ran(one) for one in probes(inputs, bool(graph.recorded))]
        self._probes = [one for one in runs if _holds_numbers(one)]
        self._probes = self._probes or [one for one in runs[:1] if not isinstance(one.outputs, Exception)]
        self.is_blank = not any(bool(x.any()) for one in self._probes for x in one.outputs)
        dtypes = [x.dtype for x in self._probes[0].outputs if x.is_floating_point()] if self._probes else []
        # Code that casts to float32 on its way rounds as float32 does, whatever type its outputs have.
        self._limit = max(tolerance("removal", dtypes[0]), tolerance("removal", narrowed.dtype)) if dtypes else 0.0
        self.rounding = tolerance("doubtful", dtypes[0]) if dtypes else 0.0
        self.is_float64 = bool(dtypes) and all(dtype is torch.float64 for dtype in dtypes)

    def _ran(self, inputs: tuple[Any, ...]) -> _Run:
        return _run(self._model, inputs, Decisions() if self.graph.recorded else None)

    def run(self, kept: Sequence[Flags]) -> _Verdict:
        """Remove the channels that are not kept, compare the outputs, and restore the model."""
        verdict = self._try(kept)
        if verdict.reason is None or not self.asks_float64 or not 0 < verdict.moved <= self.rounding:
            return verdict
        decided = verdict if self._precise is None else self._precise.run(kept)
        return replace(decided, moved=verdict.moved) if decided.reason is None else decided

    @cached_property
    def _precise(self) -> _Trials | None:
        return _in_float64(self._model, self.graph, self._inputs, self._may_rewrite)

    @cached_property
    def _rewriter(self) -> Rewriter:
        return Rewriter(self._model, self.graph, [one.inputs for one in self._probes], self._exact, self._further)

    def _further(self) -> list[tuple[Any, ...]]:
        """Take more probes, of larger sizes, where code decides by sizes."""
        runs = [one for inputs in larger(self._inputs) if _holds_numbers(one := self._ran(inputs))]
        self._probes += runs
        return [one.inputs for one in runs]

    def _try(self, kept: Sequence[Flags]) -> _Verdict:
        """Try as the model's code is, then with further sizes of its classes changed, then with its code put right."""
        first, verdict = None, None
        for rewrites in dict.fromkeys((self._rewrites, self._may_rewrite)):
            for streams in dict.fromkeys((self.streams, True)):
                verdict = self._run(kept, streams, rewrites)
                first = first or verdict
                if verdict.reason is None:
                    self.streams, self._rewrites = streams, rewrites
                    return verdict
                if not verdict.is_structural:
                    break
        assert first is not None
        assert verdict is not None
        shown = first if first.is_structural or not verdict.is_structural else verdict
        return replace(shown, reason=f"{shown.reason}{self._why_not_traced(shown)}")

    def _why_not_traced(self, verdict: _Verdict) -> str:
        """Say why the innermost of the modules that failed does not run a traced copy of its code."""
        refused = self._rewriter.refused if verdict.at and self._may_rewrite else {}
        why = next((refused[name] for name in reversed(verdict.at) if name in refused), None)
        return "" if why is None else f"; no traced copy can run instead: {why}"

    def _run(self, kept: Sequence[Flags], streams: bool, rewrites: bool) -> _Verdict:
        rewriter = self._rewriter if rewrites else None  # it looks at the model as it was
        try:
            plan = make_plan(self._model, self.graph, kept, streams=streams)
            surgery = Surgery(self._model, plan)
        except ValueError as error:
            return _Verdict(0.0, str(error), True)
        try:
            found: Mapping[str, Rewrite] = {}
            if rewriter is not None:
                with self.mode():
                    found = rewriter.find([cut_inputs(self._model, x, plan.inputs) for x in rewriter.looked_at], kept)
                surgery.rewrite(found)
            return replace(self._compare(plan.inputs), rewrites=found)
        except ValueError as error:
            return _Verdict(0.0, str(error), True)
        finally:
            surgery.undo()

    def _compare(self, cuts: Sequence[InputCut]) -> _Verdict:
        worst = 0.0
        for before in self._probes:
            try:
                given = cut_inputs(self._model, before.inputs, cuts)
            except ValueError:  # a probe of another size along what is cut; the inputs themselves are not
                continue
            with self.mode():
                after = _run(self._model, given, before.decisions and Decisions(before.decisions))
            found, wanted = after.outputs, before.outputs
            worst = max(worst, after.decisions.moved) if after.decisions else worst
            if isinstance(found, Exception):
                at = tuple(_modules_in(found, unwrap(self._model)))
                return _Verdict(0.0, f"the model fails without them: {said(found)}", True, at=at)
            if [x.shape for x in found] != [x.shape for x in wanted]:
                return _Verdict(math.inf, "an output would get another shape", True)
            worst = max([worst, *(movement(a, b).share for a, b in zip(wanted, found, strict=True))])
        if worst <= self._limit or (not self._exact and worst < math.inf):
            return _Verdict(worst)
        if worst == math.inf:
            return _Verdict(worst, "an output would be NaN or infinite: it is not silent")
        return _Verdict(worst, f"the outputs would move by {worst:.1e} of their scale: it is not silent")


def _modules_in(error: BaseException, model: nn.Module) -> Iterator[str]:
    """Give the names of the modules in which an error arose, the outermost first."""
    names, trace = {id(module): name for name, module in model.named_modules()}, error.__traceback__
    while trace is not None:
        name = names.get(id(trace.tb_frame.f_locals.get("self")))
        if name is not None:
            yield name
        trace = trace.tb_next


class _Run(NamedTuple):
    """A model's inputs, its outputs or the error that it raised, and the decisions that it took, where they are held."""

    inputs: tuple[Any, ...]
    outputs: Any
    decisions: Decisions | None


def _run(model: nn.Module, inputs: tuple[Any, ...], decisions: Decisions | None) -> _Run:
    with decisions or nullcontext():
        return _Run(inputs, outputs_of(model, inputs), decisions)


def outputs_of(model: nn.Module, inputs: tuple[Any, ...]) -> list[Tensor] | Exception:
    """Run a model, and return the tensors among its outputs, or the error that it raises."""
    with at_rest(unwrap(model)), without_fast_path():
        try:
            output = unwrap(model)(*copies(inputs))
        except Exception as error:
            return error
        return [x.detach().clone() for x in tree_leaves(output) if isinstance(x, Tensor)]


def _holds_numbers(run: _Run) -> bool:
    return not isinstance(run.outputs, Exception) and not _has_nan(run.outputs)


def _has_nan(outputs: Sequence[Tensor]) -> bool:
    return any(bool(x.isnan().any()) for x in outputs)
