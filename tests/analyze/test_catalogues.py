"""The pictures of the catalogues show what the catalogues do, and have a panel for every entry."""

from __future__ import annotations

import matplotlib as mpl
import pytest
import torch

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.colors import to_rgba

from fasterai.analyze import catalogues
from fasterai.analyze.catalogues import (
    kept_by,
    plot_contexts,
    plot_criteria,
    plot_granularities,
    plot_schedules,
    pruned_by,
    units_of,
)
from fasterai.core import contexts, criteria, granularities, schedules
from fasterai.core.types import Layout

LAYOUT = Layout((2, 2, 1, 2), tuple(frozenset({axis}) for axis in ("out", "in", "height", "width")))


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def titles(figure):
    return [axes.get_title(loc="left").replace("\n", "") for axes in figure.axes if axes.get_visible()]


@pytest.mark.parametrize(
    ("name", "units"),
    [
        ("weight", [0, 1, 2, 3, 4, 5, 6, 7]),
        ("kernel", [0, 0, 1, 1, 2, 2, 3, 3]),
        ("filter", [0, 0, 0, 0, 1, 1, 1, 1]),
        ("shared_kernel", [0, 0, 1, 1, 0, 0, 1, 1]),
        ("vertical_slice", [0, 1, 0, 1, 2, 3, 2, 3]),
        ("layer", [0] * 8),
    ],
)
def test_weights_that_share_a_decision_have_one_number(name, units):
    assert units_of(getattr(granularities, name), LAYOUT).ravel().tolist() == units


def test_every_granularity_is_drawn_with_the_weights_of_two_units():
    figure = plot_granularities()
    assert sorted(titles(figure)) == sorted(set(granularities.__all__) - {"coupled"})
    assert titles(figure)[0] == "weight" and titles(figure)[-1] == "layer"  # the finest first
    panels = dict(zip(titles(figure), figure.axes, strict=True))
    colors = [patch.get_facecolor() for patch in panels["filter"].patches]
    first, second = (to_rgba(color) for color in catalogues.UNITS)
    assert len(colors) == 4 * 3 * 3 * 3
    assert colors[:27] == [first] * 27
    assert colors.count(first) == colors.count(second) == 27
    assert [patch.get_facecolor() for patch in panels["layer"].patches] == [first] * 108
    assert panels["filter"].texts[0].get_text() == "4 units of 27 weights"


def test_every_criterion_is_drawn_with_half_of_the_weights():
    figure = plot_criteria()
    assert titles(figure) == [name for name in criteria.__all__ if name != "fpgm"]
    for axes in figure.axes[: len(titles(figure))]:
        assert axes.images[0].get_array().mean() == 0.5
    assert plot_criteria(["large_final", "wanda"], kept=0.25).axes[0].images[0].get_array().mean() == 0.25


def test_what_a_criterion_keeps():
    # rows: weights from -1 to 1, columns: its evidence from -1 to 1
    large, small = kept_by(criteria.large_final, 0.5), kept_by(criteria.small_final, 0.5)
    assert large[:15].all() and large[45:].all() and not large[15:45].any()
    assert torch.equal(small, ~large)
    moved = kept_by(criteria.movement, 0.5)
    assert moved[0, -1] and moved[-1, 0] and not moved.diag().any()
    wanda = kept_by(criteria.wanda, 0.5)
    assert wanda[0, -1] and wanda[-1, -1] and not wanda[:, 0].any()  # an input that is zero matters nothing


def test_every_schedule_is_drawn():
    figure = plot_schedules()
    assert titles(figure) == list(schedules.__all__)
    lines = dict(zip(titles(figure), (axes.lines[0].get_ydata() for axes in figure.axes), strict=False))
    assert lines["lin"][0] == 0.0 and lines["lin"][-1] == 1.0 and lines["dsd"][-1] == pytest.approx(0.0)
    assert titles(plot_schedules({"early": schedules.OneCycle(beta=3)})) == ["early"]


def test_contexts_are_drawn_side_by_side():
    figure = plot_contexts(0.8)
    assert titles(figure) == ["local", "global", "erk", "lamp"]
    # of each layer the ground and the share above it
    widths = [[bar.get_width() for bar in axes.patches] for axes in figure.axes]
    assert [row[:4] for row in widths] == [[1.0] * 4] * 4
    assert widths[0][4:] == pytest.approx([0.8] * 4, abs=0.002)
    assert widths[2][4] == 0.0  # erk leaves the small first layer dense


@pytest.mark.parametrize("name", ["local", "global_", "erk", "lamp"])
def test_all_contexts_prune_as_much_together(name):
    sizes = [432, 4608, 18432, 640]
    shares = pruned_by(getattr(contexts, name), 0.8).values()
    assert sum(share * size for share, size in zip(shares, sizes, strict=True)) / sum(sizes) == pytest.approx(0.8, abs=1e-4)


def test_shares_are_checked():
    with pytest.raises(ValueError, match=r"kept must be in \[0, 1\], got 50"):
        plot_criteria(kept=50)
    with pytest.raises(ValueError, match=r"sparsity must be in \[0, 1\], got 2"):
        plot_contexts(2)


def test_titles_of_criteria_do_not_run_into_each_other():
    figure = plot_criteria(["updating_magnitude_increase", "updating_movement"])
    figure.canvas.draw()
    first, second = [axes._left_title.get_window_extent() for axes in figure.axes]
    assert 50 < first.x1 < second.x0
    plt.close(figure)
