"""All tests: so small networks are faster on one thread, many times so where other programs hold the cores.

Lightning and Accelerate set variables of distributed training, and start a process group where they find them. A file leaves
neither to the next one.
"""

import os
from collections.abc import Iterator

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
