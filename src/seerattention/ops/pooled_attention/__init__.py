"""Pooled attention: the attention map of a layer, reduced to one number per tile; the target of distillation."""

from .interface import pooled_attention

__all__ = ["pooled_attention"]
