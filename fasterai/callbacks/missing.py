"""Stand-ins for fastai's callbacks where fastai is not installed: errors that name the extra."""

from __future__ import annotations

from typing import Any, NoReturn

__all__ = [
    "ACDCCallback",
    "HoldCallback",
    "KnowledgeDistillationCallback",
    "ParticipantCallback",
    "PruneCallback",
    "RegularizeCallback",
    "RigLCallback",
    "SETCallback",
    "SRSTECallback",
    "STECallback",
    "STRCallback",
    "SparsifyCallback",
    "StaticCallback",
    "TernarizeCallback",
]


class _Missing:
    def __init__(self, *_: Any, **__: Any) -> None:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise ImportError(
            f"{type(self).__name__} needs fastai: pip install '.[fastai]' in a checkout of fasterai; "
            "Lightning's is in fasterai.callbacks.lightning"
        )


class SparsifyCallback(_Missing):
    """Stands for `fasterai.callbacks.fastai.SparsifyCallback`."""


class PruneCallback(_Missing):
    """Stands for `fasterai.callbacks.fastai.PruneCallback`."""


class HoldCallback(_Missing):
    """Stands for `fasterai.callbacks.fastai.HoldCallback`."""


class ParticipantCallback(_Missing):
    """Stands for `fasterai.callbacks.fastai.ParticipantCallback`."""


class KnowledgeDistillationCallback(_Missing):
    """Stands for `fasterai.callbacks.fastai.KnowledgeDistillationCallback`."""


class SRSTECallback(_Missing):
    """Stands for `fasterai.callbacks.fastai.SRSTECallback`."""


class STECallback(_Missing):
    """Stands for `fasterai.callbacks.fastai.STECallback`."""


class ACDCCallback(_Missing):
    """Stands for `fasterai.callbacks.fastai.ACDCCallback`."""


class RigLCallback(_Missing):
    """Stands for `fasterai.callbacks.fastai.RigLCallback`."""


class SETCallback(_Missing):
    """Stands for `fasterai.callbacks.fastai.SETCallback`."""


class STRCallback(_Missing):
    """Stands for `fasterai.callbacks.fastai.STRCallback`."""


class StaticCallback(_Missing):
    """Stands for `fasterai.callbacks.fastai.StaticCallback`."""


class RegularizeCallback(_Missing):
    """Stands for `fasterai.callbacks.fastai.RegularizeCallback`."""


class TernarizeCallback(_Missing):
    """Stands for `fasterai.callbacks.fastai.TernarizeCallback`."""
