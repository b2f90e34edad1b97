"""Pooled attention: the attention map of a layer with one number per block of keys; the targets of distillation."""

from .interface import pooled_attention
from .interface_decode import pooled_attention_decode

__all__ = ["pooled_attention", "pooled_attention_decode"]
