"""Streams under norms: what is left when half of every group goes: `python -m tests.sweep.streams [NAME ...]`.

Half of the channels of every group are silenced at random and removed, in float64; weights are random, scaled as for the other
tables. Outputs are compared on the example inputs, and on others of other batch sizes, sides and lengths.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor, nn

from fasterai.graph.channels import channel_graph
from fasterai.model.slim_norms import is_slim
from fasterai.prune.removal import mask_channels_, remove
from tests.sweep import texts
from tests.sweep.check import _tried, difference, others, outputs, randomize_

__all__ = ["main"]

#: Name -> side of the images.
IMAGES = {"vit_b_16": 64, "convnext_tiny": 64, "swin_v2_t": 64, "maxvit_t": 224}
#: Those whose hidden states would be an output, and stay for it, return their logits alone.
TEXTS = {"bert": "BertForSequenceClassification", "gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM"}
TEXTS |= {"gemma": "GemmaForCausalLM", "qwen3": "Qwen3ForCausalLM", "t5": "T5ForConditionalGeneration"}


class Logits(nn.Module):
    """Language model that returns its logits alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, mask: Tensor | None = None, decoded: Tensor | None = None) -> Any:
        """Return the logits."""
        return self.model(tokens).logits if decoded is None else self.model(input_ids=tokens, decoder_input_ids=decoded).logits


def build(name: str) -> tuple[nn.Module, tuple[Any, ...]]:
    """Return a network in float64, and what it reads."""
    torch.manual_seed(0)
    if name in IMAGES:
        sizes = {"image_size": IMAGES[name]} if name == "vit_b_16" else {}
        model = torchvision.models.get_model(name, weights=None, **sizes)
        return model.double().eval(), (torch.randn(1, 3, IMAGES[name], IMAGES[name]).double(),)
    import transformers

    configuration, _, sizes, kind = texts.TABLE[name]
    config = getattr(transformers, configuration)(**sizes)
    return Logits(getattr(transformers, TEXTS[name])(config)).double().eval(), texts.INPUTS[kind]()


def row(name: str) -> Iterator[str]:
    """Return what came of a network, by column."""
    model, inputs = build(name)
    randomize_(model, inputs)
    start = time.process_time()
    graph, dice = channel_graph(model, inputs), np.random.default_rng(0)
    mask_channels_(model, graph, [dice.permutation(g.channels) >= g.channels // 2 for g in graph.groups])
    probes = [(probe, wanted) for probe in (inputs, *others(inputs)) if (wanted := _tried(model, probe)) is not None]
    before = _counted(model)
    removal = remove(model, inputs, measure=False)
    moved = max(difference(wanted, outputs(model, probe)) for probe, wanted in probes)
    yield name
    yield f"{removal.parameters[1] / removal.parameters[0]:.3f}"
    yield f"{_counted(model) / before:.3f}"
    yield str(sum(is_slim(module) for module in model.modules()))
    yield f"{moved:.0e}"
    yield str(len(probes))
    yield f"{time.process_time() - start:.0f} s"
    yield "; ".join(sorted({why.split(" (")[0][:80] for why in removal.refused.values()}))


def _counted(model: nn.Module) -> int:
    """Count the parameters without rows that are looked up, which stay."""
    rows = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    return sum(p.numel() for p in model.parameters() if id(p) not in rows)


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, torchvision {torchvision.__version__}, float64\n")
    print("| network | parameters left | without embeddings | slim norms | outputs moved by | inputs | time | stayed |")
    print("|---|--:|--:|--:|--:|--:|--:|---|")
    for name in sys.argv[1:] or [*TEXTS, *IMAGES]:
        print(f"| {' | '.join(row(name))} |", flush=True)


if __name__ == "__main__":
    main()
