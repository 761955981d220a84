"""Methods that are sparse, or ternary, from the first step on, as callbacks.

The arguments are the participants', without the model.
"""

from __future__ import annotations

from fasterai.callbacks.participants import ParticipantMethod
from fasterai.misc.ternary.training import TernaryTraining
from fasterai.sparse.dynamic.acdc import ACDC
from fasterai.sparse.dynamic.regrow import SET, RigL, StaticSparse
from fasterai.sparse.dynamic.thresholds import STR
from fasterai.sparse.nm.srste import SRSTE, STE

__all__ = [
    "ACDCMethod",
    "RigLMethod",
    "SETMethod",
    "SRSTEMethod",
    "STEMethod",
    "STRMethod",
    "StaticMethod",
    "TernarizeMethod",
]


class RigLMethod(ParticipantMethod):
    """Trains the model sparse from the first step, with weights that grow by their gradients: arguments of `RigL`."""

    makes = RigL


class SETMethod(ParticipantMethod):
    """Trains the model sparse from the first step, with weights that grow at random: arguments of `SET`."""

    makes = SET


class StaticMethod(ParticipantMethod):
    """Trains the model with random masks that stay: arguments of `StaticSparse`."""

    makes = StaticSparse


class ACDCMethod(ParticipantMethod):
    """Trains the model in phases, compressed and decompressed in turn: arguments of `ACDC`."""

    makes = ACDC


class STRMethod(ParticipantMethod):
    """Trains the model with learned thresholds: arguments of `STR`."""

    makes = STR


class SRSTEMethod(ParticipantMethod):
    """Trains the model at N:M from the first step: arguments of `SRSTE`, without the model."""

    makes = SRSTE


class STEMethod(ParticipantMethod):
    """Trains the model at N:M without decay: arguments of `STE`, without the model."""

    makes = STE


class TernarizeMethod(ParticipantMethod):
    """Trains the model with ternary groups, straight through: arguments of `TernaryTraining`, without the model."""

    makes = TernaryTraining
    figures = ("zeros",)
