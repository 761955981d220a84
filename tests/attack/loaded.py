"""Imports that all processes of the attack are forked with, made once and without a word."""

import contextlib
import io
import warnings

with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
    warnings.simplefilter("ignore")
    import torch.distributed
    import torch.export
    import tqdm

    import fasterai.all
    import fasterai.cli.demo
    import fasterai.cli.prune
    import fasterai.cli.sparsify
    import tests.attack.disks
    import tests.attack.folders
    import tests.attack.ranks
    import tests.attack.settings
    import tests.attack.states
    import tests.attack.teachers

__all__ = ["fasterai", "tests", "torch", "tqdm"]
