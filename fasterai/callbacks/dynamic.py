"""Dynamic sparse training as callbacks: the arguments are the participants', without the model."""

from __future__ import annotations

from fasterai.callbacks.participants import ParticipantMethod
from fasterai.sparse.dynamic.acdc import ACDC
from fasterai.sparse.dynamic.regrow import SET, RigL, StaticSparse
from fasterai.sparse.dynamic.thresholds import STR

__all__ = ["ACDCMethod", "RigLMethod", "SETMethod", "STRMethod", "StaticMethod"]


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
