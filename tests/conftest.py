"""All tests: so small networks are faster on one thread, many times so where other programs hold the cores.

Lightning and Accelerate set variables of distributed training, and start a process group where they find them. A file leaves
neither to the next one.
"""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tests.beside import Beside

torch.set_num_threads(1)
collect_ignore = ["kernels.py"]  # a client of kernels, which the search for doctests would load here


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    yield
    torch.set_num_threads(1)  # whatever a test or a library has set


@pytest.fixture(autouse=True, scope="module")
def _no_process_group_is_left() -> Iterator[None]:
    before = dict(os.environ)
    yield
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK", "WORLD_SIZE", "NODE_RANK"):
        os.environ.pop(name, None)
        if name in before:
            os.environ[name] = before[name]


@pytest.fixture(autouse=True, scope="session")
def beside(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Beside]:
    """Begin what the chosen tests wait for; where processes share the tests, each does it when it comes to it."""
    pool = ThreadPoolExecutor(1)
    try:
        asked = Beside(pool, tmp_path_factory)
        for item in request.session.items if "PYTEST_XDIST_WORKER" not in os.environ else ():
            if not any(mark.args[0] for mark in item.iter_markers("skipif")):
                for mark in item.iter_markers("beside"):
                    asked.begin(*mark.args)
        yield asked
    finally:
        pool.shutdown(cancel_futures=True)
