"""What an attached model reads and what that is worth: densities, block recall, thresholds for a density."""

from __future__ import annotations

from .calibrate import calibrate
from .recall import block_recall, recall_sums
from .stats import Statistics, record

__all__ = ["Statistics", "block_recall", "calibrate", "recall_sums", "record"]
