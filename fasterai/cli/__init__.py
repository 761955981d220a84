"""L6. The command line: `fasterai demo`, `fasterai sparsify` and `fasterai prune`.

What is heavy (torchvision, matplotlib, scikit-learn) is imported by the command that needs it. To add a command: a module
with `run(arguments) -> int`, and its parser in `arguments.py`.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

__all__ = ["main"]

INTERRUPTED = 130  # what a shell expects after Ctrl-C


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: The arguments without the program's name; those of the process if left out.

    Returns:
        0 if all went well, 2 after a usage error, 130 after Ctrl-C.
    """
    from fasterai.cli.arguments import make_parser
    from fasterai.cli.errors import UsageError

    try:
        arguments = make_parser().parse_args(argv)
        command = importlib.import_module(f"fasterai.cli.{arguments.command}")
        return int(command.run(arguments))
    except UsageError as error:
        return _fail(str(error))
    except OSError as error:
        return _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except KeyboardInterrupt:
        print("\nfasterai: interrupted; `fasterai sparsify` goes on from its last full epoch with --resume", file=sys.stderr)
        return INTERRUPTED
    except SystemExit as done:  # --help and --version
        return int(done.code or 0)


def _fail(message: str) -> int:
    print(f"fasterai: error: {' '.join(message.split())}", file=sys.stderr)
    return 2
