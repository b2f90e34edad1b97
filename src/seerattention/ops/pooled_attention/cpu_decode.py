"""1-D pooled attention on the CPU: a few query tokens and one KV head at a time, against the keys that they see."""

from __future__ import annotations

import torch
from torch import Tensor

from ..indices import num_blocks
from .arguments import Wanted
from .cpu import make_buffers, pool, whole_blocks
from .reference_decode import finish

# Tokens at a time. They share a product with the keys that the last of them sees: ascending rows waste little of it.
TOKENS = 32


def pooled_attention_decode(q: Tensor, k: Tensor, rows: Tensor, wanted: Wanted) -> Tensor:
    (batch, kv_heads, key_length, _), lse = k.shape, wanted.lse
    group, offset = q.shape[1] // kv_heads, key_length - q.shape[2]
    content = [key_length] * batch if wanted.lengths is None else wanted.lengths.tolist()
    keys = whole_blocks(k, wanted.block_size)
    key_positions = torch.arange(keys.shape[2])
    num_keys = num_blocks(key_length, wanted.block_size)
    out = torch.zeros(batch, kv_heads, rows.numel(), num_keys, dtype=torch.float32)
    buffers = make_buffers(group * min(TOKENS, rows.numel()) * keys.shape[2], wanted)

    for chunk in torch.arange(rows.numel()).split(TOKENS):
        for b in range(batch):
            slots = chunk[rows[chunk] < content[b]]
            if not slots.numel():
                continue  # nothing but padding
            positions = rows[slots]
            here = positions - offset
            blocks = num_blocks(int(positions.max()) + 1, wanted.block_size)
            visible = blocks * wanted.block_size
            hidden = key_positions[int(positions.min()) + 1 : visible] > positions[:, None]
            queries = (q[b, :, here].float() * wanted.scale).unflatten(0, (kv_heads, group))
            for head in range(kv_heads):
                lse_here = None if lse is None else lse[b, head * group : (head + 1) * group, here]
                # Over the heads first: this reduction runs over contiguous rows of keys.
                pooled = pool(queries[head], keys[b, head, :visible], hidden, lse_here, buffers, wanted, over=0)
                out[b, head, slots, :blocks] = pooled
    return finish(out, group, wanted)
