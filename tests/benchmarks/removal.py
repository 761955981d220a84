"""What removal brings, as tables in Markdown: `python tests/benchmarks/removal.py [latency|peer]`.

`latency`: how much of the saved MACs arrives as saved time, on one thread. All sizes of a network take turns in one run, in
both memory formats.
`peer`: the same networks and ratio with torch-pruning. Each network runs in a process of its own, with a limit of CPU time,
and its time is measured in turns with that of its dense self. What the pruning took is CPU time.

The peer gets the help that its own examples give: the layers that make the outputs are named to it, heads are kept whole, and
sizes that a network's code reads are corrected afterwards. fasterai gets the network and its inputs.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
import platform
import resource
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from fasterai.analyze.cost import cost
from fasterai.prune.all import Pruner, large_final

#: One of each family, at least.
CLASSIFIERS = (
    *("alexnet", "vgg11_bn", "resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2", "densenet121", "squeezenet1_0"),
    *("googlenet", "inception_v3", "mobilenet_v2", "mobilenet_v3_small", "shufflenet_v2_x0_5", "mnasnet0_5", "efficientnet_b0"),
    *("efficientnet_v2_s", "regnet_x_400mf", "regnet_y_400mf", "convnext_tiny", "vit_b_16", "swin_t", "swin_v2_t", "maxvit_t"),
)
LATENCY = ("resnet18", "vgg16_bn")
BATCHES = (1, 32)
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
#: Name -> how resnet18 and vgg16_bn are pruned for the first table.
SIZES: Mapping[str, dict[str, Any]] = {
    "0.5": {"pruning_ratio": 0.5, "round_to": 1},
    "0.45": {"pruning_ratio": 0.45, "round_to": 1},
    "0.45, multiples of 8": {"pruning_ratio": 0.45, "round_to": 8},
}
SECONDS, ROUNDS, MOST_ROUNDS = 20.0, 7, 60
CONTEXTS = ("local", "global")
LIBRARIES = ("fasterai", "torch-pruning")
#: Seconds of CPU time, and of the clock, after which a network is given up.
LIMIT, PATIENCE = 60, 1200


# --- measuring -----------------------------------------------------------------------------------------------------------


def in_turns(models: Mapping[str, nn.Module], inputs: tuple[Any, ...], seconds: float = SECONDS) -> dict[str, list[float]]:
    """Name -> seconds of each forward pass; every round runs all models, in changing order."""
    times: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        for model in [*models.values()] * 2:
            model(*inputs)
        start, rounds = time.perf_counter(), 0
        while rounds < ROUNDS or (time.perf_counter() - start < seconds and rounds < MOST_ROUNDS):
            for name in sorted(models, key=list(models).index, reverse=bool(rounds % 2)):
                begin = time.perf_counter()
                models[name](*inputs)
                times[name].append(time.perf_counter() - begin)
            rounds += 1
    return times


def speedup(times: Mapping[str, Sequence[float]], name: str) -> float:
    """How many times as fast as the dense network, by the fastest passes: other work on the machine only adds to times."""
    return min(times["dense"]) / min(times[name])


def conditions(*packages: str) -> str:
    """The line at the head of a table."""
    versions = ", ".join(f"{p} {version(p)}" for p in ("torch", "torchvision", *packages))
    load = ", ".join(f"{x:.1f}" for x in os.getloadavg())
    return f"{versions}; {processor()}, {os.cpu_count()} cores, 1 thread; load {load}\n"


def processor() -> str:
    """The name of the CPU."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((x.partition(":")[2].strip() for x in lines if x.startswith("model name")), platform.processor())


# --- latency -------------------------------------------------------------------------------------------------------------


def latency_table(names: Sequence[str]) -> None:
    """MACs saved against time saved."""
    print(conditions())
    print(
        "| network | format | batch | channels less | MACs, dense / small | dense | small | time, dense / small | time / MACs |"
    )
    print("|---|---|--:|---|--:|--:|--:|--:|--:|")
    for name in names:
        dense, x = network(name)
        models = {"dense": dense}
        for size, options in SIZES.items():
            models[size] = copy.deepcopy(dense)
            Pruner(models[size], context="local", criteria=large_final, example_inputs=x, **options).prune_model()
        macs = {size: cost(model, x).macs for size, model in models.items()}
        for batch, memory_format in itertools.product(BATCHES, FORMATS):
            inputs = x.repeat(batch, 1, 1, 1).to(memory_format=FORMATS[memory_format])
            for model in models.values():
                model.to(memory_format=FORMATS[memory_format])
            times = in_turns(models, (inputs,))
            fastest = {size: 1e3 * min(t) for size, t in times.items()}
            for size in SIZES:
                saved, faster = macs["dense"] / macs[size], speedup(times, size)
                print(
                    f"| {name} | {memory_format} | {batch} | {size} | {saved:.2f} | {fastest['dense']:.1f} ms "
                    f"| {fastest[size]:.1f} ms | {faster:.2f} | {faster / saved:.2f} |",
                    flush=True,
                )


# --- peer ----------------------------------------------------------------------------------------------------------------


def network(name: str) -> tuple[nn.Module, Tensor]:
    """A network with random weights and its input; without auxiliary classifiers, which run in training alone."""
    torch.manual_seed(0)
    if name == "bert":
        from transformers import BertConfig, BertForSequenceClassification

        sizes = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 512}
        model = BertForSequenceClassification(BertConfig(vocab_size=1000, num_labels=10, return_dict=False, **sizes))
        return model.eval(), torch.randint(0, 1000, (1, 16))
    options = {"init_weights": False, "aux_logits": False} if name in ("googlenet", "inception_v3") else {}
    side = 299 if name == "inception_v3" else 224
    return getattr(torchvision.models, name)(weights=None, **options).eval(), torch.randn(1, 3, side, side)


def output_shape(model: nn.Module, x: Tensor) -> tuple[int, ...]:
    """The shape of what a network makes of its input."""
    with torch.inference_mode():
        output = model.eval()(x)
    return tuple((output[0] if isinstance(output, tuple) else output).shape)


def prune_with_fasterai(model: nn.Module, x: Tensor, context: str) -> None:
    """Half of the channels, by their magnitude."""
    Pruner(model, 0.5, context, large_final, example_inputs=x, round_to=1).prune_model()


def prune_with_peer(model: nn.Module, x: Tensor, context: str) -> None:
    """The same, as the peer's examples do it."""
    import torch_pruning

    makers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    outputs = [m for m in makers if getattr(m, "out_features", getattr(m, "out_channels", 0)) == 1000]
    options: dict[str, Any] = {}
    attention = [m for m in model.modules() if type(m).__name__ == "BertSelfAttention"]
    if attention:
        outputs = [model.classifier, model.bert.pooler]
        heads = {part: m.num_attention_heads for m in attention for part in (m.query, m.key, m.value)}
        options = {"num_heads": heads, "prune_num_heads": True, "prune_head_dims": False, "head_pruning_ratio": 0.5}
        options["output_transform"] = lambda out: out[0].sum()
    if isinstance(model, torchvision.models.VisionTransformer):
        options["round_to"] = model.encoder.layers[0].num_heads
    pruner = torch_pruning.pruner.BasePruner(
        model,
        x,
        importance=torch_pruning.importance.GroupMagnitudeImportance(),
        global_pruning=context == "global",
        pruning_ratio=0.5,
        ignored_layers=outputs,
        **options,
    )
    pruner.step()
    for m in attention:
        m.num_attention_heads = pruner.num_heads[m.query]
        m.attention_head_size = m.query.out_features // m.num_attention_heads
        m.all_head_size = m.query.out_features
    if isinstance(model, torchvision.models.VisionTransformer):
        model.hidden_dim = model.conv_proj.out_channels


def one(library: str, name: str, context: str) -> dict[str, Any]:
    """What one library makes of one network."""
    model, x = network(name)
    dense = copy.deepcopy(model)
    before, shape = cost(dense, x), output_shape(dense, x)
    start = time.process_time()
    (prune_with_fasterai if library == "fasterai" else prune_with_peer)(model, x, context)
    seconds = time.process_time() - start
    after, shape_after = cost(model, x), output_shape(model, x)
    if shape_after != shape:
        raise ValueError(f"outputs {shape} became {shape_after}")
    if after.parameters >= before.parameters:
        raise ValueError("nothing went")
    faster = speedup(in_turns({"dense": dense, "small": model}, (x,), 1.0), "small")
    return {
        "parameters": after.parameters / before.parameters,
        "macs": after.macs / before.macs,
        "time": 1 / faster,
        "seconds": seconds,
    }


def apart(library: str, name: str, context: str) -> dict[str, Any]:
    """The same in a process of its own."""
    command = [sys.executable, __file__, "one", library, name, context]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    except subprocess.TimeoutExpired:
        return {"error": f"not done in {PATIENCE} s"}
    if done.returncode == -signal.SIGXCPU:
        return {"error": f"not done in {LIMIT} s of CPU time"}
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["it died"])[-1][:90].replace("|", "/")}
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def peer_table(names: Sequence[str], contexts: Sequence[str]) -> None:
    """Shares left of parameters, MACs and time; or why there is no small network."""
    print(conditions("torch-pruning", "transformers"))
    print("| network | context | library | parameters left | MACs left | time left | CPU time | why not |")
    print("|---|---|---|--:|--:|--:|--:|---|")
    handled: dict[str, set[str]] = {library: set() for library in LIBRARIES}
    for name in names:
        endless: set[str] = set()
        for context in contexts:
            for library in LIBRARIES:
                found = {"error": "not tried again"} if library in endless else apart(library, name, context)
                if "error" in found:
                    endless |= {library} if "not done" in found["error"] else set()
                    print(f"| {name} | {context} | {library} | | | | | {found['error']} |", flush=True)
                    continue
                handled[library].add(name)
                left = " | ".join(f"{found[key]:.3f}" for key in ("parameters", "macs", "time"))
                print(f"| {name} | {context} | {library} | {left} | {found['seconds']:.1f} s | |", flush=True)
    print(f"\nHandled, of {len(names)}:", *(f"{k} {len(v)}" for k, v in handled.items()))
    for library, others in zip(LIBRARIES, reversed(LIBRARIES), strict=True):
        print(f"Only {library}:", ", ".join(sorted(handled[library] - handled[others])) or "none")


def main() -> None:
    """Print the tables that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="?", choices=("latency", "peer", "one"), help="both tables if left out")
    parser.add_argument("names", nargs="*", help="networks; `one` takes a library, a network and a context")
    parser.add_argument("--contexts", nargs="+", choices=CONTEXTS, default=CONTEXTS, help="of the second table")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if arguments.what == "one":
        resource.setrlimit(resource.RLIMIT_CPU, (LIMIT, LIMIT + 5))
        print(json.dumps(one(*arguments.names)))
        return
    if arguments.what in (None, "latency"):
        latency_table(arguments.names or LATENCY)
    if arguments.what in (None, "peer"):
        peer_table(arguments.names or [*CLASSIFIERS, "bert"], arguments.contexts)


if __name__ == "__main__":
    main()
