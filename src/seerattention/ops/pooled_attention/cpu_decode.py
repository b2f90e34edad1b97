"""1-D pooled attention on the CPU: a few query tokens and one KV head at a time, against the keys that they see."""

from __future__ import annotations

import torch
from torch import Tensor

from ..span import num_blocks
from .arguments import Wanted, content_rows
from .cpu import make_buffers, pool, whole_blocks
from .reference_decode import finish

# Tokens at a time. They share a product with the keys that the last of them sees: ascending rows waste little of it.
TOKENS = 32


def pooled_attention_decode(q: Tensor, k: Tensor, rows: Tensor, wanted: Wanted) -> Tensor:
    span, lse, block_size = wanted.span, wanted.lse, wanted.block_size
    kv_heads, columns = k.shape[1], span.num_key_blocks(block_size)
    group = q.shape[1] // kv_heads
    out = torch.zeros(span.batch, kv_heads, rows.numel(), columns, dtype=torch.float32)
    buffers = make_buffers(group * min(TOKENS, rows.numel()) * columns * block_size, wanted)

    for b, content in enumerate(content_rows(span)):
        keys = whole_blocks(k, content, block_size)
        key_positions = torch.arange(keys.shape[1])
        for slots in torch.arange(rows.numel()).split(TOKENS):
            slots = slots[rows[slots] < content.length]
            if not slots.numel():
                continue  # nothing but padding
            positions = rows[slots] + content.start
            here = rows[slots] + content.query_slot
            blocks = num_blocks(int(positions.max()) + 1, block_size)
            visible = blocks * block_size
            hidden = key_positions[int(positions.min()) + 1 : visible] > positions[:, None]
            queries = (q[content.memory, :, here].float() * wanted.scale).unflatten(0, (kv_heads, group))
            for head in range(kv_heads):
                heads_here = slice(head * group, (head + 1) * group)
                lse_here = None if lse is None else lse[content.memory, heads_here, here]
                # Over the heads first: this reduction runs over contiguous rows of keys.
                pooled = pool(queries[head], keys[head, :visible], hidden, lse_here, buffers, wanted, over=0)
                out[b, head, slots, :blocks] = pooled
    return finish(out, group, wanted)
