"""What an attached model reads and what that is worth: densities, block recall, thresholds for a density, memory."""

from __future__ import annotations

from .calibrate import calibrate
from .kept import RECALLS, Recall
from .memory import CacheMemory, cache_memory
from .recall import block_recall, compare_recall, measure_recall, recall_sums
from .stats import Statistics, record

__all__ = [
    "RECALLS",
    "CacheMemory",
    "Recall",
    "Statistics",
    "block_recall",
    "cache_memory",
    "calibrate",
    "compare_recall",
    "measure_recall",
    "recall_sums",
    "record",
]
