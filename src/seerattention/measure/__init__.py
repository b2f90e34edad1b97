"""What an attached model reads and what that is worth: densities, block recall, thresholds for a density."""

from __future__ import annotations

from .calibrate import calibrate
from .kept import RECALLS, Recall
from .recall import block_recall, compare_recall, measure_recall, recall_sums
from .stats import Statistics, record

__all__ = [
    "RECALLS",
    "Recall",
    "Statistics",
    "block_recall",
    "calibrate",
    "compare_recall",
    "measure_recall",
    "recall_sums",
    "record",
]
