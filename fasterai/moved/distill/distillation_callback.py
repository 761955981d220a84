"""The old home of fastai's callback: a re-export only."""

from fasterai.callbacks.fastai import KnowledgeDistillationCallback

__all__ = ["KnowledgeDistillationCallback"]
