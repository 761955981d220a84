"""The old home of fastai's callback: a re-export only."""

from fasterai.callbacks.fastai import RegularizeCallback

__all__ = ["RegularizeCallback"]
