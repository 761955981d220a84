"""One file decides how pictures look: no other sets colours, sizes of text or matplotlib's settings by hand."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import pytest

from fasterai.display import DPI, INK, PAPER, STYLE, dress, new_axes, new_figure, save_figure, styled

ROOT = Path(__file__).parents[1]
STYLED = ROOT / "fasterai" / "display.py"
DRAWN = sorted(
    path
    for folder in ("fasterai", "docs", "tests/benchmarks", "tests/sweep")
    for path in (ROOT / folder).rglob("*.py")
    if path != STYLED and "_build" not in path.parts
)
#: Arguments that decide how a picture looks; their values come from `display`, by name.
LOOKS = {
    *(
        "color",
        "c",
        "facecolor",
        "edgecolor",
        "ecolor",
        "markeredgecolor",
        "labelcolor",
        "cmap",
        "fontsize",
        "labelsize",
        "dpi",
    ),
    *("figsize", "frameon", "titlesize"),
}
SETTINGS = {"rcParams", "rc_context", "style", "rcdefaults", "rc"}
NEUTRAL = {"none"}


def faults(source: str) -> list[str]:
    """What a file sets by hand that `display` decides."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom) and "pyplot" in ast.unparse(node):
            found.append(f"line {node.lineno}: pyplot")
        elif (
            isinstance(node, ast.Attribute)
            and node.attr in SETTINGS
            and ast.unparse(node.value) in ("mpl", "plt", "matplotlib")
        ):
            found.append(f"line {node.lineno}: {node.attr}")
        elif isinstance(node, ast.Constant) and re.fullmatch(r"#[0-9a-fA-F]{6}", str(node.value)):
            found.append(f"line {node.lineno}: {node.value}")
        elif isinstance(node, ast.keyword) and node.arg in LOOKS:
            values = [one.value for one in ast.walk(node.value) if isinstance(one, ast.Constant)]
            if isinstance(node.value, ast.Constant | ast.Tuple | ast.IfExp) and any(
                isinstance(value, str | int | float) and value not in NEUTRAL for value in values
            ):
                found.append(f"line {node.value.lineno}: {node.arg}={ast.unparse(node.value)}")
    return found


@pytest.mark.parametrize("path", DRAWN, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_other_file_decides_how_pictures_look(path: Path) -> None:
    assert not faults(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("axes.bar(1, 2, color='red')", "line 1: color='red'"),
        ("axes.bar(1, 2, color='white' if dark else INK)", "line 1: color='white' if dark else INK"),
        ("axes.text(0, 0, 'a', fontsize=8)", "line 1: fontsize=8"),
        ("RED = '#ff0000'", "line 1: #ff0000"),
        ("import matplotlib.pyplot as plt", "line 1: pyplot"),
        ("from matplotlib import pyplot", "line 1: pyplot"),
        ("mpl.rcParams['font.size'] = 9", "line 1: rcParams"),
        ("plt.style.use('ggplot')", "line 1: style"),
        ("figure(figsize=(8, 4))", "line 1: figsize=(8, 4)"),
        ("figure.savefig(path, dpi=110)", "line 1: dpi=110"),
    ],
)
def test_the_search_finds_what_is_set_by_hand(line: str, fault: str) -> None:
    assert faults(line) == [fault]


def test_the_search_lets_names_pass() -> None:
    assert not faults("axes.bar(1, 2, color=SERIES[0], ecolor=INK, edgecolor='none')\naxes.text(0, 0, 'a', fontsize=SMALL)")


def test_the_style_ends_with_what_is_drawn() -> None:
    before = dict(mpl.rcParams)
    with styled():
        assert mpl.rcParams["text.color"] == INK and mpl.rcParams["legend.frameon"] is False
        assert all(mpl.rcParams[name] == value for name, value in STYLE.items() if name != "font.family")
    assert dict(mpl.rcParams) == before


def test_a_style_of_the_readers_own_does_not_reach_the_pictures() -> None:
    with mpl.rc_context({"figure.facecolor": "black", "axes.facecolor": "black", "text.color": "yellow"}):
        axes = new_axes(3, 2)
        dress(axes, "Title", grid="x", below="conditions")
    assert axes.figure.get_facecolor() == axes.get_facecolor() == (1, 1, 1, 1)
    assert PAPER == "#ffffff"
    assert axes.get_title(loc="left") == "Title" and axes.texts[0].get_text() == "conditions"
    plt.close("all")


def test_files_have_one_resolution_and_leave_no_figure(tmp_path: Path) -> None:
    from PIL import Image

    before = plt.get_fignums()
    save_figure(new_figure(2, 1), tmp_path / "a.png")
    save_figure(new_figure(2, 1, shown=False), tmp_path / "b.png")
    assert plt.get_fignums() == before
    assert [Image.open(tmp_path / name).size for name in ("a.png", "b.png")] == [(2 * DPI, DPI)] * 2
