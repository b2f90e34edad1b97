"""Pooled attention on the CPU: one query block and KV head at a time, against the keys that it can see."""

from __future__ import annotations

import torch
from torch import Tensor

from ..indices import num_blocks
from .arguments import Wanted
from .reference import finish


def pooled_attention(q: Tensor, k: Tensor, rows: Tensor, wanted: Wanted) -> Tensor:
    block_size, scale, lengths, reduce, _, lse = wanted
    batch, heads, query_length, head_dim = q.shape
    kv_heads, key_length = k.shape[1:3]
    group = heads // kv_heads
    num_keys = num_blocks(key_length, block_size)
    offset = key_length - query_length
    content = [key_length] * batch if lengths is None else lengths.tolist()
    # Keys are padded to whole blocks; the causal mask hides the padding as it hides later keys.
    keys = torch.nn.functional.pad(k.float(), (0, 0, 0, num_keys * block_size - key_length))
    out = torch.zeros(batch, heads, rows.numel(), num_keys, dtype=torch.float32)
    # Fresh memory for every step would cost more in page faults than the multiplication itself.
    buffers = torch.empty(2 if lse is None else 1, group * block_size * num_keys * block_size, dtype=torch.float32)
    above_diagonal = torch.ones(block_size, block_size, dtype=torch.bool).triu_(1)

    for slot, row in enumerate(rows.tolist()):
        visible = (row + 1) * block_size
        for b in range(batch):
            start, end = max(row * block_size, offset), min(visible, content[b])
            if start >= end:
                continue  # a wholly padded block
            queries = q[b, :, start - offset : end - offset].float() * scale
            queries = queries.unflatten(0, (kv_heads, group))
            masked = above_diagonal[start - row * block_size : end - row * block_size]
            for head in range(kv_heads):
                flat = queries[head].reshape(-1, head_dim)
                scores, probabilities = (buffers[i][: flat.shape[0] * visible].view(-1, visible) for i in (0, -1))
                torch.mm(flat, keys[b, head, :visible].T, out=scores)
                diagonal = scores.view(group, end - start, visible)[..., -block_size:]
                diagonal.masked_fill_(masked, float("-inf"))
                heads_here = slice(head * group, (head + 1) * group)
                if lse is None:
                    torch.softmax(scores, -1, out=probabilities)
                else:
                    scores.sub_(lse[b, heads_here, start - offset : end - offset].reshape(-1, 1))
                    if reduce == "sum":
                        scores.exp_()
                probabilities = probabilities.view(group, end - start, visible)
                # Queries first: this reduction runs over contiguous rows of keys.
                if reduce == "max":
                    tiles = probabilities.amax(1).unflatten(-1, (row + 1, block_size)).amax(-1)
                    if lse is not None:  # so far logarithms: the exponential of the maximum is the maximum
                        tiles.exp_()
                else:
                    tiles = probabilities.sum(1).unflatten(-1, (row + 1, block_size)).sum(-1)
                out[b, heads_here, slot, : row + 1] = tiles
    return finish(out, rows, key_length, query_length, wanted)
