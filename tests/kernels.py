"""Runs notebooks in kernels: `run` in a fresh interpreter, `python -m tests.kernels` in forks of one that has imported all.

The second reads `NOTEBOOK FOLDER` from lines of its input, works in the folder, writes nothing into the notebook, and answers
each line with the exit status; what went wrong stands in `errors.txt` in the folder. Imports are half of the time of most
notebooks. Tests wait for this as another process, so that what a client of kernels does (threads, loops of events, filters of
warnings, handles that are collected late) is none of theirs.
"""

from __future__ import annotations

import gc
import importlib
import os
import signal
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

import nbformat
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from jupyter_core.utils import run_sync
from nbclient import NotebookClient
from nbformat import NotebookNode

from tests.notebooks import ENVIRONMENT

#: What notebooks import, and what the library imports when it is first asked for it.
IMPORTS = (
    *("torch._dynamo", "torch.export", "torch.onnx", "torch.fx.experimental.symbolic_shapes", "ipykernel.kernelapp"),
    *("sklearn.datasets", "sklearn.model_selection", "matplotlib.pyplot", "matplotlib_inline.backend_inline", "pandas", "timm"),
    *("fastai.vision.all", "fastai.tabular.all", "lightning.pytorch", "transformers.trainer", "safetensors.torch"),
    *(f"fasterai.{name}.all" for name in ("analyze", "distill", "misc", "prune", "sparse")),
    *("fasterai.callbacks.huggingface", "fasterai.callbacks.lightning", "fasterai.export.all", "fasterai.study.engine"),
)


class OwnKernelManager(AsyncKernelManager):
    """Runs the interpreter that runs the tests, whatever a kernel called python3 stands for on this machine."""

    @property
    def kernel_spec(self) -> KernelSpec:
        return KernelSpec(argv=[sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"], language="python")


class ForkManager(AsyncKernelManager):
    """Speaks with a kernel that is a fork of this process, which waits for the file that says where."""

    process = 0
    has_kernel = True

    async def _async_is_alive(self) -> bool:
        return os.waitpid(self.process, os.WNOHANG) == (0, 0)

    is_alive = _async_is_alive  # type: ignore[assignment]

    async def shutdown_kernel(self, *_: Any, **__: Any) -> None:  # type: ignore[override]
        with suppress(ProcessLookupError, ChildProcessError):  # it has ended by itself
            os.kill(self.process, signal.SIGKILL)
            os.waitpid(self.process, 0)
        self.cleanup_connection_file()


def run(notebook: NotebookNode, folder: Path) -> None:
    """Run all cells in a fresh interpreter that works in `folder`; an error in a cell is raised."""
    manager = OwnKernelManager(kernel_name="python3")
    client = NotebookClient(notebook, km=manager, timeout=120, resources={"metadata": {"path": str(folder)}})
    try:
        client.execute(env=os.environ | ENVIRONMENT)
    finally:  # a manager that is given is not ended by the client
        run_sync(manager.shutdown_kernel)(now=True)


def run_in_fork(notebook: NotebookNode, folder: Path) -> None:
    """Run all cells in a fork of this process that works in `folder`; an error in a cell is raised."""
    connection = folder / "kernel.json"
    connection.unlink(missing_ok=True)
    process = os.fork()
    if not process:
        _be_kernel(connection)
    manager = ForkManager(connection_file=str(connection))
    manager.process = process
    manager.write_connection_file()
    try:
        NotebookClient(notebook, km=manager, timeout=120).execute()
    finally:
        run_sync(manager.shutdown_kernel)()


def _be_kernel(connection: Path) -> None:
    from ipykernel.kernelapp import IPKernelApp

    os.chdir(connection.parent)
    while not (connection.is_file() and connection.stat().st_size):
        time.sleep(0.01)
    try:
        IPKernelApp.launch_instance(argv=["-f", str(connection)])
    finally:
        os._exit(0)


def _answer(path: str, folder: Path) -> int:
    """Run a notebook in a fork, and return its exit status."""
    process = os.fork()
    if process:
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    status = 1
    try:
        with open(folder / "errors.txt", "w", encoding="utf-8") as errors:
            os.dup2(errors.fileno(), 1)
            os.dup2(errors.fileno(), 2)
            try:
                run_in_fork(nbformat.read(path, as_version=4), folder)
                status = 0
            except Exception:
                errors.write(traceback.format_exc())
    finally:
        os._exit(status)


def serve() -> None:
    """Import all that is slow, and run the notebooks that are asked for, one after another, until the input ends."""
    for name in IMPORTS:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # the forks' collections leave alone, and do not copy, what is there
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        path, folder = line.rstrip("\n").split("\t")
        print(_answer(path, Path(folder)), file=answers, flush=True)


if __name__ == "__main__":
    serve()
    os._exit(0)  # bindings tell of what they leave at the end of an interpreter
