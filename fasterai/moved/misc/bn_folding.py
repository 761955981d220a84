"""The old home of the batch-norm folder: a re-export only."""

from fasterai.misc.batchnorm import BN_Folder

__all__ = ["BN_Folder"]
