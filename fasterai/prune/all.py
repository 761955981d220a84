"""For notebooks: `from fasterai.prune.all import *`. Re-exports only."""

from fasterai.core import all as _core
from fasterai.core.all import *
from fasterai.prune.graph import ChannelGraph, Group, channel_graph
from fasterai.prune.plan import Plan
from fasterai.prune.pruner import Pruner
from fasterai.prune.removal import Removal, remove
from fasterai.prune.small import load_small, save_small

__all__ = [
    *_core.__all__,
    "ChannelGraph",
    "Group",
    "Plan",
    "Pruner",
    "Removal",
    "channel_graph",
    "load_small",
    "remove",
    "save_small",
]
