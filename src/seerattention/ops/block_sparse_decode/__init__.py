"""Block-sparse attention of single query tokens: decoding."""

from .interface import IMPLEMENTATIONS, block_sparse_decode

__all__ = ["IMPLEMENTATIONS", "block_sparse_decode"]
