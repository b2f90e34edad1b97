"""Inputs of pooled attention."""

from __future__ import annotations

import torch


def make(query_length, key_length, heads, kv_heads, head_dim, batch=2, dtype=torch.float32):
    """q and k, laid out as models do, ``[B, T, H, D]``, so that strides are put to the test; logits wide enough for a
    peaked map."""
    generator = torch.Generator().manual_seed(query_length * 1000 + key_length + head_dim)
    q = torch.randn(batch, query_length, heads, head_dim, generator=generator) * 2
    k = torch.randn(batch, key_length, kv_heads, head_dim, generator=generator)
    return q.to(dtype).transpose(1, 2), k.to(dtype).transpose(1, 2)
