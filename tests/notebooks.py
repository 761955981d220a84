"""Notebooks, and how they are kept with their outputs: `python -m tests.notebooks [NAME ...]` writes those of nbs/ anew."""

from __future__ import annotations

import resource
import sys
import tempfile
from pathlib import Path

import nbformat
from nbformat import NotebookNode

#: Beginnings of warnings that other libraries give of themselves when they are imported or first used.
QUIET = (
    "`torch.jit.script` is deprecated",
    "`isinstance(treespec",
    "IProgress not found",
    "The given NumPy array is not writable",
)
ENVIRONMENT = {
    "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    "OMP_NUM_THREADS": "1",  # networks are small, and a fork has no threads
    "PYTHONWARNINGS": ",".join(f"ignore:{words}" for words in QUIET),
}
FOLDER = Path(__file__).parents[1] / "nbs"
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def joined(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """Join neighbouring pieces of the same stream; where a kernel cuts them depends on the moment."""
    kept: list[NotebookNode] = []
    for output in outputs:
        if kept and output.output_type == "stream" and kept[-1].get("name") == output.name:
            kept[-1].text += output.text
        else:
            kept.append(output)
    return kept


def clean(notebook: NotebookNode) -> None:
    """Leave out what differs from machine to machine: ids, times of execution, the versions of the kernel."""
    notebook.metadata = NotebookNode(METADATA)
    notebook.nbformat_minor = 5
    for i, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{i:02}", NotebookNode()
        if cell.cell_type == "code":
            cell.outputs = joined(cell.outputs)
        for output in cell.get("outputs", []):
            if "metadata" in output:
                output.metadata = NotebookNode()
            output.pop("transient", None)


def write_anew(path: Path) -> None:
    """Run a notebook, and write it with its outputs."""
    from tests.kernels import run  # tests that look at notebooks load no client of kernels

    notebook = nbformat.read(path, as_version=4)
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    with tempfile.TemporaryDirectory() as folder:
        run(notebook, Path(folder))
    clean(notebook)
    nbformat.write(notebook, path)
    spent = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
    print(f"{path.stem}: {spent:.1f} s of a processor, {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    for path in sorted(FOLDER.glob("*.ipynb")):
        if len(sys.argv) == 1 or path.stem in sys.argv[1:]:
            write_anew(path)
