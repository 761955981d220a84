"""For notebooks: `from fasterai.prune.all import *`. Re-exports only; the callbacks are fastai's, where that is installed.

What calls return (`ChannelGraph`, `Group`, `Plan`, `Removal`) is importable by name, and no part of the star.
"""

import importlib.util

from fasterai.callbacks.plain import attach
from fasterai.core import all as _core
from fasterai.core.all import *
from fasterai.core.contexts import *
from fasterai.core.criteria import *
from fasterai.core.schedules import *
from fasterai.familiar import *
from fasterai.graph.channels import ChannelGraph as ChannelGraph
from fasterai.graph.channels import Group as Group
from fasterai.graph.channels import channel_graph
from fasterai.graph.experts import ExpertGraph as ExpertGraph
from fasterai.graph.experts import expert_graph
from fasterai.graph.features import Features
from fasterai.graph.inputs import InputCut as InputCut
from fasterai.graph.inputs import cut_inputs, input_cuts
from fasterai.prune.choice.budget import Budget, fit_budget
from fasterai.prune.experts import expert_scores, remove_experts, without_experts
from fasterai.prune.features.induce import induce
from fasterai.prune.features.induced import Induced as Induced
from fasterai.prune.features.pixels import PixelMask
from fasterai.prune.features.selector import InputSelector
from fasterai.prune.gradual import GradualPruner
from fasterai.prune.pruner import Pruner
from fasterai.prune.removal import Removal as Removal
from fasterai.prune.removal import remove
from fasterai.prune.scratch.found import FromScratch as FromScratch
from fasterai.prune.scratch.search import search_from_scratch
from fasterai.prune.small_files import load_small, save_small
from fasterai.prune.surgery.operate import apply_plan_
from fasterai.prune.surgery.plan import Plan as Plan
from fasterai.sparse.sparsifier import Sparsifier

if importlib.util.find_spec("fastai") is not None:
    from fasterai.callbacks.fastai import HoldCallback, ParticipantCallback, PruneCallback, SparsifyCallback

else:
    from fasterai.callbacks.missing import (  # type: ignore[assignment]
        HoldCallback,
        ParticipantCallback,
        PruneCallback,
        SparsifyCallback,
    )

__all__ = [
    "Budget",
    "Features",
    "GradualPruner",
    "HoldCallback",
    "InputSelector",
    "ParticipantCallback",
    "PixelMask",
    "PruneCallback",
    "Pruner",
    "Sparsifier",
    "SparsifyCallback",
    "apply_plan_",
    "attach",
    "channel_graph",
    "cut_inputs",
    "expert_graph",
    "expert_scores",
    "fit_budget",
    "induce",
    "input_cuts",
    "load_small",
    "remove",
    "remove_experts",
    "save_small",
    "search_from_scratch",
    "without_experts",
]
__all__ += _core.__all__
