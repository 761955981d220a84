"""The operations of all networks of the sweep, in the forms in which they are called: `tests/graph/rules/operations.json`.

`python -m tests.sweep.operations [--zoo NAME ...]` exports every network and adds what the file does not hold yet. Of calls
that differ in sizes alone the smallest stands for all. A tensor is written as `@float32 2x8x4`, a type as `=torch.float32`.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import fx

from fasterai.graph.exported import exported
from tests.sweep.__main__ import ZOOS, build, names_of

__all__ = ["FILE", "Call", "calls_of", "form", "merged", "read", "size"]

FILE = Path(__file__).resolve().parents[1] / "graph" / "rules" / "operations.json"
LARGEST = 20_000  # elements of all tensors of a call; only where an operation has no smaller one is it larger
Call = list[Any]  # the operation, its arguments, its keywords


def calls_of(graph: fx.Graph) -> Iterator[Call]:
    """Yield the calls of aten's operations in an exported network, as they are written to the file."""
    for node in graph.nodes:
        if node.op == "call_function" and str(node.target).startswith("aten."):
            yield [str(node.target), [_written(a) for a in node.args], {k: _written(v) for k, v in node.kwargs.items()}]


def _written(value: Any) -> Any:
    if isinstance(value, fx.Node):
        shown = value.meta.get("val")
        if not isinstance(shown, torch.Tensor):
            return "?"
        return f"@{str(shown.dtype).removeprefix('torch.')} {'x'.join(str(n) for n in shown.shape)}"
    if isinstance(value, list | tuple):
        return [_written(v) for v in value]
    return value if isinstance(value, int | float | str) or value is None else f"={value}"


def form(value: Any) -> Any:
    """What is alike in calls of one form: tensors by dimensions and kind of number, numbers by sign."""
    if isinstance(value, str) and value.startswith("@"):
        dtype, _, shape = value[1:].partition(" ")
        return f"{dtype.rstrip('0123456789')} {len(shape.split('x')) if shape else 0}"
    if isinstance(value, list):
        numbers = [v for v in value if isinstance(v, int | float)]
        return "numbers" + "-" * any(v < 0 for v in numbers) if numbers else tuple(form(v) for v in value[:3])
    return (
        value
        if value is None or isinstance(value, bool)
        else type(value).__name__ + "-" * (not isinstance(value, str) and value < 0)
    )


def size(value: Any) -> int:
    """The number of elements of all tensors in a call, or in a part of it."""
    if isinstance(value, list | dict):
        return sum(map(size, value.values() if isinstance(value, dict) else value))
    if not isinstance(value, str) or not value.startswith("@") or value.endswith(" "):
        return 0
    return int(torch.Size(map(int, value.split(" ")[1].split("x"))).numel())


def merged(calls: Iterable[Call]) -> list[Call]:
    """One call of each form, the smallest, sorted; without those that do not stand by themselves."""
    found: dict[Any, Call] = {}
    for call in calls:
        if "?" in json.dumps(call) or " -" in json.dumps(call):  # a size that depends on data
            continue
        key = (call[0], *map(form, call[1]), *((k, form(v)) for k, v in sorted(call[2].items())))
        found[key] = min((call, found.get(key, call)), key=lambda c: (size(c), json.dumps(c)))
    least = {name: min(size(c) for c in found.values() if c[0] == name) for name in {c[0] for c in found.values()}}
    return sorted(
        (c for c in found.values() if size(c) <= max(LARGEST, least[c[0]])), key=lambda c: (c[0], size(c), json.dumps(c))
    )


def read() -> list[Call]:
    """The calls of the file."""
    calls: list[Call] = json.loads(FILE.read_text())
    return calls


def main() -> None:
    """Export the networks, and write the file anew."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--zoo", choices=tuple(ZOOS), action="append")
    warnings.simplefilter("ignore")
    calls = read() if FILE.exists() else []
    for zoo in parser.parse_args().zoo or ZOOS:
        for name in names_of(zoo):
            try:
                model, inputs = build(zoo, name)
                calls += [call for one in exported(model.eval(), inputs) for call in calls_of(one.program.graph)]
            except Exception as error:
                print(f"{zoo}/{name}: {type(error).__name__}: {str(error)[:100]}")
        calls = merged(calls)
        FILE.write_text("[\n" + ",\n".join(json.dumps(call) for call in calls) + "\n]\n")
        print(f"{zoo}: {len(calls)} calls of {len({c[0] for c in calls})} operations", flush=True)


if __name__ == "__main__":
    main()
