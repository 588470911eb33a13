"""Pruning: robust training and its baselines, compaction, packing, and which storage pays."""

from lion_fast.pruning.baselines import iterative_magnitude, prune_once
from lion_fast.pruning.blocksparse import BlockSparseLayer
from lion_fast.pruning.compaction import compact, compact_model, find_units
from lion_fast.pruning.counts import count_parameters
from lion_fast.pruning.robust import RobustPruner, kept_shares
from lion_fast.pruning.storage import Storage, choose_storage, describe_storage, measured_crossovers
from lion_fast.pruning.two_of_four import TwoOfFourLayer

__all__ = [
    "BlockSparseLayer",
    "Storage",
    "RobustPruner",
    "TwoOfFourLayer",
    "choose_storage",
    "compact",
    "compact_model",
    "count_parameters",
    "describe_storage",
    "find_units",
    "iterative_magnitude",
    "kept_shares",
    "measured_crossovers",
    "prune_once",
]
