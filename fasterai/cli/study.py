"""`fasterai study`: methods compared over settings and seeds."""

from __future__ import annotations

import argparse

from fasterai.cli.errors import UsageError, told_as_usage
from fasterai.study.command import run_study

__all__ = ["run"]


def run(arguments: argparse.Namespace) -> int:
    """Run a study, or list them."""
    try:
        with told_as_usage():
            return run_study(arguments)
    except ImportError as error:
        raise UsageError(str(error)) from error
