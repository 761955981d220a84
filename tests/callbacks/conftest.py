from __future__ import annotations

import logging
import signal
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    """Lightning silent, Ctrl-C as it was, since Lightning ignores it from the first one on, and no process group left."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    before = signal.getsignal(signal.SIGINT)
    yield
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    signal.signal(signal.SIGINT, before)
