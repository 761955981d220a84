"""Command `study`: runs one, prints its table, and says what has failed."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from fasterai.study.arguments import ABOUT, add_study_arguments, read_only
from fasterai.study.catalogue import STUDIES, find_study
from fasterai.study.engine import run

__all__ = ["main", "run_study"]

FAILED, USAGE, INTERRUPTED = 1, 2, 130


def run_study(arguments: argparse.Namespace) -> int:
    """Run the study that the arguments name, or list the studies; return the exit status.

    Raises:
        ImportError, TypeError, ValueError: An argument is refused, or something it needs is missing.
    """
    if arguments.name is None:
        width = max(map(len, STUDIES))
        print("\n".join(f"{name:{width}}  {find_study(name).about}" for name in STUDIES))
        return 0
    study = find_study(arguments.name)
    settings = study.settings(arguments.size)
    result = run(
        study,
        arguments.data,
        size=arguments.size,
        folder=arguments.folder,
        storage=arguments.storage,
        seeds=arguments.seeds,
        only=read_only(arguments.only, settings),
        device=arguments.device,
    )
    print(f"\n{result}\n\ntable, picture and runs: {arguments.folder or f'study-{study.name}'}/")
    if result.failures:
        again = "the same command tries them once more"
        print(f"{len(result.failures)} of {len(result.runs)} runs failed; {again}", file=sys.stderr)
        return FAILED
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run `python -m fasterai.study`, and return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m fasterai.study", description=ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_study_arguments(parser)
    try:
        return run_study(parser.parse_args(argv))
    except (ImportError, OSError, TypeError, ValueError) as error:
        print(f"study: error: {' '.join(str(error).split())}", file=sys.stderr)
        return USAGE
    except KeyboardInterrupt:
        print("\nstudy: interrupted; the same command goes on with the runs that are left", file=sys.stderr)
        return INTERRUPTED
