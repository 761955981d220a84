"""The state of torch in which a model is exported: one thread at a time, in silence, and without questions about data."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.nn.modules import transformer

__all__ = ["exporting"]

#: Held while a model is exported: torch.export keeps its state in module globals, and fails where two threads meet in it.
LOCK = threading.RLock()


@contextmanager
def exporting() -> Iterator[None]:
    """Prepare torch for an export by this thread; a second thread waits until the first has finished.

    While it lasts, and for this thread alone:

    - tensors stay free of subclasses, since fastai's layers cast to its own class, which an export cannot handle;
    - a mask of `nn.TransformerEncoder` and `nn.Transformer` is not looked into. Their `_detect_is_causal_mask` asks for the
      mask's values, to choose a faster kernel where it is causal, and an export has no values. It is answered by the hint that
      the caller gave, else by no: the mask itself is then added to the scores, as it is with any other mask, and the outputs
      are the same. The recorded program so holds for every mask, not for one like that of the example;
    - a failed export prints nothing: its error says what is needed. Where `TORCH_LOGS` is set, torch's logs are kept.
    """
    with LOCK, ExitStack() as stack:
        me = threading.get_ident()
        stack.enter_context(_for_this_thread(torch.Tensor, "as_subclass", _as_it_is, me))
        stack.enter_context(_for_this_thread(transformer, "_detect_is_causal_mask", _hinted, me))
        stack.enter_context(_silence(me))
        yield


def _as_it_is(tensor: Any, cls: Any) -> Any:
    return tensor


def _hinted(mask: Any, is_causal: bool | None = None, size: int | None = None) -> bool:
    return is_causal is True


@contextmanager
def _for_this_thread(holder: Any, name: str, other: Callable[..., Any], thread: int) -> Iterator[None]:
    """Put another function in a function's place for a while; other threads still call the first one."""
    before = getattr(holder, name)

    def either(*arguments: Any, **keywords: Any) -> Any:
        return (other if threading.get_ident() == thread else before)(*arguments, **keywords)

    setattr(holder, name, either)
    try:
        yield
    finally:
        setattr(holder, name, before)


@contextmanager
def _silence(thread: int) -> Iterator[None]:
    """Drop what a thread writes to stderr, and what it logs as torch, for a while."""
    dropped = _Dropped(thread)
    names = (
        [] if os.environ.get("TORCH_LOGS") else [n for n in logging.root.manager.loggerDict if n.partition(".")[0] == "torch"]
    )
    loggers = [logging.getLogger(name) for name in names]
    before = sys.stderr
    for logger in loggers:
        logger.addFilter(dropped)
    sys.stderr = _Unwritten(before, thread)
    try:
        yield
    finally:
        sys.stderr = before
        for logger in loggers:
            logger.removeFilter(dropped)


class _Dropped(logging.Filter):
    """A filter of logs that passes on those of other threads."""

    def __init__(self, thread: int) -> None:
        super().__init__()
        self.thread = thread

    def filter(self, record: logging.LogRecord) -> bool:
        return record.thread != self.thread


class _Unwritten:
    """A stream that passes on what other threads write."""

    def __init__(self, stream: Any, thread: int) -> None:
        self.stream, self.thread = stream, thread

    def write(self, text: str) -> int:
        return len(text) if threading.get_ident() == self.thread else self.stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)
