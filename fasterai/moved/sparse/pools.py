"""The old home of `fasterai.units`: re-exports only."""

from fasterai.units.channel_pools import ChannelPool, channel_pools, warn_of_rounding
from fasterai.units.pool import Pool, WeightScores, by_pool
from fasterai.units.target_pools import TargetPool

__all__ = ["ChannelPool", "Pool", "TargetPool", "WeightScores", "by_pool", "channel_pools", "warn_of_rounding"]
