"""Command line: `fasterai demo`, `fasterai sparsify`, `fasterai prune` and `fasterai study`.

What is heavy (torchvision, matplotlib, scikit-learn) is imported by the command that needs it. To add a command: a module
with `run(arguments) -> int`, and its parser in `arguments.py`.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from typing import TextIO

__all__ = ["main"]

INTERRUPTED = 130  # what a shell expects after Ctrl-C
AFTERWARDS = {
    "sparsify": "--resume goes on from the last full epoch",
    "prune": "nothing was written",
    "study": "the same command goes on with the runs that are left",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command, and return its exit status.

    Args:
        argv: The arguments without the program's name; those of the process if left out.

    Returns:
        0 if all went well, 1 if runs of a study have failed, 2 after a usage error, 130 after Ctrl-C.
    """
    from fasterai.cli.arguments import make_parser
    from fasterai.cli.errors import UsageError

    command = ""
    try:
        arguments = make_parser().parse_args(argv)
        command = arguments.command
        with warnings.catch_warnings():
            warnings.showwarning = _warn
            return int(importlib.import_module(f"fasterai.cli.{command}").run(arguments))
    except UsageError as error:
        return _fail(str(error))
    except OSError as error:
        return _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except KeyboardInterrupt:
        print(f"\nfasterai: interrupted; {AFTERWARDS.get(command, 'start again')}", file=sys.stderr)
        return INTERRUPTED
    except SystemExit as done:  # --help and --version
        return int(done.code or 0)


def _warn(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Print a warning without the line of source that it came from."""
    print(f"fasterai: warning: {' '.join(str(message).split())}", file=sys.stderr)


def _fail(message: str) -> int:
    print(f"fasterai: error: {' '.join(message.split())}", file=sys.stderr)
    return 2
