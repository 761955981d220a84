"""All tests: so small networks are faster on one thread, many times so where other programs hold the cores.

Lightning and Accelerate set variables of distributed training, and start a process group where they find them. A file leaves
neither to the next one.
"""

import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)


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
def notebook_runs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[Path, Future[None]]]:
    """Run the notebooks of the tests that were chosen, one after the other in processes of their own, while other tests run.

    The thread here only waits: other tests set filters of warnings, variables and folders of this process as they need them.
    """
    tests = [item for item in request.session.items if item.name.startswith("test_notebook_runs[")]
    pool, before = ThreadPoolExecutor(1), dict(os.environ)
    try:
        paths = [test.callspec.params["path"] for test in tests]
        yield {path: pool.submit(tests[0].module.check, path, tmp_path_factory.mktemp(path.stem), before) for path in paths}
    finally:
        pool.shutdown(cancel_futures=True)
