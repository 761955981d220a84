"""What is asked of the library under attack: clear errors, equal bits, zeros where masks are."""

from __future__ import annotations

import linecache
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fasterai
from fasterai.cli.errors import UsageError

CLEAR = (ValueError, TypeError, UsageError)
LIBRARY = str(Path(fasterai.__file__).parent)


def refusal(call: Callable[[], object], *others: type[Exception]) -> str | None:
    """The clear error that a call ends with, None if it comes to its end; any other error goes on.

    A clear error is one that the library raises in so many words: the line that raised it is a `raise` of its own.
    """
    try:
        call()
    except CLEAR as error:
        check_clear(error)
        return str(error)
    except others as error:
        return str(error)
    return None


def check_clear(error: Exception) -> None:
    """Fail on an error that came out of torch, Python or an unlucky line, and on one that says nothing."""
    trace = error.__traceback__
    assert trace is not None
    while trace.tb_next is not None:
        trace = trace.tb_next
    file, line = trace.tb_frame.f_code.co_filename, linecache.getline(trace.tb_frame.f_code.co_filename, trace.tb_lineno)
    if not file.startswith(LIBRARY) or not line.strip().startswith("raise") or len(str(error).split()) < 4:
        raise AssertionError(
            f"not a clear error: {type(error).__name__}: {error} at {Path(file).name}:{trace.tb_lineno}"
        ) from error


def equal(a: Any, b: Any) -> bool:
    """Equal to the bit, NaN included, through dicts and lists of tensors."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return (
            isinstance(a, Tensor)
            and isinstance(b, Tensor)
            and a.shape == b.shape
            and a.dtype == b.dtype
            and a.device == b.device
            and (a.is_meta or bytes_of(a) == bytes_of(b))
        )
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return list(a) == list(b) and all(equal(x, b[n]) for n, x in a.items())
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool(type(a) is type(b) and (a == b or repr(a) == repr(b) == "nan"))


def bytes_of(x: Tensor) -> bytes:
    """A tensor's values, as they lie in memory."""
    return x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes() if x.numel() else b""


def copied(state: Any) -> Any:
    """A copy that shares nothing with a state."""
    if isinstance(state, Tensor):
        return state.detach().clone()
    if isinstance(state, Mapping):
        return {n: copied(x) for n, x in state.items()}
    return type(state)(copied(x) for x in state) if isinstance(state, list | tuple) and type(state) in (list, tuple) else state


def zeros(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Fail if a masked weight is not zero."""
    parameters = dict(model.named_parameters())
    for name, mask in masks.items():
        wrong = int(parameters[name].detach()[~mask].ne(0).sum())
        assert wrong == 0, f"{wrong} masked weights of {name} are not zero"


def pruned(masks: Mapping[str, Tensor]) -> int:
    """The number of masked weights."""
    return sum(int((~mask).sum()) for mask in masks.values())


@contextmanager
def heard() -> Iterator[list[str]]:
    """The warnings that come meanwhile."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        said: list[str] = []
        try:
            yield said
        finally:
            said += [str(w.message) for w in caught if issubclass(w.category, UserWarning)]


def close(a: Any, b: Any, tolerance: float = 1e-5) -> None:
    """Fail if outputs differ by more than a share of their scale."""
    firsts, seconds = flat(a), flat(b)
    assert len(firsts) == len(seconds) and firsts
    for x, y in zip(firsts, seconds, strict=True):
        assert x.shape == y.shape, f"outputs of {tuple(x.shape)} became {tuple(y.shape)}"
        moved = float((x - y).abs().max() / x.abs().max().clamp_min(1e-12))
        assert moved <= tolerance, f"outputs moved by {moved:.1e} of their scale"


def flat(outputs: Any) -> list[Tensor]:
    """The tensors of outputs."""
    if isinstance(outputs, Tensor):
        return [outputs.detach()]
    parts: Sequence[Any] = list(outputs.values()) if isinstance(outputs, Mapping) else outputs
    return [x for part in parts for x in flat(part)] if isinstance(parts, list | tuple) else []
