"""Owner of a run: the process that does it, described so that another one can tell if it is still there."""

from __future__ import annotations

import hashlib
import os
import platform
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

__all__ = ["is_gone", "own_process"]


def own_process() -> dict[str, Any]:
    """Describe this process, so that another one of the same machine can tell if it is still there."""
    return {"machine": _machine(), "host": platform.node(), "process": os.getpid(), "since": _start_of(os.getpid())}


def _machine() -> str:
    """Return a text that processes have in common which see each other's numbers: a machine, or a container of it."""
    parts = [platform.node(), str(uuid.getnode())]
    with suppress(OSError):
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text(), str(Path("/proc/self/ns/pid").readlink())]
    return hashlib.sha256("|".join(parts).encode()).hexdigest()[:16]


def _start_of(process: int) -> str:
    """Return when a process was started, as Linux counts it: numbers of processes come again. Empty if it cannot be known."""
    with suppress(OSError, IndexError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    return ""


def is_gone(found: Mapping[str, Any]) -> bool:
    """Tell if the owner of a trial was a process of this machine that is not there any more."""
    if found["machine"] != _machine():
        return False
    try:
        os.kill(found["process"], 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return _start_of(int(found["process"])) != str(found["since"])
