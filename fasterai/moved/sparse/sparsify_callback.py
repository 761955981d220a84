"""The old home of fastai's callback: a re-export only."""

from fasterai.callbacks.fastai import SparsifyCallback

__all__ = ["SparsifyCallback"]
