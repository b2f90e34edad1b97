"""Gate scores: encoding of pooled queries and keys, and their products, reduced to one score a tile."""

from .interface import encode_blocks, gate_scores

__all__ = ["encode_blocks", "gate_scores"]
