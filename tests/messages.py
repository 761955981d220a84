"""What is said meanwhile, and by nobody else: filters of warnings are those of the process, and what is collected may speak."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def heard(words: str = "", category: type[Warning] = UserWarning) -> Iterator[list[str]]:
    """Collect what earlier tests left, then note the warnings of this kind that have these words, once the block has ended."""
    gc.collect()
    said: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield said
        finally:
            said += [str(w.message) for w in caught if issubclass(w.category, category) and words in str(w.message)]
