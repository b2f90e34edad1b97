"""1-D pooled attention in plain torch, float32, some query tokens after the other: the definition, not the fast way."""

from __future__ import annotations

import torch
from torch import Tensor

from ..indices import num_blocks
from .arguments import Wanted
from .reference import attention_map, divide_by_sum

# Tokens at a time: bounds the part of the map that is in memory.
TOKENS = 64


def pooled_attention_decode(q: Tensor, k: Tensor, rows: Tensor, wanted: Wanted) -> Tensor:
    (batch, kv_heads, key_length, _), query_length = k.shape, q.shape[2]
    group = q.shape[1] // kv_heads
    k = k.float().repeat_interleave(group, dim=1)
    num_keys = num_blocks(key_length, wanted.block_size)
    out = q.new_zeros(batch, kv_heads, rows.numel(), num_keys, dtype=torch.float32)
    for start in range(0, rows.numel(), TOKENS):
        positions = rows[start : start + TOKENS]
        here = positions - (key_length - query_length)
        lse = None if wanted.lse is None else wanted.lse[:, :, here]
        # [B, Hkv, group, tokens, Nk, block_size]
        blocks = attention_map(q[:, :, here], k, positions, wanted, lse).unflatten(1, (kv_heads, group))
        out[:, :, start : start + TOKENS] = blocks.amax((2, 5)) if wanted.reduce == "max" else blocks.sum((2, 5))
    return finish(out, group, wanted)


def finish(out: Tensor, group: int, wanted: Wanted) -> Tensor:
    """Divide ``out [B, Hkv, R, Nk]`` in place: rows of maxima by their sum, of masses by the heads of a group."""
    if not wanted.normalize:
        return out
    return divide_by_sum(out) if wanted.reduce == "max" else out.div_(group)
