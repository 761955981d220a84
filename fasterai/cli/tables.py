"""Text that the commands print: one line per epoch, and a table of the networks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fasterai.analyze.latency import Speed
from fasterai.display import counted, ruled, short, short_bytes, short_time, units_word

__all__ = ["columns", "epoch_line", "is_by_channel", "result_table", "small_line", "unit_name"]

Report = Mapping[str, Any]
#: Label, key of a network's costs, and how it is written.
COSTS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("parameters", "parameters", "{:,}".format),
    ("  not zero", "nonzero", "{:,}".format),
    ("MACs of 1 image", "macs", short),
    ("file", "file_bytes", short_bytes),
)


def epoch_line(stage: str, epoch: Mapping[str, float], epochs: int, seconds: float) -> str:
    """Write one epoch as one line."""
    line = f"{stage:6}  epoch {epoch['epoch']:>{len(str(epochs))}}/{epochs}  loss {epoch['loss']:.4f}"
    return f"{line}  accuracy {epoch['accuracy']:7.2%}  sparsity {epoch['sparsity']:6.1%}  {seconds:7.1f} s"


def small_line(small: Report) -> str:
    """Write the result for the small network as one line."""
    if small["why_not"]:
        return f"no small network: {small['why_not']}"
    before, after = small["removal"]["parameters"]
    moved = small["removal"]["difference"]
    return f"small   {before:,} -> {after:,} parameters; the outputs moved by at most {moved:.0e} of their scale"


def is_by_channel(report: Report) -> bool:
    """Tell if the units are coupled channels."""
    return str(report["granularity"]).lower().startswith("coupled")


def unit_name(report: Report) -> str:
    """Name the pruned units, in the plural."""
    return units_word(str(report["granularity"]))


def columns(report: Report) -> list[str]:
    """List the networks: the trained ones, then the small one if there is one."""
    small = report.get("small")
    return [*report["results"], *(["small"] if small and not small["why_not"] else [])]


def result_table(report: Report) -> str:
    """Lay out the networks side by side: zeros or channels of each layer, accuracy and cost."""
    if not report.get("small"):
        return _zeros(report, _results(report, "accuracy", "time"))
    if report["small"]["why_not"]:
        tables = [_channels(report, []) if is_by_channel(report) else _zeros(report, _results(report, "accuracy", "time"))]
        return "\n\n".join([*tables, small_line(report["small"])])
    figures = _figures(report)
    tables = [_channels(report, figures)] if is_by_channel(report) else [_zeros(report, []), _only(report, figures)]
    return "\n\n".join([*tables, _notes(report)])


def _zeros(report: Report, results: list[list[str]]) -> str:
    """Lay out the zeros of each layer and in total, with the other results of each network below."""
    stages = list(report["results"])
    rows = [["", "weights", *(f"{stage} zeros" for stage in stages)]]
    for layer in report["layers"]:
        zeros = [_share(layer["zeros"][stage], layer["weights"]) for stage in stages]
        rows.append([layer["name"], f"{layer['weights']:,}", *zeros])
    targets = [sum(layer["zeros"][stage] for layer in report["layers"]) for stage in stages]
    size = sum(layer["weights"] for layer in report["layers"])
    rows.append(["all of these", f"{size:,}", *(_share(zeros, size) for zeros in targets)])
    weights = next(iter(report["results"].values()))["weights"]
    whole = [_share(report["results"][stage]["zeros"], weights) for stage in stages]
    rows.append(["whole network", f"{weights:,}", *whole])
    rules = [1, len(rows) - 2]
    if results:
        rules += [len(rows), len(rows) + 1]
        rows += [["", "", *stages], *([label, "", *cells] for label, *cells in results)]
    return _table(rows, rules)


def _channels(report: Report, figures: list[list[str]]) -> str:
    """Lay out the channels of each group, with the other figures below."""
    names = columns(report)
    groups = report["small"]["removal"]["groups"] if "small" in names else {}
    rows = [["channels", *names]]
    for layer in report["layers"]:
        all_of_them, left = layer["units"], layer["units"] - layer["pruned"]
        cells = {"dense": f"{all_of_them:,}", "sparse": f"{left:,} of {all_of_them:,}"}
        cells["small"] = f"{groups.get(layer['name'], [0, left])[1]:,}"
        rows.append([layer["name"].removesuffix(".weight"), *(cells[name] for name in names)])
    rules = [1]
    if not figures:
        figures = _results(report, "accuracy", "time")
    rules.append(len(rows))
    return _table([*rows, *figures], rules)


def _only(report: Report, figures: list[list[str]]) -> str:
    return _table([["", *columns(report)], *figures], [1])


def _figures(report: Report) -> list[list[str]]:
    """List accuracy, size, MACs and time of each network, a row each."""
    names, small = columns(report), report["small"]
    accuracy, training = _results(report, "accuracy", "training")
    rows = [[*accuracy, f"{small['accuracy']:.2%}"]]
    for label, key, write in COSTS:
        rows.append([label, *(write(small["costs"][name][key]) for name in names)])
    for batch in small["times"]["batches"]:
        label = "time of 1 image" if batch["images"] == 1 else f"time of {batch['images']} images"
        rows.append([label, *(short_time(batch["seconds"][name]) for name in names)])
        rows.append(["  times as fast", "1", *(_as_fast(batch, name) for name in names[1:])])
    return [*rows, [*training, ""]]


def _as_fast(batch: Report, name: str) -> str:
    return Speed(batch["as_fast"][name], *batch["quartiles"][name]).cell


def _results(report: Report, accuracy: str, seconds: str) -> list[list[str]]:
    results = report["results"].values()
    return [
        [accuracy, *(f"{result['accuracy']:.2%}" for result in results)],
        [seconds, *(f"{result['seconds']:.1f} s" for result in results)],
    ]


def _notes(report: Report) -> str:
    """Explain the figures, in a few lines."""
    small = report["small"]
    zeros = 1 - small["costs"]["sparse"]["nonzero"] / max(1, small["costs"]["sparse"]["parameters"])
    threads = small["times"]["threads"]
    moved = small["removal"]["difference"]
    lines = [
        f"sparse: {zeros:.1%} of its parameters are masked to zero, in tensors of full size; a mask alone makes no network "
        "smaller or faster",
        f"small: the sparse network without its silent channels; its outputs are the same to {moved:.0e} of their scale",
        f"times: the fastest forward passes on {small['times']['device']}, {counted(threads, 'thread')}, measured in turns; "
        "same: within 5 %, or within the spread; a range: half of them lie there, too far apart to name one",
    ]
    lines += [f"silent and still there: {name} ({why})" for name, why in small["removal"]["refused"].items()]
    return "\n".join(lines)


def _share(zeros: int, weights: int) -> str:
    return f"{zeros:,}  {zeros / max(1, weights):7.2%}"


def _table(rows: Sequence[Sequence[str]], rules: Sequence[int]) -> str:
    return "\n".join(ruled(rows, rules, gap=3))
