"""Block pooling: queries and keys, pooled per block of tokens."""

from .interface import block_pooling

__all__ = ["block_pooling"]
