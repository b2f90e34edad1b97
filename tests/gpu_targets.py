"""Inputs of the GPU tests of both pooled attentions."""

from __future__ import annotations

import torch


def make(query_length, key_length, heads, kv_heads, head_dim, dtype, batch=2):
    generator = torch.Generator("cuda").manual_seed(query_length + 7 * heads)
    q = torch.randn(batch, query_length, heads, head_dim, device="cuda", generator=generator) * 2
    k = torch.randn(batch, key_length, kv_heads, head_dim, device="cuda", generator=generator)
    return q.to(dtype).transpose(1, 2), k.to(dtype).transpose(1, 2)


def lse_of(q, k):
    """Log-sum-exp of the scaled causal logits, from float32 products."""
    query_length, key_length = q.shape[2], k.shape[2]
    scores = q.float() @ k.float().repeat_interleave(q.shape[1] // k.shape[1], 1).mT * q.shape[3] ** -0.5
    future = torch.ones(query_length, key_length, dtype=torch.bool, device="cuda").triu(1 + key_length - query_length)
    return scores.masked_fill_(future, float("-inf")).logsumexp(-1)


def spoilt_padding(op):
    """Inputs whose padding is NaN, their lengths, and the target of an op before it was."""
    q, k = make(500, 830, 8, 2, 128, torch.bfloat16)
    lse, lengths = lse_of(q, k), torch.tensor([830, 401], device="cuda")
    expected = op(q, k, lengths=lengths, implementation="reference")
    for x, end in ((q, 71), (k, 401), (lse, 71)):  # queries start at position 330
        x[1, :, end:] = float("nan")
    return q, k, lse, lengths, expected
