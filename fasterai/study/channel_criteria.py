"""Study of criteria for channels: which of a trained network go for a share of its MACs, beside torch-pruning's choice."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasterai.analyze.cost import cost
from fasterai.prune.choice.budget import Budget
from fasterai.prune.pruner import Pruner
from fasterai.study.data import Data
from fasterai.study.description import Settings, Size, Study
from fasterai.study.workbench import accuracy, draw_batches, make_residual, train

__all__ = ["STUDY", "load_torch_pruning", "trial"]

DENSE, OURS, PEER = "dense", "fasterai", "torch-pruning"
#: Epochs of the dense training for each one after the removal, and the share of its learning rate that those have.
LONGER, LOWER = 8, 0.5
#: Training images that criteria read data of, in batches of the training.
READ = 640
#: Looks of the search for the peer's ratio.
LOOKS = 14


def trial(settings: Settings, seed: int, size: Size, data: Data) -> dict[str, float]:
    """Take channels out of a trained network in one step, until a share of the MACs is left, and train what is left.

    `before` is the accuracy without that training, `left` the share of the MACs that is left.
    """
    network = copy.deepcopy(_dense(seed, size, data))
    if settings["by"] == DENSE:
        return _figures(network, accuracy(network, data), 1.0, data)
    take_out = _take_out if settings["by"] == OURS else _take_out_by_peer
    small = take_out(network.eval(), settings, seed, size, data)
    before, left = accuracy(small, data), _macs(small, data) / _macs(_dense(seed, size, data), data)
    lr = LOWER * size.lr
    train(small, data, epochs=size.epochs, lr=lr, seed=seed + 1000, batch_size=size.batch_size)
    return _figures(small, before, left, data)


def _figures(network: nn.Module, before: float, left: float, data: Data) -> dict[str, float]:
    parameters = float(sum(p.numel() for p in network.parameters()))
    return {"accuracy": accuracy(network, data), "before": before, "left": left, "parameters": parameters}


def _macs(network: nn.Module, data: Data) -> float:
    return float(cost(network, data.train[0][:1]).macs)


@lru_cache(maxsize=1)
def _dense(seed: int, size: Size, data: Data) -> nn.Module:
    """Train the network that all runs of a seed begin with."""
    torch.manual_seed(seed)
    network = make_residual(data)
    train(network, data, epochs=LONGER * size.epochs, lr=size.lr, seed=seed, batch_size=size.batch_size)
    return network.eval()


def _read(seed: int, size: Size, data: Data) -> list[tuple[Tensor, Tensor]]:
    per_epoch, batches = draw_batches(data, 1, seed + 2000, size.batch_size)
    return [batch for _, batch in zip(range(min(per_epoch, -(-READ // size.batch_size))), batches, strict=False)]


def _take_out(network: nn.Module, settings: Settings, seed: int, size: Size, data: Data) -> nn.Module:
    budget, read = Budget(macs=settings["macs"]), _read(seed, size, data)
    options: dict[str, Any] = {"data": read, "loss": F.cross_entropy, "example_inputs": data.train[0][:2]}
    Pruner(network, budget, settings["context"], settings["criterion"], **options).prune_model(measure=False)
    return network


# --- the peer ------------------------------------------------------------------------------------------------------------


def load_torch_pruning() -> Any:
    """Import torch-pruning, which is compared with, or say how it is installed."""
    try:
        import torch_pruning
    except ImportError as error:
        raise ImportError(f"the study's peer needs torch-pruning: pip install torch-pruning==1.6.1 ({error})") from error
    return torch_pruning


def _take_out_by_peer(network: nn.Module, settings: Settings, seed: int, size: Size, data: Data) -> nn.Module:
    """Take channels out by torch-pruning in one step, by the ratio that leaves about the share of the MACs.

    It is found by halving; of the networks on the way the one nearest to the share is taken, above or below.
    """
    peer, read = load_torch_pruning(), _read(seed, size, data)
    most = settings["macs"] * _macs(network, data)

    def attempt(ratio: float) -> nn.Module:
        found = copy.deepcopy(network)
        importance = PEERS[settings["criterion"]](peer, found, read)
        ignored = [m for m in found.modules() if isinstance(m, nn.Linear)]  # the head
        options = {"global_pruning": settings["context"] == "global", "ignored_layers": ignored}
        peer.pruner.BasePruner(found, data.train[0][:1], importance, pruning_ratio=ratio, **options).step()
        found.zero_grad()
        return found

    low, high, tried = 0.0, 1.0, list[tuple[float, nn.Module]]()
    for _ in range(LOOKS):
        ratio = (low + high) / 2
        found = attempt(ratio)
        left = _macs(found, data)
        low, high = (low, ratio) if left <= most else (ratio, high)
        tried.append((abs(left - most), found))
    return min(tried, key=lambda one: one[0])[1]


def _with_gradients(network: nn.Module, read: list[tuple[Tensor, Tensor]]) -> None:
    """Leave the mean loss's gradients in the parameters."""
    for x, y in read:
        torch.autograd.backward(F.cross_entropy(network(x), y) / len(read))


def _taylor(peer: Any, network: nn.Module, read: list[tuple[Tensor, Tensor]]) -> Any:
    _with_gradients(network, read)
    return peer.importance.GroupTaylorImportance()


def _hessian(peer: Any, network: nn.Module, read: list[tuple[Tensor, Tensor]]) -> Any:
    """Return the importance with squared gradients of single images, as its documentation shows."""
    importance = peer.importance.GroupHessianImportance()
    for x, y in read[:1]:
        for image, label in zip(torch.split(x, 1), torch.split(y, 1), strict=True):
            network.zero_grad()
            torch.autograd.backward(F.cross_entropy(network(image), label))
            importance.accumulate_grad(network)
    return importance


#: Name of a criterion -> `(torch_pruning, network, batches) -> importance`, each with its own settings.
PEERS: dict[str, Callable[[Any, nn.Module, list[tuple[Tensor, Tensor]]], Any]] = {
    "magnitude": lambda peer, network, read: peer.importance.GroupMagnitudeImportance(),
    "taylor": _taylor,
    "hessian": _hessian,
    "fpgm": lambda peer, network, read: peer.importance.FPGMImportance(),
}


def _grid(shares: list[float], local: list[str], all_together: list[str], peers: dict[str, list[str]]) -> list[dict[str, Any]]:
    dense = {"by": [DENSE], "criterion": [""], "context": [""], "macs": [1.0]}
    ours = [
        {"by": [OURS], "criterion": names, "context": [context], "macs": shares}
        for context, names in (("local", local), ("global", all_together))
    ]
    theirs = [{"by": [PEER], "criterion": names, "context": [context], "macs": shares} for context, names in peers.items()]
    return [dense, *ours, *theirs]


LOCAL, GLOBAL = ["large_final", "fpgm"], ["large_final", "taylor", "fisher", "wanda"]
THEIRS = {"local": ["magnitude"], "global": ["magnitude", "taylor"]}
MORE_LOCAL, MORE_GLOBAL = ["random", "large_final", "taylor", "fisher", "fpgm"], [*GLOBAL, "hessian", "fpgm"]
MORE_OF_THEIRS = {"local": ["magnitude", "taylor", "fpgm"], "global": ["magnitude", "taylor", "hessian"]}
STUDY = Study(
    name="channel_criteria",
    about="Criteria for channels at 60, 40 and 25 % of the MACs, beside torch-pruning",
    trial=trial,
    grids={
        "tiny": _grid([0.5], ["large_final"], ["taylor"], {}),
        "small": _grid([0.6, 0.4, 0.25], LOCAL, GLOBAL, THEIRS),
        "full": _grid([0.6, 0.4, 0.25, 0.15], MORE_LOCAL, MORE_GLOBAL, MORE_OF_THEIRS),
    },
    x="macs",
    lines=("by", "criterion", "context"),
    sizes={
        "tiny": Size("tiny", 160, 80, 8, epochs=1, batch_size=32),
        "small": Size("small", 8_000, 10_000, 16, epochs=2),
        "full": Size("full", None, None, 32, epochs=10, batch_size=128),
    },
    reference={"by": DENSE},
)
