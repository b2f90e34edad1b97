"""Block selection: block scores -> packed block indices."""

from .interface import causal_softmax, dense_indices, select_threshold, select_topk, select_topp

__all__ = ["causal_softmax", "dense_indices", "select_threshold", "select_topk", "select_topp"]
