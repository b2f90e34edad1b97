"""Prefill attention that computes only the key blocks on each query block's list (the paper's section 3.3)."""

from .interface import IMPLEMENTATIONS, block_sparse_attention

__all__ = ["IMPLEMENTATIONS", "block_sparse_attention"]
