"""Every notebook of nbs/ runs from top to bottom, does what it says, and is kept with its outputs."""

from __future__ import annotations

import functools
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import nbformat
import pytest

from tests.beside import Beside, waits_for
from tests.notebooks import ENVIRONMENT, FOLDER, clean, joined

ROOT = FOLDER.parent
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
by_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)

#: What must hold at the end of each notebook: the table of the last cell is named `report`.
TABLE = """
assert list(report.costs) == ["dense", "sparse", "small"]
_dense, _sparse, _small = report.costs.values()
assert _small.parameters < _sparse.parameters == _dense.parameters
assert _small.nonzero <= _sparse.nonzero < _dense.nonzero
assert _small.macs < _sparse.macs == _dense.macs
assert _small.file_bytes < _sparse.file_bytes
assert list(report.scores) in (["accuracy"], ["explained"]) and report.latency is not None
"""
SAME = """
_accuracies = report.scores["accuracy"]
assert abs(_accuracies["small"] - _accuracies["sparse"]) < 0.01  # an image or two, by rounding
assert _accuracies["sparse"] > _accuracies["dense"] - 0.3
"""
HALVED = "assert removal.removed and all(n == 2 * m for n, m in removal.removed.values())\n"
#: What must hold besides. Sparsities are those asked for, to the unit.
CHECKS = {
    "a-loop-of-your-own": SAME + "assert held == reached == 12859 / 14288 and zeros(model) < 0.1",
    "criteria-and-granularities": SAME + "assert run.sparsity.overall == 0.5 and len(names) == 16",
    "distillation": SAME + "assert sparsifier.sparsity.overall == 0.75 and not teacher._forward_hooks\n"
    "assert all(run[-1] > 0.8 for runs in courses.values() for run in runs)",
    "dynamic": "assert rigl.sparsity.overall == round(0.8 * 5072) / 5072 and held.sparsity.overall > 0.3\n"
    "assert rigl.moves > 10 and set(reached) == {0.0, rigl.sparsity.overall} and reached[-1] > 0",
    "filter-variety": SAME + HALVED + "assert sparsifier.sparsity.overall == 0.5\n"
    "assert all(int(kept.sum()) == 24 for kept in masks.values())\n"
    "assert nearest(masks['variety']).max() < nearest(masks['alone']).max()",
    "hugging-face": SAME + "assert callback.sparsifier.sparsity.overall == 0.5 and same",
    "induced-features": SAME + "assert len(selector.keep) == 16 and result.removal.removed['0.weight'] == (64, 32)\n"
    "assert same and int(mask.keep.sum()) == 32 and 0 in chosen.selector.keep",
    "lightning": SAME + "assert callback.sparsifier.sparsity.overall == 0.5\n"
    "assert torch.equal(whole.network[0].weight, resumed.network[0].weight)",
    "lottery-tickets": "assert ticket.sparsity == round((1 - 0.5**5) * 14288) / 14288 and len(ticket.results) == 5\n"
    "assert winner.stamp == ticket.stamp and channels.sparsity == 0.5 and single.sparsity == tickets[2].sparsity\n"
    "assert min(r[2] for r in lines['the ticket']) > max(r[2] for r in lines['a random mask'])",
    "mixtures-of-experts": "assert same and after > before and experts.removed == {name: (8, 4)}\n"
    "assert abs(report.scores['explained']['small'] - report.scores['explained']['sparse']) < 1e-4\n"
    "assert set(removal.removed.values()) == {(32, 16)} and mixtral.config.num_local_experts == 5",
    "nm": "assert groups.unique().tolist() == [2] and same and float(training.sparsity) == 0.5\n"
    "assert flips.overall > 1000 and sparse_end > dense_end - 0.1 and len(sparse[4].weight) == 2 * len(small[4].weight)",
    "pretraining": SAME
    + "assert len(result.rows) == 8 and not result.failures and 'checkpoint must be of the same' in refused\n"
    "assert channels.sparsity.overall == 0.5 and removal.removed and not removal.refused",
    "pruning-from-scratch": "assert 0.48 < result.share <= 0.5 and 0.48 < wider.share <= 0.5\n"
    "assert all(searched == dense * 5 // 4 for dense, searched, _ in widths.values())\n"
    "assert min(report.scores['accuracy'].values()) > 0.8 and result.train_epochs(4) == 8",
    "quickstart": SAME + HALVED + "assert agree == [True, True]\n"
    "assert weights.sparsifier.sparsity.overall == round(0.9 * 56224) / 56224",
    "regularization": SAME + "assert sum(n - m for n, m in removal.removed.values()) > 10 and not removal.refused\n"
    "assert costs['l1', 'filter'] == 4 and costs['group_lasso', 'weight'] == 8 and costs['growing', 'filter'] == 20.5",
    "schedules": SAME + "assert abs(reached[-1] - 0.9) < 1e-4 and run.sparsity.overall == 0.5",
    "sensitivity-and-budgets": SAME + "assert run.sparsity.overall == 0.5\n"
    "assert pruner.removal is not None and 0.48 < costs.share('small', 'macs') <= 0.5",
    "studies": "assert len(counts) == 20 and len(more.rows) == 10 and not more.failures\n"
    "assert more.rows[0].mean('accuracy') < more.rows[4].mean('accuracy') and small[1].out_features == 32",
    "tabular": SAME + HALVED,
    "ternary": "assert same and sizes['packed'] < 0.15 * sizes['dense'] and len(losses) == 6\n"
    "assert all(losses[n, 'exact'] < losses[n, 'threshold'] for n in (4, 16, 64))\n"
    "assert min(report.scores['accuracy'].values()) > 0.9 and training.report().layers['7.weight'].error > 0",
    "text": SAME + HALVED,
    "timm": SAME + "assert run.sparsity.overall == 0.5 and removal.removed",
    "transformers": HALVED + "assert same and moved < 1e-4 and removal.removed['patch_embed.proj.weight'] == (64, 32)\n"
    "assert report.scores['accuracy']['small'] > max(before, 0.8) and (onnx - wanted).abs().max() < 1e-4",
    "what-a-mask-brings": SAME + "assert files['weights masked'][0] == files['dense'][0]\n"
    "assert files['weights masked'][1] < 0.5 * files['dense'][1]\n"
    "assert bytes_of(weights) == bytes_of(dense) > bytes_of(small)",
}


def test_every_notebook_has_its_check() -> None:
    assert set(CHECKS) == {path.stem for path in NOTEBOOKS}


def check(path: Path, folder: Path, environment: Mapping[str, str]) -> None:
    """Run a notebook with its check as the last cell, by another process: nothing of it happens in this one."""
    notebook = nbformat.read(path, as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell(TABLE + CHECKS[path.stem]))
    nbformat.write(notebook, folder / path.name)
    server = server_of(tuple(environment.items()))
    assert server.stdin is not None and server.stdout is not None
    server.stdin.write(f"{folder / path.name}\t{folder}\n")
    server.stdin.flush()
    assert server.stdout.readline() == "0\n", (folder / "errors.txt").read_text(encoding="utf-8")


@functools.cache
def server_of(environment: tuple[tuple[str, str], ...]) -> subprocess.Popen[str]:
    """Begin the process whose forks run the notebooks; it ends with this one, whose pipe it reads."""
    command = [sys.executable, "-m", "tests.kernels"]
    variables = dict(environment) | ENVIRONMENT
    return subprocess.Popen(command, cwd=ROOT, env=variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


RUNS = [pytest.param(path, marks=waits_for(check, path), id=path.stem) for path in NOTEBOOKS]


@pytest.mark.parametrize("path", RUNS)
def test_notebook_runs(path: Path, beside: Beside) -> None:
    beside(check, path)


def test_no_client_of_kernels_works_in_the_process_of_the_tests() -> None:
    assert "nbclient" not in sys.modules


@by_notebook
def test_notebook_is_kept_with_its_outputs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    heads = re.findall(r"<th\b[^>]*>(.*?)</th>", cells[-1].outputs[-1].data["text/html"])
    assert heads == ["", "dense", "sparse", "small"]
    drawing = [cell for cell in cells if re.search(r"plt\.subplots|\.plot\(", cell.source)]
    assert [cell.source for cell in drawing if not any("image/png" in o.get("data", {}) for o in cell.outputs)] == []


@by_notebook
def test_notebook_is_light_and_says_nothing_of_the_machine(path: Path) -> None:
    text = path.read_text()
    assert len(text) < 300_000
    assert re.findall(r"/(?:home|opt|root|tmp|usr|work)/\w+", text) == []
    notebook = nbformat.read(path, as_version=4)
    clean(notebook)
    assert notebook == nbformat.read(path, as_version=4), "write it with `python -m tests.notebooks`"


@by_notebook
def test_notebook_is_made_to_be_read(path: Path) -> None:
    cells = nbformat.read(path, as_version=4).cells
    assert cells[0].cell_type == "markdown" and cells[0].source.startswith("# ")
    lines = [line for cell in cells if cell.cell_type == "code" for line in cell.source.splitlines()]
    assert [line for line in lines if len(line) > 88] == []


def test_pieces_of_a_stream_are_joined() -> None:
    pieces = [nbformat.v4.new_output("stream", name=name, text=text) for name, text in (("stdout", "a"), ("stdout", "b"))]
    image = nbformat.v4.new_output("display_data", data={})
    last = nbformat.v4.new_output("stream", name="stdout", text="c")
    assert [output.get("text") for output in joined([*pieces, image, last])] == ["ab", None, "c"]
