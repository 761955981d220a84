"""Several processes: where their decisions could differ, all take those of the first."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from fasterai.core import criteria
from fasterai.core.criteria import Criterion, WeightFunction
from fasterai.units.evidence import NotYetError
from fasterai.units.pool import Pool

__all__ = ["agree", "check_joining", "find_parallel", "is_joining"]

#: Evidence that is a copy of weights: the same in every process that trains the same weights.
ALIKE = frozenset({"initial", "previous"})
#: What a process can come to; the others follow the first one's, by its index here.
OUTCOMES = (NotYetError, ValueError, RuntimeError)


def find_parallel(model: nn.Module | None) -> DistributedDataParallel | None:
    """Find the module that joins a model with its copies in other processes.

    It is the model itself, lies inside of what `torch.compile` has wrapped, or there is none.
    """
    modules = () if model is None else model.modules()
    return next((m for m in modules if isinstance(m, DistributedDataParallel)), None)


def is_joining(parallel: DistributedDataParallel | None) -> bool:
    """Tell if processes may end at different steps, as inside of `with parallel.join():`."""
    config = getattr(parallel, "_join_config", None)
    return config is not None and bool(config.enable) and not config.throw_on_early_termination


def check_joining(parallel: DistributedDataParallel | None, criteria: Sequence[Criterion]) -> None:
    """Refuse processes that may end at different steps where they have to agree on what is pruned.

    Raises:
        ValueError: They may; one that is done early would leave the others waiting for ever.
    """
    if is_joining(parallel) and _group(parallel, criteria) is not None:
        raise ValueError(
            "criteria must read weights alone inside of join(), where a process that is done early would leave the others "
            "waiting at the next move, got one that reads data or is a function of yours; give every process as many batches, "
            "and wrap the model anew without join(), or take one such as large_final"
        )


def agree(
    choose: Callable[[], list[Tensor]],
    pools: Sequence[Pool],
    parallel: DistributedDataParallel | None,
    criteria: Sequence[Criterion],
) -> list[Tensor]:
    """Return the decisions of the first process where those of the others could differ.

    They could where a criterion reads data, of which each process has its own. Equal weights get equal scores from the
    others of the catalogue, so that these need no collective: processes may then stop at different steps.

    Args:
        choose: Works out the decisions of this process, one tensor for each pool.
        pools: What is decided on.
        parallel: The module that joins the copies of the model, None for a bare model: then the default group counts.
        criteria: By what the units are scored.

    Raises:
        ValueError: The first process could not decide; also what `choose` raises there.
    """
    group = _group(parallel, criteria)
    if group is None:
        return choose()
    found: list[Tensor] | Exception
    try:
        found = choose()
    except Exception as error:  # the others wait for this process, so that it is raised after they have been told
        found = error
    is_first = distributed.get_rank(group) == 0
    message = _pack(found if is_first else [], pools, group)
    distributed.broadcast(message, group_src=0, group=group)
    outcome = int(message[0])
    if isinstance(found, Exception) and (_outcome(found) == outcome or not isinstance(found, ValueError)):
        raise found
    if outcome:
        raise OUTCOMES[outcome - 1]("the first process could not choose what is pruned; its own error says why")
    return found if is_first and isinstance(found, list) else _unpack(message, pools)


def _group(parallel: DistributedDataParallel | None, used: Sequence[Criterion]) -> distributed.ProcessGroup | None:
    """Return the processes that have to agree, None if there is nothing to agree on."""
    reads_data = any(criterion.needs - ALIKE for criterion in used)
    group: distributed.ProcessGroup | None = None
    if parallel is not None and (reads_data or any(map(_is_users, used))):
        group = parallel.process_group
    elif parallel is None and reads_data and distributed.is_available() and distributed.is_initialized():
        group = distributed.group.WORLD
    return group if group is not None and distributed.get_world_size(group) > 1 else None


def _is_users(criterion: Criterion) -> bool:
    """Tell if a criterion is none of the catalogue: it may draw numbers, which differ between processes."""
    function = criterion.function
    own = callable(criterion.normalizer) or criterion.unit_rule is not None
    return own or isinstance(function, WeightFunction) or getattr(function, "__module__", None) != criteria.__name__


def _outcome(found: list[Tensor] | Exception) -> int:
    """Return 0 for decisions, and for an error the number of its kind, which the other processes get to know."""
    if isinstance(found, list):
        return 0
    return 1 + next((i for i, kind in enumerate(OUTCOMES) if isinstance(found, kind)), len(OUTCOMES) - 1)


def _pack(found: list[Tensor] | Exception, pools: Sequence[Pool], group: distributed.ProcessGroup) -> Tensor:
    """Lay an outcome and the decisions, if there are any, into one message."""
    device = pools[0].device
    kinds = [pair.partition(":")[0] for pair in distributed.get_backend_config(group).split(",")]
    if device.type not in kinds:  # NCCL sends nothing from a CPU
        device = torch.device(kinds[0])
    message = torch.zeros(1 + sum(p.count for p in pools), dtype=torch.uint8, device=device)
    message[0] = _outcome(found)
    if isinstance(found, list) and found:
        message[1:] = torch.cat([keep.reshape(-1).to(device, torch.uint8) for keep in found])
    return message


def _unpack(message: Tensor, pools: Sequence[Pool]) -> list[Tensor]:
    """Return the decisions of a message, each on its pool's device."""
    parts = torch.split(message[1:], [p.count for p in pools])
    return [part.bool().reshape(p.shape).to(p.device) for p, part in zip(pools, parts, strict=True)]
