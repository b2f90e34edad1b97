"""1-D pooled attention in plain torch, float32, some query tokens after the other: the definition, not the fast way."""

from __future__ import annotations

import torch
from torch import Tensor

from .arguments import Wanted, content_rows
from .reference import attention_map, divide_by_sum, keys_of, reduce_tiles

# Tokens at a time: bounds the part of the map that is in memory.
TOKENS = 64


def pooled_attention_decode(q: Tensor, k: Tensor, rows: Tensor, wanted: Wanted) -> Tensor:
    span, kv_heads = wanted.span, k.shape[1]
    group = q.shape[1] // kv_heads
    columns = span.num_key_blocks(wanted.block_size)
    out = q.new_zeros(span.batch, kv_heads, rows.numel(), columns, dtype=torch.float32)
    for b, content in enumerate(content_rows(span)):
        keys = keys_of(k, q.shape[1], content)
        for slots in torch.arange(rows.numel(), device=rows.device).split(TOKENS):
            slots = slots[rows[slots] < content.length]
            if not len(slots):
                continue  # nothing but padding
            blocks = attention_map(q, keys, rows[slots] + content.start, content, wanted)
            blocks = blocks.unflatten(0, (kv_heads, group))  # [Hkv, group, tokens, n, block_size]
            blocks = reduce_tiles(blocks, wanted, over=1)
            out[b, :, slots, : blocks.shape[2]] = blocks
    return finish(out, group, wanted)


def finish(out: Tensor, group: int, wanted: Wanted) -> Tensor:
    """Divide ``out [B, Hkv, R, Nk]`` in place: rows of maxima by their sum, of masses by the heads of a group."""
    if not wanted.normalize:
        return out
    return divide_by_sum(out) if wanted.divides_by_sum else out.div_(group)
