"""Runs a notebook in a kernel of its own: `python -m tests.kernels NOTEBOOK FOLDER` works in the folder and writes nothing.

Tests wait for this as another process, so that what a client of kernels does (threads, loops of events, filters of warnings,
handles that are collected late) is none of theirs.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import nbformat
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from jupyter_core.utils import run_sync
from nbclient import NotebookClient
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
    "PYTHONWARNINGS": ",".join(f"ignore:{words}" for words in QUIET),
}


class OwnKernelManager(AsyncKernelManager):
    """Runs the interpreter that runs the tests, whatever a kernel called python3 stands for on this machine."""

    @property
    def kernel_spec(self) -> KernelSpec:
        return KernelSpec(argv=[sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"], language="python")


def run(notebook: NotebookNode, folder: Path) -> None:
    """Run all cells in a fresh interpreter that works in `folder`; an error in a cell is raised."""
    manager = OwnKernelManager(kernel_name="python3")
    client = NotebookClient(notebook, km=manager, timeout=120, resources={"metadata": {"path": str(folder)}})
    try:
        client.execute(env=os.environ | ENVIRONMENT)
    finally:  # a manager that is given is not ended by the client
        run_sync(manager.shutdown_kernel)(now=True)


if __name__ == "__main__":
    run(nbformat.read(sys.argv[1], as_version=4), Path(sys.argv[2]))
