"""Block selection: block scores -> packed block indices."""

from .interface import dense_indices, select_threshold, select_topk, select_topp

__all__ = ["dense_indices", "select_threshold", "select_topk", "select_topp"]
