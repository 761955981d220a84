"""One forward pass with half of every group removed, as a table in Markdown: `python tests/benchmarks/slim_norms.py`.

The dense network, the slim one and the slim one with torch's own norms (whose results are wrong: it shows what norms for
nothing would bring) take turns in one run, on one thread, in seconds of the processor; the table has medians, and the share of
the saved MACs that arrives as saved time as the median, least and greatest of several repetitions. Names of networks leave
out the others; those of the study of transformers are `study-vit` and `study-llama`.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor, nn

from fasterai.analyze.cost import cost
from fasterai.graph.channels import channel_graph
from fasterai.model.slim_norms import is_slim, put_dense_size
from fasterai.prune.surgery.operate import apply_plan_
from fasterai.prune.surgery.plan import make_plan
from fasterai.study.streams import Text, ViT, Widths, make_llama

BATCHES = (1, 8)
TOKENS = 128


class Logits(nn.Module):
    """Language model that returns its logits alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Any:
        """Return the logits `(batch, token, word)`."""
        return self.model(input_ids=tokens).logits


def vit() -> tuple[nn.Module, Tensor]:
    """Make vit_b_16 at 224 x 224 pixels."""
    return torchvision.models.vit_b_16(), torch.randn(8, 3, 224, 224)


def llama() -> tuple[nn.Module, Tensor]:
    """Make a Llama of about 20 million parameters, and 128 tokens for it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {
        "vocab_size": 4000,
        "hidden_size": 512,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "intermediate_size": 1376,
    }
    config = LlamaConfig(**sizes, num_key_value_heads=4, use_cache=False)
    return Logits(LlamaForCausalLM(config)), torch.randint(0, 4000, (8, TOKENS))


def study_vit() -> tuple[nn.Module, Tensor]:
    """Make the ViT of `fasterai study transformers`."""
    x = torch.randn(8, 3, 16, 16)
    return ViT(3, 16, 10, Widths()), x


def study_llama() -> tuple[nn.Module, Tensor]:
    """Make the Llama of `fasterai study transformers`."""
    x = torch.randint(0, 96, (8, 64))
    return make_llama(Text((x, x), (x, x), "".join(map(chr, range(96))), ""), Widths()), x


NETWORKS = {"vit_b_16": vit, "llama": llama, "study-vit": study_vit, "study-llama": study_llama}


def slim(model: nn.Module, x: Tensor) -> nn.Module:
    """Return a copy without a random half of the channels of every group; weights are random, so that nothing is compared."""
    small = copy.deepcopy(model)
    graph, dice = channel_graph(small, (x[:2],)), np.random.default_rng(0)
    kept = [dice.permutation(group.channels) >= group.channels // 2 for group in graph.groups]
    apply_plan_(small, make_plan(small, graph, kept, streams=True))
    return small


def with_torchs_norms(model: nn.Module) -> nn.Module:
    """Return a copy whose norms know of no other channels: as fast as it could be, and wrong."""
    bare = copy.deepcopy(model)
    for module in filter(is_slim, list(bare.modules())):
        put_dense_size(module, None)
    return bare


@torch.no_grad()
def seconds(models: tuple[nn.Module, ...], x: Tensor, rounds: int) -> list[float]:
    """Return the median time of each of several models, which take turns."""
    times: list[list[float]] = [[] for _ in models]
    for turn in range(rounds + 1):
        for model, found in zip(models, times, strict=True):
            start = time.process_time()
            model(x)
            if turn:
                found.append(time.process_time() - start)
    return [statistics.median(found) for found in times]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("networks", nargs="*", default=["vit_b_16", "llama"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, one thread, float32; {given.repeats} times the medians of {given.rounds} turns\n")
    print("| network | batch | parameters | slim norms | MACs ratio | dense, ms | slim, ms | time ratio", end=" | ")
    print("share of that of MACs | with norms for nothing |\n|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|")
    for name in given.networks:
        torch.manual_seed(0)
        model, x = NETWORKS[name]()
        small = slim(model.eval(), x)
        left = sum(p.numel() for p in small.parameters()) / sum(p.numel() for p in model.parameters())
        norms = sum(is_slim(module) for module in small.modules())
        for batch in BATCHES:
            macs = cost(model, x[:batch]).macs / cost(small, x[:batch]).macs
            runs = [seconds((model, small, with_torchs_norms(small)), x[:batch], given.rounds) for _ in range(given.repeats)]
            dense_ms, slim_ms = (1000 * statistics.median(run[i] for run in runs) for i in (0, 1))
            shares = sorted(run[0] / run[1] / macs for run in runs)
            bare = statistics.median(run[0] / run[2] / macs for run in runs)
            row = f"{left:.3f} | {norms} | {macs:.2f} | {dense_ms:.4g} | {slim_ms:.4g} | {dense_ms / slim_ms:.2f}"
            between = f"{statistics.median(shares):.2f} ({shares[0]:.2f} to {shares[-1]:.2f})"
            print(f"| {name} | {batch} | {row} | {between} | {bare:.2f} |", flush=True)


if __name__ == "__main__":
    main()
