"""Pictures of a run, drawn from its report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fasterai.analyze.latency import Speed
from fasterai.cli.output import write_atomically
from fasterai.cli.tables import columns, is_by_channel, unit_name
from fasterai.display import (
    AREA,
    EMPTY,
    INK,
    MODELS,
    PAPER,
    QUIET,
    SMALL,
    as_percent,
    dress,
    new_figure,
    save_figure,
    short,
    short_bytes,
    short_time,
    styled,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from fasterai.prune.removal_report import Removal

__all__ = ["write_all", "write_removal", "write_small", "write_sparsity", "write_training"]


def write_all(report: Mapping[str, Any], folder: Path) -> None:
    """Draw every picture that the report has figures for."""
    write_training(report, folder / "training.png")
    write_sparsity(report, folder / "sparsity.png")
    if "small" in columns(report):
        write_small(report, folder / "small.png")


def write_removal(removal: Removal, path: Path) -> None:
    """Write the picture of a removal."""
    _write(removal.plot(), path)


@styled()
def write_training(report: Mapping[str, Any], path: Path) -> None:
    """Draw the accuracy over the epochs, dense and sparse, above the sparsity over the steps."""
    figure = new_figure(8.0, 5.6, shown=False, pad=0.12)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    _draw_accuracy(above, report)
    _draw_schedule(below, report)
    figure.align_ylabels([above, below])
    _write(figure, path)


@styled()
def write_sparsity(report: Mapping[str, Any], path: Path) -> None:
    """Draw the sparsity of each layer, with the count of kept channels or weights beside it."""
    layers = report["layers"]
    figure = new_figure(8.0, 1.5 + 0.3 * len(layers), shown=False)
    axes = figure.subplots()
    axes.barh(range(len(layers)), [1.0] * len(layers), color=EMPTY, height=0.74)
    for place, layer in enumerate(layers):
        _draw_layer(axes, place, layer, _left(report, layer))
    unit = "channels" if is_by_channel(report) else "weights"
    axes.text(1.02, -0.8, f"{unit} left", va="center", color=QUIET, fontsize=SMALL, weight="bold")
    _draw_overall(axes, layers)
    axes.set_yticks(range(len(layers)), [layer["name"].removesuffix(".weight") for layer in layers])
    axes.set(xlim=(0, 1), ylim=(len(layers) - 0.45, -0.55), xlabel=f"share of {unit_name(report)} pruned")
    axes.xaxis.set_major_formatter(as_percent)
    dress(axes, "What is gone, layer by layer", below=" ")
    _write(figure, path)


def _left(report: Mapping[str, Any], layer: Mapping[str, Any]) -> str:
    """Write the count of kept channels or weights of a layer, as `3 of 8`."""
    if is_by_channel(report):
        return f"{layer['units'] - layer['pruned']:,} of {layer['units']:,}"
    return f"{layer['weights'] - layer['zeros']['sparse']:,} of {layer['weights']:,}"


def _draw_layer(axes: Axes, place: int, layer: Mapping[str, Any], left: str) -> None:
    share = layer["pruned"] / max(1, layer["units"])
    axes.barh(place, share, color=MODELS["sparse"], height=0.74)
    inside = share > 0.1
    at, color = (0.01, PAPER) if inside else (share + 0.01, INK)
    axes.text(at, place, f"{share:.1%}", va="center", color=color, fontsize=SMALL, weight="bold")
    axes.text(1.02, place, left, va="center", color=QUIET, fontsize=SMALL)


@styled()
def write_small(report: Mapping[str, Any], path: Path) -> None:
    """Draw size, MACs and time of each network, as shares of the first network's."""
    names, rows = columns(report), _shares(report)
    figure = new_figure(8.0, 1.6 + 0.72 * len(rows), shown=False)
    axes = figure.subplots()
    thickness = 0.78 / len(names)
    most = max(sum(bar) for _, bars in rows for bar, *_ in bars.values())
    for place, (_, bars) in enumerate(rows):
        for i, name in enumerate(names):
            ((start, length), text, said), at = bars[name], place + (i - (len(names) - 1) / 2) * thickness
            axes.barh(at, length, left=start, height=0.88 * thickness, color=MODELS[name])
            label = text if i == 0 else f"{text}   {said}"
            weight = "bold" if said.endswith("%") and " to " not in said else "normal"
            axes.text(start + length + 0.012 * most, at, label, va="center", color=MODELS[name], fontsize=SMALL, weight=weight)
    axes.set_yticks(range(len(rows)), [label for label, _ in rows])
    axes.set(xlim=(0, 1.2 * most), ylim=(len(rows) - 0.5, -0.5))
    axes.set_xlabel(_conditions(report), loc="left", fontsize=SMALL)
    axes.set_xticks([])
    title = f"{report['arguments']['arch']}: masked, and without what is masked"
    dress(axes, title, below=" ")
    _accuracies(axes, report)
    _write(figure, path)


def _shares(report: Mapping[str, Any]) -> list[tuple[str, dict[str, tuple[tuple[float, float], str, str]]]]:
    """Return (label, {network: (start and length of its bar, the figure, the share in words)}) for each figure."""
    small, names = report["small"], columns(report)
    first, rows = small["costs"][names[0]], []
    for label, key, write in (
        ("parameters", "parameters", "{:,}".format),
        ("MACs of\n1 image", "macs", short),
        ("file", "file_bytes", short_bytes),
    ):
        values = {name: small["costs"][name][key] for name in names}
        shares = {name: value / max(1, first[key]) for name, value in values.items()}
        rows.append((label, {name: ((0.0, share), write(values[name]), f"{share:.0%}") for name, share in shares.items()}))
    for batch in small["times"]["batches"]:
        label = f"time,\n{batch['images']} image{'s' if batch['images'] > 1 else ''}"
        speeds = {name: Speed(batch["as_fast"][name], *batch["quartiles"][name]) for name in names}
        times = {name: short_time(batch["seconds"][name]) for name in names}
        rows.append((label, {name: (speed.bar, times[name], speed.share) for name, speed in speeds.items()}))
    return rows


def _conditions(report: Mapping[str, Any]) -> str:
    times, sparse = report["small"]["times"], report["small"]["costs"]["sparse"]
    threads = f"{times['threads']} thread{'s' if times['threads'] > 1 else ''}"
    return (
        f"sparse: only {sparse['nonzero']:,} of its {sparse['parameters']:,} parameters are not zero, but a mask changes no "
        f"tensor's size\ntimes: the fastest forward passes on {times['device']}, {threads}, measured in turns"
    )


def _accuracies(axes: Axes, report: Mapping[str, Any]) -> None:
    accuracies = {name: result["accuracy"] for name, result in report["results"].items()}
    accuracies["small"] = report["small"]["accuracy"]
    axes.text(0, 1.02, "accuracy", transform=axes.transAxes, color=QUIET)
    for i, (name, accuracy) in enumerate(accuracies.items()):
        at = 0.13 + 0.2 * i
        axes.text(at, 1.02, f"{name} {accuracy:.1%}", transform=axes.transAxes, color=MODELS[name], weight="bold")


def _draw_overall(axes: Axes, layers: list[Mapping[str, Any]]) -> None:
    overall = sum(layer["pruned"] for layer in layers) / max(1, sum(layer["units"] for layer in layers))
    axes.plot([overall, overall], [-1.05, len(layers) - 0.6], color=INK, linewidth=1.1, linestyle=(0, (4, 3)), clip_on=False)
    side, nudge = ("right", -0.01) if overall > 0.25 else ("left", 0.01)
    axes.text(
        overall + nudge, -0.8, f"all layers {overall:.1%}", ha=side, va="center", color=INK, fontsize=SMALL, weight="bold"
    )


def _draw_accuracy(axes: Axes, report: Mapping[str, Any]) -> None:
    ends = {}
    for stage, history in report["history"].items():
        epochs, accuracy = [e["epoch"] for e in history], [e["accuracy"] for e in history]
        marker = "o" if len(epochs) <= 30 else ""
        axes.plot(
            epochs, accuracy, color=MODELS[stage], linewidth=2.4, marker=marker, markersize=7, markeredgecolor=PAPER,
            clip_on=False, zorder=3,
        )  # fmt: skip
        ends[stage] = (epochs[-1], accuracy[-1])
    _label_ends(axes, ends)
    axes.yaxis.set_major_formatter(as_percent)
    axes.set_ylabel("accuracy")
    _title(axes, report)


def _label_ends(axes: Axes, ends: Mapping[str, tuple[float, float]]) -> None:
    """Write the name of each line at its end, moved apart where two lines end close to each other."""
    low, high = axes.get_ylim()
    gap = 0.1 * (high - low)
    ordered = sorted(ends, key=lambda stage: ends[stage][1])
    heights = [ends[stage][1] for stage in ordered]
    if len(heights) == 2 and heights[1] - heights[0] < gap:
        middle = sum(heights) / 2
        heights = [middle - gap / 2, middle + gap / 2]
    for stage, height in zip(ordered, heights, strict=True):
        _label_end(axes, f"{stage} {ends[stage][1]:.1%}", (ends[stage][0], height), MODELS[stage])


def _label_end(axes: Axes, text: str, at: tuple[float, float], color: str) -> None:
    axes.annotate(
        text, at, xytext=(10, 0), textcoords="offset points", va="center", color=color, weight="bold", annotation_clip=False
    )


def _draw_schedule(axes: Axes, report: Mapping[str, Any]) -> None:
    from matplotlib.ticker import MaxNLocator

    epochs, sparsity = zip(*report["schedule"], strict=True)
    axes.fill_between(epochs, sparsity, color=AREA, linewidth=0)
    axes.plot(epochs, sparsity, color=MODELS["sparse"], linewidth=2.0, clip_on=False)
    _label_end(axes, f"{sparsity[-1]:.1%}", (epochs[-1], sparsity[-1]), MODELS["sparse"])
    axes.set(xlabel="epoch", ylabel="sparsity", ylim=(0, 1), xlim=(0, epochs[-1]))
    axes.yaxis.set_major_formatter(as_percent)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    dress(axes, "", grid="y")


def _title(axes: Axes, report: Mapping[str, Any]) -> None:
    arguments = report["arguments"]
    title = f"{arguments['arch']}: dense and sparse" if "dense" in report["results"] else f"{arguments['arch']}: sparse"
    line = (
        f"{arguments['sparsity']:.0%} of the {unit_name(report)} pruned, {arguments['context']}, "
        f"by {arguments['criteria']}, on schedule {arguments['schedule']}"
    )
    dress(axes, title, grid="y", below=line)


def _write(figure: Figure, path: Path) -> None:
    write_atomically(path, lambda part: save_figure(figure, part))
