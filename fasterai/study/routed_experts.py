"""Study of chosen experts: a small Mixtral of which each token is sent to two experts, with less of it left."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasterai.analyze.cost import cost
from fasterai.core.criteria import large_final
from fasterai.core.participant import Participant
from fasterai.core.schedules import one_cycle
from fasterai.prune.experts import remove_experts
from fasterai.prune.gradual import GradualPruner
from fasterai.sparse.sparsifier import Sparsifier
from fasterai.study.description import Settings, Size, Study
from fasterai.study.experts import TEST
from fasterai.study.mixtures import LENGTH, RULES, SYMBOLS, Samples, make_rules, train_samples

__all__ = ["STUDY", "make_mixtral", "trial"]

EXPERTS, CHOSEN = 8, 2


class Logits(nn.Module):
    """A language model of transformers that returns its logits alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits `(B, length, token)` of the tokens that follow."""
        return self.model(input_ids=tokens).logits  # type: ignore[no-any-return]


def make_mixtral(experts: int = EXPERTS) -> Logits:
    """Make a Mixtral of one layer of width 32, whose experts have 16 hidden units each."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=SYMBOLS + RULES,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=experts,
        num_experts_per_tok=CHOSEN,
        max_position_embeddings=2 * LENGTH,
        initializer_range=0.1,
        use_cache=False,
    )
    return Logits(MixtralForCausalLM(config))


def trial(settings: Settings, seed: int, size: Size, data: object) -> dict[str, float]:
    """Train a Mixtral to go on with sequences, with less of its experts left by one of the ways.

    Weights of experts and their hidden units go while it trains, on the one-cycle schedule, by magnitude. Whole experts go half
    way, those that the gate uses least. Fewer experts train from the start.
    """
    torch.manual_seed(seed)
    train, test = make_rules(size.images or 1, seed), make_rules(size.test_images or 1, seed + TEST)
    way, gone = settings["way"], round(EXPERTS * settings["sparsity"])
    network, first = make_mixtral(EXPERTS - gone if way == "fewer experts" else EXPERTS), train.inputs[:8]

    def remove(optimizer: torch.optim.Optimizer) -> None:
        usage = [(train.inputs[:500], train.outputs[:500])]
        remove_experts(network, first, gone, data=usage, optimizer=optimizer, measure=False)

    half_way = remove if way == "experts" else None
    participants = _participants(network, settings, first)
    train_samples(network, train, _loss, participants, size=size, seed=seed, half_way=half_way)
    return _measured(network, test)


def _loss(logits: Tensor, wanted: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), wanted.flatten())


def _participants(network: nn.Module, settings: Settings, first: Tensor) -> list[Participant]:
    """Return what removes weights or hidden units of the experts while the network trains."""
    sparsity, stacks = settings["sparsity"], [n for n, p in network.named_parameters() if p.dim() == 3]
    if settings["way"] == "weights":
        return [Sparsifier(network, "weight", "global", large_final, sparsity=sparsity, schedule=one_cycle, targets=stacks)]
    if settings["way"] == "hidden units":
        heads = [n for n, m in network.named_modules() if n.endswith("_proj") and isinstance(m, nn.Linear)]
        return [GradualPruner(network, sparsity, "local", large_final, one_cycle, heads, first, round_to=1)]
    return []


@torch.no_grad()
def _measured(network: nn.Module, test: Samples) -> dict[str, float]:
    """Return the accuracy, the weights that are not zero, and MACs a token, less those by weights that are zero."""
    network.eval()
    found, asked = network(test.inputs).argmax(-1), test.outputs >= 0
    zeros = sum(int((p == 0).sum()) / p.shape[0] for p in network.parameters() if p.dim() == 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        macs = cost(network, test.inputs[:1]).macs / LENGTH
    return {
        "accuracy": float((found == test.outputs)[asked].float().mean()),
        "parameters": float(sum(int(p.count_nonzero()) for p in network.parameters())),
        "macs": macs - CHOSEN * zeros,
    }


SPARSITIES = [0.5, 0.75]
GRID: list[dict[str, list[Any]]] = [
    {"way": ["dense"], "sparsity": [0.0]},
    {"way": ["fewer experts", "weights", "hidden units", "experts"], "sparsity": SPARSITIES},
]
STUDY = Study(
    name="routed_experts",
    about="Two of eight experts a token: weights, hidden units and whole experts removed, beside fewer experts",
    trial=trial,
    grids={"small": GRID, "full": GRID},
    seeds={"full": range(5)},
    sizes={
        "tiny": Size("tiny", 64, 32, None, epochs=1, batch_size=32, lr=3e-3),
        "small": Size("small", 4_000, 1_000, None, epochs=8, lr=1e-2),
        "full": Size("full", 20_000, 5_000, None, epochs=40, lr=5e-3),
    },
    x="parameters",
    lines="way",
    reference={"way": "dense"},
    load=None,
)
