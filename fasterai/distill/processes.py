"""Several processes: adapters begin with the values of the first one, and their gradients are averaged."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, distributed, nn

from fasterai.sparse.ranks import find_parallel, is_joining

__all__ = ["average_", "begin_alike_", "check_even", "processes_of"]


def processes_of(model: nn.Module | None) -> distributed.ProcessGroup | None:
    """Return the processes that train copies of a model; None if there is but one.

    Without `DistributedDataParallel` around the model all processes are taken to train copies of it.
    """
    if not distributed.is_available() or not distributed.is_initialized():
        return None
    parallel = find_parallel(model)
    group: distributed.ProcessGroup | None = distributed.group.WORLD if parallel is None else parallel.process_group
    return group if group is not None and distributed.get_world_size(group) > 1 else None


def check_even(model: nn.Module | None) -> None:
    """Refuse processes that may end at different steps, where they have parameters to average.

    Raises:
        ValueError: They may; one that is done early would leave the others waiting for ever.
    """
    if is_joining(find_parallel(model)):
        raise ValueError(
            "loss must need no adapter inside of join(), where a process that is done early would leave the others waiting for "
            "its gradients, got one that does; give every process as many batches, and wrap the model without join()"
        )


def begin_alike_(modules: Sequence[nn.Module], group: distributed.ProcessGroup) -> None:
    """Give modules the parameters and buffers of the first process."""
    for tensor in (x for module in modules for x in (*module.parameters(), *module.buffers())):
        distributed.broadcast(tensor.detach(), group_src=0, group=group)


def average_(modules: Sequence[nn.Module], group: distributed.ProcessGroup) -> None:
    """Replace gradients of modules, and statistics in their buffers, by their means over processes, in one message."""
    own = [p for module in modules for p in module.parameters() if p.requires_grad]
    buffers = [b for module in modules for b in module.buffers() if b.is_floating_point()]
    for p in own:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    tensors: list[Tensor] = [*(p.grad for p in own if p.grad is not None), *(b.detach() for b in buffers)]
    if not tensors:
        return
    message = torch.cat([x.reshape(-1).float() for x in tensors])
    distributed.all_reduce(message, group=group)
    message /= distributed.get_world_size(group)
    for x, mean in zip(tensors, torch.split(message, [x.numel() for x in tensors]), strict=True):
        x.copy_(mean.reshape(x.shape))
