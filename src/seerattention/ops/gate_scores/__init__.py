"""Gate scores: pooled queries and keys -> block logits."""

from .interface import gate_scores

__all__ = ["gate_scores"]
