"""How much sparsifying costs, as ratios within one run on one thread: `python tests/benchmarks/sparsify.py [--quick]`.

Five tables: a move, and moves at every step; moving global masks of single weights against numpy's partition and torch's
kthvalue; applying masks against a multiplication by float masks; memory held beyond the model; a one-cycle training against a
dense one. `--moves` prints the first alone.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import statistics
import time
import warnings
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torchvision
from torch import Tensor, nn

from fasterai.callbacks.plain import attach
from fasterai.core import granularities
from fasterai.sparse.sparsifier import Sparsifier
from fasterai.units.choice import Goal

SEED = 0
Timed = dict[str, Callable[[], object]]


def medians(
    candidates: Timed,
    repeats: int,
    prepare: Callable[[], object] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Median milliseconds of each candidate; they take turns, so that a noisy moment meets all of them."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(repeats):
        for name, run in candidates.items():
            prepare()
            start = clock()
            run()
            times[name].append(1e3 * (clock() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def models() -> Iterator[tuple[str, nn.Module, object]]:
    """(name, model, layer_type): all weights, and for VGG, whose linear layers are nine tenths, the convolutions too."""
    for name, layer_type in (("resnet18", nn.Conv2d), ("resnet18", None), ("vgg16_bn", nn.Conv2d), ("vgg16_bn", None)):
        torch.manual_seed(SEED)
        model = getattr(torchvision.models, name)(weights=None)
        yield name + ("" if layer_type is None else " convolutions"), model, layer_type


def creeping() -> Iterator[float]:
    """Sparsities as a training asks for them, a little more each time."""
    sparsity = 0.3
    while True:
        sparsity += 0.001
        yield sparsity


def moves(repeats: int) -> None:
    """A move (score, choose exactly, expand, apply) against reading all weights once and applying the masks.

    Times are of the processor, which on a shared machine vary less than those of the clock.
    """
    print("\na move, and moves at every step: resnet18 convolutions, large_final, processor ms (median)")
    print(f"{'granularity':24}{'context':>9}{'move':>8}{'read once':>11}{'apply':>8}{'ratio':>8}")
    names = [name for name in granularities.__all__ if name != "coupled"]  # which several parameters share
    for granularity, context in itertools.product(names, ("local", "global", "erk", "lamp")):
        torch.manual_seed(SEED)
        model = torchvision.models.resnet18(weights=None)
        sparsifier = Sparsifier(model, granularity, context, layer_type=nn.Conv2d)
        weights = [t.parameter.detach() for t in sparsifier.targets]
        noise = [1e-5 * torch.randn(w.shape) for w in weights]
        sparsities = creeping()

        def optimizer_moves(weights: list[Tensor] = weights, noise: list[Tensor] = noise) -> None:
            for w, n in zip(weights, noise, strict=True):
                w.add_(n)

        def move(s: Sparsifier = sparsifier, sparsities: Iterator[float] = sparsities) -> None:
            s._move(Goal(s.context, next(sparsities)), 1.0, s._record.active, may_fall=False)
            s.apply_masks()

        def read(weights: list[Tensor] = weights) -> list[Tensor]:
            return [w.abs().mean() for w in weights]

        with warnings.catch_warnings(action="ignore"):  # that there are no example inputs; of targets without any unit
            sparsifier.sparsify_model(0.3)
            candidates: Timed = {"move": move, "read": read, "apply": sparsifier.apply_masks}
            few = max(3, repeats // 5) if context == "lamp" else repeats
            t = medians(candidates, few, optimizer_moves, time.process_time)
        ratio = t["move"] / (t["read"] + t["apply"])
        print(f"{granularity:24}{context:>9}{t['move']:8.1f}{t['read']:11.1f}{t['apply']:8.1f}{ratio:7.2f}x")


def moves_at_every_step(rounds: int, total_steps: int = 40) -> None:
    """Trainings of 40 steps in which the masks move at every step, against the dense one; steps in turns."""
    print(f"\n{total_steps} steps of resnet18, batch 32 of 32x32, global, masks move at every step; processor ms a step")
    print(f"{'granularity':24}{'dense':>8}{'sparse':>8}{'ratio':>8}")
    for granularity in ("weight", "kernel", "filter", "row"):
        spent = {"dense": 0.0, "sparse": 0.0}
        for _ in range(rounds):
            torch.manual_seed(SEED)
            runs = {name: _stepper(granularity if name == "sparse" else None, total_steps, "lin") for name in spent}
            for i, (name, run) in itertools.product(range(total_steps), runs.items()):
                with warnings.catch_warnings(action="ignore"):  # of targets without any unit
                    start = time.process_time()
                    run(i, 1)
                    spent[name] += 1e3 * (time.process_time() - start)
        dense, sparse = (milliseconds / (rounds * total_steps) for milliseconds in spent.values())
        print(f"{granularity:24}{dense:8.1f}{sparse:8.1f}{sparse / dense:7.3f}x")


def move_masks(repeats: int) -> None:
    """Recompute and apply global masks while the sparsity creeps up and the weights move a little in between."""
    print("\nmove and apply global masks at `weight`, ms (median)")
    print(f"{'model':24}{'weights':>13}{'fasterai':>10}{'partition':>11}{'kthvalue':>10}{'/partition':>12}{'kthvalue/':>11}")
    for name, model, layer_type in models():
        sparsifier = Sparsifier(model, "weight", "global", "large_final", layer_type=layer_type)
        weights = [t.parameter.detach() for t in sparsifier.targets]
        count = sum(w.numel() for w in weights)
        sparsities, noise = creeping(), torch.Generator().manual_seed(SEED)
        pooled = np.concatenate([w.abs().flatten().numpy() for w in weights])  # dense: zeros cost a partition ten times more
        sparsifier.sparsify_model(0.3)

        def optimizer_moves(weights: list[Tensor] = weights, noise: torch.Generator = noise) -> None:
            for w in weights:
                w.add_(torch.randn(w.shape, generator=noise), alpha=1e-5)

        def pool_and_kthvalue(weights: list[Tensor] = weights, k: int = int(0.3 * count)) -> object:
            return torch.kthvalue(torch.cat([w.abs().flatten() for w in weights]), k)

        def move(s: Sparsifier = sparsifier, sparsities: Iterator[float] = sparsities) -> None:
            # What a step of training does when the masks move: `after_step` without the schedule.
            s._move(Goal(s.context, next(sparsities)), 1.0, s._record.active, may_fall=False)
            s.apply_masks()

        candidates: Timed = {
            "fasterai": move,
            "partition": lambda pooled=pooled, k=int(0.3 * count): np.partition(pooled, k),
        }
        times = medians(candidates, repeats, optimizer_moves)
        times |= medians({"kthvalue": pool_and_kthvalue}, max(3, repeats // 4))
        ours, partition, kth = times["fasterai"], times["partition"], times["kthvalue"]
        print(f"{name:24}{count:13,}{ours:10.1f}{partition:11.1f}{kth:10.1f}{ours / partition:11.2f}x{kth / ours:10.1f}x")


def apply_masks(repeats: int) -> None:
    """Apply the masks after a step."""
    print("\napply masks, ms (median)")
    print(f"{'model':24}{'granularity':>12}{'fasterai':>10}{'float mul_':>12}{'ratio':>8}")
    for name, model, layer_type in models():
        for granularity in ("weight", "kernel", "filter", "coupled") if layer_type is nn.Conv2d else ("weight",):
            inputs = torch.zeros(1, 3, 64, 64) if granularity == "coupled" else None
            sparsifier = Sparsifier(model, granularity, "global", "random", layer_type=layer_type, example_inputs=inputs)
            with warnings.catch_warnings(action="ignore"):  # that there are no example inputs
                sparsifier.sparsify_model(0.5)
            pairs = [(t.parameter.detach(), sparsifier.masks[t.name].float()) for t in sparsifier.targets]

            def multiply(pairs: list[tuple[Tensor, Tensor]] = pairs) -> None:
                for weight, mask in pairs:
                    weight.mul_(mask)

            times = medians({"fasterai": sparsifier.apply_masks, "mul": multiply}, repeats)
            ratio = times["fasterai"] / times["mul"]
            print(f"{name:24}{granularity:>12}{times['fasterai']:10.2f}{times['mul']:12.2f}{ratio:7.2f}x")


def live_bytes() -> int:
    """The bytes of all tensors that are alive, each storage once."""
    gc.collect()
    storages = {}
    for candidate in gc.get_objects():
        if type(candidate) in (Tensor, nn.Parameter):
            storage = candidate.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def memory() -> None:
    """What is held beyond the model, after the masks have been made."""
    print("\nmemory held beyond the model, as a share of the weights' bytes")
    print(f"{'model':24}{'criterion':>20}{'held':>8}")
    for name, model, layer_type in models():
        for criterion in ("large_final", "movement", "updating_movement"):
            before = live_bytes()
            sparsifier = Sparsifier(model, "weight", "global", criterion, layer_type=layer_type)
            with warnings.catch_warnings(action="ignore"):  # nothing has moved yet, so all scores are equal
                sparsifier.sparsify_model(0.5)
            weights = sum(t.parameter.nbytes for t in sparsifier.targets)
            print(f"{name:24}{criterion:>20}{(live_bytes() - before) / weights:8.2f}")
            del sparsifier


def train(granularity: str, stretch: int, rounds: int, total_steps: int = 4000) -> None:
    """One-cycle training of resnet18 to 0.9 (coupled channels: to 0.5), measured in stretches spread evenly over the run.

    A stretch begins where the masks may move and holds whole periods of that, so the mean over evenly spread stretches is the
    mean over the run.
    """
    torch.manual_seed(SEED)
    steps = {name: _stepper(granularity if name == "sparse" else None, total_steps) for name in ("dense", "sparse")}
    for run in steps.values():
        run(0, 4)
    spent = {"dense": 0.0, "sparse": 0.0}
    ratios = []
    for round_ in range(rounds):
        taken = {}
        for name, run in steps.items():
            start = time.perf_counter()
            run(round_ * total_steps // rounds, stretch)
            taken[name] = time.perf_counter() - start
            spent[name] += taken[name]
        ratios.append(taken["sparse"] / taken["dense"])
    per_step = {name: 1e3 * seconds / (rounds * stretch) for name, seconds in spent.items()}
    print(f"\none_cycle training of resnet18, {granularity}, batch 32 of 32x32, {total_steps} steps")
    print(f"{rounds} stretches of {stretch}")
    print(
        f"dense {per_step['dense']:.1f} ms a step, sparse {per_step['sparse']:.1f} ms: {spent['sparse'] / spent['dense']:.3f}x"
    )
    print("stretch by stretch: " + " ".join(f"{r:.3f}" for r in ratios) + f"; median {statistics.median(ratios):.3f}x")


def _stepper(granularity: str | None, total_steps: int, schedule: str = "one_cycle") -> Callable[[int, int], None]:
    model = torchvision.models.resnet18(weights=None, num_classes=10).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    loss = nn.CrossEntropyLoss()
    x, y = torch.randn(32, 3, 32, 32), torch.randint(0, 10, (32,))
    handle = None
    if granularity is not None:
        sparsity = 0.5 if granularity == "coupled" else 0.9
        sparsifier = Sparsifier(
            model, granularity, "global", "large_final", sparsity=sparsity, schedule=schedule, example_inputs=x
        )
        handle = attach(optimizer, sparsifier, total_steps=total_steps)

    def run(first: int, count: int) -> None:
        if handle is not None:
            handle.loop.step = first
            pace = sparsifier._pace
            pace.share = pace.at(first / total_steps)
        for _ in range(count):
            optimizer.zero_grad()
            loss(model(x), y).backward()
            optimizer.step()

    return run


def main() -> None:
    """Print all tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer repeats, to see that it runs")
    parser.add_argument("--moves", action="store_true", help="the first table alone")
    arguments = parser.parse_args()
    quick = arguments.quick
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, numpy {np.__version__}, one thread")
    moves(repeats=3 if quick else 15)
    moves_at_every_step(rounds=1 if quick else 3)
    if arguments.moves:
        return
    move_masks(repeats=3 if quick else 21)
    apply_masks(repeats=3 if quick else 41)
    memory()
    for granularity in ("weight", "coupled"):
        train(granularity, stretch=4 if quick else 12, rounds=4 if quick else 40)


if __name__ == "__main__":
    main()
