"""README.md and docs/: their Python runs, their links lead somewhere, and each catalogue's page names all its entries.

A Python block is marked by a comment in the line before it: `<!-- run -->`, or `<!-- not run: why -->`. The blocks of a page
share their names, and begin with those of `reader()`: what a reader has before fasterai. A line that ends with `# -> value` is
compared with that value.
"""

from __future__ import annotations

import ast
import json
import re
import sys
import types
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fasterai.core import contexts, criteria, granularities, schedules
from fasterai.distill.losses import features

ROOT = Path(__file__).parents[1]
GUIDES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [*GUIDES, *sorted((ROOT / "docs" / "reference").glob("*.md"))]
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
WIDEST = 88  # columns of code that a page of the site shows without scrolling
BLOCK = re.compile(r"^(?P<before>[^\n]*)\n```python\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE)
RUN, NOT_RUN = "<!-- run -->", re.compile(r"<!-- not run: .+ -->")
CATALOGUES = {
    "schedules.md": schedules.__all__,
    "criteria.md": criteria.__all__,
    "granularities.md": granularities.__all__,
    "contexts.md": [*contexts.__all__, '"global"'],
    "distilled-features.md": features.__all__,
}
by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def prose(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def small_net() -> nn.Sequential:
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)]
    first = [nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()]
    return nn.Sequential(*first, nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), *head)


def small_learner(loader: Any) -> Any:
    import fastai.callback.schedule  # noqa: F401 - gives the Learner its fit_one_cycle
    from fastai.callback.progress import ProgressCallback
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner
    from fastai.metrics import accuracy

    learn = Learner(DataLoaders(loader, loader), small_net(), loss_func=nn.CrossEntropyLoss(), metrics=accuracy)
    learn.remove_cb(ProgressCallback)
    learn.logger = lambda *_: None
    return learn


def small_module() -> Any:
    import lightning.pytorch as pl

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = small_net()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x)

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            return F.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    return Module()


def tiny_bert() -> tuple[Any, list[dict[str, torch.Tensor]]]:
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    ids = torch.randint(0, 20, (16, 5))
    return BertForSequenceClassification(BertConfig(**sizes)), [{"input_ids": row, "labels": row[0] % 2} for row in ids]


def reader() -> dict[str, Any]:
    """The names that the pages speak of without making them: a model, its training, and the same in fastai and Lightning."""
    torch.manual_seed(0)
    model = small_net()
    images, labels = torch.randn(32, 1, 8, 8), torch.randint(0, 10, (32,))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), batch_size=8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def train(epochs: int) -> None:
        for _ in range(epochs):
            for x, y in loader:
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()

    names = {"torch": torch, "nn": nn, "F": F, "partial": partial, "model": model, "optimizer": optimizer, "loader": loader}
    names |= {"epochs": 2, "x": images[:8], "y": labels[:8], "train": train, "small_net": small_net}
    names["tiny_bert"] = tiny_bert
    return names | {"learn": small_learner(loader), "module": small_module(), "small_learner": partial(small_learner, loader)}


def run_block(code: str, names: dict[str, Any]) -> None:
    for node in ast.parse(code).body:
        above = [one.lineno for one in getattr(node, "decorator_list", ())]  # a class begins with its decorators
        source = "\n".join(code.splitlines()[min([node.lineno, *above]) - 1 : node.end_lineno])
        expected = code.splitlines()[node.end_lineno - 1].partition("# -> ")[2]
        if expected:
            assert isinstance(node, ast.Expr), f"only an expression has a value: {source}"
            assert repr(eval(ast.get_source_segment(code, node), names)) == expected, source
        else:
            exec(compile(source, "<docs>", "exec"), names)


def test_a_wrong_value_in_a_page_is_noticed() -> None:
    run_block("x = 1\nx + 1  # -> 2\n", {})
    with pytest.raises(AssertionError, match=r"x \+ 1"):
        run_block("x = 1\nx + 1  # -> 3\n", {})


def test_decorators_of_a_page_are_run() -> None:
    run_block("@staticmethod\n@repr\ndef f():\n    pass\nf.__func__[:9]  # -> '<function'\n", {})


@by_page
def test_every_python_block_is_marked(page: Path) -> None:
    text = page.read_text()
    blocks = [match["before"] for match in BLOCK.finditer(text)]
    assert len(blocks) == text.count("```python")
    assert [b for b in blocks if b != RUN and not NOT_RUN.fullmatch(b)] == []


@by_page
@pytest.mark.filterwarnings("ignore")
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = [match["code"] for match in BLOCK.finditer(page.read_text()) if match["before"] == RUN]
    if not blocks:
        pytest.skip("no Python to run")
    monkeypatch.chdir(tmp_path)
    matplotlib.use("Agg")
    script = types.ModuleType("script")  # where what is pickled is found again
    monkeypatch.setitem(sys.modules, "script", script)
    names = vars(script)
    names.update(reader())
    for block in blocks:
        run_block(block, names)
    matplotlib.pyplot.close("all")


def slug(heading: str) -> str:
    """The anchor of a heading, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


def too_wide(text: str) -> list[str]:
    """List the lines of blocks of code and output that are too wide; blocks of directives show something else."""
    found, opened = [], ""
    for line in text.splitlines():
        if line.startswith("```"):
            opened = "" if opened else line
        elif opened and not opened.startswith("```{") and len(line) > WIDEST:
            found.append(line)
    return found


@by_page
def test_code_and_output_fit_into_the_page(page: Path) -> None:
    assert too_wide(page.read_text()) == []


def test_a_line_that_is_too_wide_is_noticed() -> None:
    assert too_wide(f"{'x' * 99}\n```python\n{'y' * 88}\n{'z' * 89}\n```\n") == ["z" * 89]


def resolves(link: str, page: Path) -> bool:
    path, _, anchor = link.partition("#")
    there = page.parent / path if path else page
    return there.exists() and (not anchor or anchor in {slug(h) for h in re.findall(r"^#+ (.*)$", prose(there), re.MULTILINE)})


def dead_links(text: str, page: Path) -> list[str]:
    """List the links to files, headings and pictures of the repository that lead nowhere."""
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    inside = [link for link in links if not re.match(r"https?:|attachment:|data:", link) and link != "genindex"]
    return [link for link in inside if not resolves(link, page)]


@by_page
def test_links_resolve(page: Path) -> None:
    assert dead_links(prose(page), page) == []


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_links_of_notebooks_resolve(notebook: Path) -> None:
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    text = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    assert dead_links(text, notebook) == []


def test_a_broken_link_is_noticed() -> None:
    page = ROOT / "docs/index.md"
    assert resolves("sparsifying.md#a-second-fit", page)
    assert not resolves("sparsifying.md#a-third-fit", page)
    assert not resolves("sparsify.md", page)
    text = '[a](sparsify.md) [b](https://nowhere) ![c](images/none.png) <img src="none.png"> [d](#nowhere) [e](index.md)'
    assert dead_links(text, page) == ["sparsify.md", "images/none.png", "#nowhere", "none.png"]


def contents(page: str) -> list[str]:
    """List what the tables of contents of a page name, as paths below docs/ without an ending."""
    blocks = re.findall(r"```\{toctree\}\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if line and not line.startswith(":")]
    return [(Path(page).parent / line).as_posix() for line in lines]


def test_every_page_is_in_the_table_of_contents_once() -> None:
    pages = [page.relative_to(ROOT / "docs").with_suffix("").as_posix() for page in PAGES[1:]]
    listed = [line for page in pages for line in contents(f"{page}.md")]
    assert sorted(listed) == sorted([page for page in pages if page != "index"] + [f"nbs/{one.stem}" for one in NOTEBOOKS])


@by_page
def test_every_page_begins_with_its_only_title(page: Path) -> None:
    text = prose(page)
    assert text.startswith("# ")
    assert len(re.findall(r"^# ", text, re.MULTILINE)) == 1


@pytest.mark.parametrize(("page", "name"), [(page, name) for page, names in CATALOGUES.items() for name in names])
def test_catalogue_pages_name_every_entry(page: str, name: str) -> None:
    rows = [line for line in (ROOT / "docs" / page).read_text().splitlines() if line.startswith("| `")]
    assert any(f"`{name}`" in row.split("|")[1] for row in rows)


def column(page: str, row: str, position: int) -> list[float]:
    """Read one column of the rows of a page's tables that begin as given."""
    lines = (ROOT / "docs" / page).read_text().splitlines()
    return [float(line.split("|")[position]) for line in lines if re.match(row, line)]


def test_the_figures_of_the_guide_are_those_of_the_tables() -> None:
    """docs/choosing.md says in words what other pages have measured, and must follow when they are measured anew."""
    guide = (ROOT / "docs/choosing.md").read_text()
    bench, classifiers = "removal-benchmarks.md", r"\| (alexnet|vgg11_bn|resnet18|resnet50|resnext50_32x4d|wide_resnet50_2) \| "
    faster = column(bench, r"\| resnet18 \| \w+ \| \d+ \| 0.5 \|", 8)
    arrives = column(bench, r"\| (resnet18|vgg16_bn) \| \w+ \| \d+ \| 0.5 \|", 9)
    last = column(bench, r"\| (resnet18|vgg16_bn) \| channels_last \| \d+ \| 0.5 \|", 9)
    (left,), (macs,) = (
        column("network-tables.md", r"\| resnet18 \| pass \| 5e", 4),
        column(bench, r"\| resnet18 \| local \| fast", 5),
    )
    one, all_ = (column(bench, classifiers + context + r" \| fasterai", 4) for context in ("local", "global"))
    (vit,), (convnext,) = (column("network-tables.md", rf"\| {name} \| pass", 4) for name in ("vit_b_16", "convnext_tiny"))
    texts = (ROOT / "docs/network-tables.md").read_text().partition("| bert | pass")[2].partition("| whisper |")[0]
    words = [float(line.split("|")[4]) for line in ("| bert | pass" + texts).splitlines()]
    said = [
        f"{left:.0%}".replace("%", " % of the [parameters]"),
        f"{macs:.0%}".replace("%", " % of the [MACs]"),
        f"{min(faster):.1f} to {max(faster):.1f} times as fast",
        f"vit_b_16 {vit * 100:.0f} %, convnext_tiny {convnext * 100:.0f} %",
        f"of tiny configurations, {min(words) * 100:.0f} to {max(words) * 100:.0f} %",
        f"[{min(arrives):.2f} to {max(arrives):.2f} of it]",
        f"in `channels_last` at least {min(last):.2f}",
        f"[between {min(all_):.3f} and {max(all_):.3f}]",
        f"`local` between {min(one):.3f} and {max(one):.3f}",
    ]
    assert [words for words in said if words not in guide] == []
    elsewhere = {"command-line.md": ["36.00%", "32.00%", "14.25%", "(51.3%)"], "from-sparse-to-small.md": ["1:51", "71.66%"]}
    assert all(figure in (ROOT / "docs" / page).read_text() for page, figures in elsewhere.items() for figure in figures)
