"""1-D pooled attention in plain torch, float32, some query tokens after the other: the definition, not the fast way."""

from __future__ import annotations

import torch
from torch import Tensor

from ..indices import num_blocks
from .arguments import Wanted
from .reference import divide_by_sum

# Tokens at a time: bounds the part of the map that is in memory.
TOKENS = 64


def pooled_attention_decode(q: Tensor, k: Tensor, rows: Tensor, wanted: Wanted) -> Tensor:
    block_size, scale, lengths, reduce, _, lse = wanted
    batch, heads, query_length, _ = q.shape
    kv_heads, key_length = k.shape[1:3]
    group, num_keys = heads // kv_heads, num_blocks(key_length, block_size)
    k = k.float().repeat_interleave(group, dim=1)
    key_positions = torch.arange(key_length, device=q.device)
    out = torch.zeros(batch, kv_heads, rows.numel(), num_keys, dtype=torch.float32, device=q.device)
    for start in range(0, rows.numel(), TOKENS):
        positions = rows[start : start + TOKENS]
        queries = positions - (key_length - query_length)
        scores = q[:, :, queries].float() @ k.transpose(-1, -2) * scale
        scores = scores.masked_fill(key_positions > positions[:, None], float("-inf"))
        probabilities = scores.softmax(-1) if lse is None else (scores - lse[:, :, queries, None]).exp()
        if lengths is not None:
            padded_queries = (positions >= lengths[:, None])[:, None, :, None]
            probabilities = probabilities.masked_fill(padded_queries, 0.0)
        padded = torch.nn.functional.pad(probabilities, (0, num_keys * block_size - key_length))
        # [B, Hkv, group, tokens, Nk, block_size]
        blocks = padded.unflatten(-1, (num_keys, block_size)).unflatten(1, (kv_heads, group))
        out[:, :, start : start + TOKENS] = blocks.amax((2, 5)) if reduce == "max" else blocks.sum((2, 5))
    return finish(out, group, wanted)


def finish(out: Tensor, group: int, wanted: Wanted) -> Tensor:
    """Divide ``out [B, Hkv, R, Nk]`` in place: rows of maxima by their sum, of masses by the heads of a group."""
    if not wanted.normalize:
        return out
    return divide_by_sum(out) if wanted.reduce == "max" else out.div_(group)
