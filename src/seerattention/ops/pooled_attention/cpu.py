"""Pooled attention on the CPU: one query block and KV head at a time, against the keys that it can see."""

from __future__ import annotations

import torch
from torch import Tensor

from ..indices import num_blocks
from .arguments import Wanted
from .reference import finish


def pooled_attention(q: Tensor, k: Tensor, rows: Tensor, wanted: Wanted) -> Tensor:
    block_size, lse = wanted.block_size, wanted.lse
    batch, heads, query_length, _ = q.shape
    kv_heads, key_length = k.shape[1:3]
    group, offset = heads // kv_heads, key_length - query_length
    content = [key_length] * batch if wanted.lengths is None else wanted.lengths.tolist()
    keys = whole_blocks(k, block_size)
    out = torch.zeros(batch, heads, rows.numel(), num_blocks(key_length, block_size), dtype=torch.float32)
    buffers = make_buffers(group * block_size * keys.shape[2], wanted)
    above_diagonal = torch.ones(block_size, block_size, dtype=torch.bool).triu_(1)

    for slot, row in enumerate(rows.tolist()):
        visible = (row + 1) * block_size
        for b in range(batch):
            start, end = max(row * block_size, offset), min(visible, content[b])
            if start >= end:
                continue  # a wholly padded block
            here = slice(start - offset, end - offset)
            queries = (q[b, :, here].float() * wanted.scale).unflatten(0, (kv_heads, group))
            hidden = above_diagonal[start - row * block_size : end - row * block_size]
            for head in range(kv_heads):
                heads_here = slice(head * group, (head + 1) * group)
                lse_here = None if lse is None else lse[b, heads_here, here]
                # Over the queries first: this reduction runs over contiguous rows of keys.
                tiles = pool(queries[head], keys[b, head, :visible], hidden, lse_here, buffers, wanted, over=1)
                out[b, heads_here, slot, : row + 1] = tiles
    return finish(out, rows, key_length, query_length, wanted)


def whole_blocks(k: Tensor, block_size: int) -> Tensor:
    """Keys in float32, padded to whole blocks; the causal mask hides the padding as it hides later keys."""
    return torch.nn.functional.pad(k.float(), (0, 0, 0, -k.shape[2] % block_size))


def make_buffers(scores: int, wanted: Wanted) -> Tensor:
    """Memory for so many scores, and their probabilities where these go elsewhere.

    Fresh memory for every step would cost more in page faults than the multiplication itself.
    """
    return torch.empty(2 if wanted.lse is None else 1, scores, dtype=torch.float32)


def pool(
    queries: Tensor, keys: Tensor, hidden: Tensor, lse: Tensor | None, buffers: Tensor, wanted: Wanted, *, over: int
) -> Tensor:
    """The map of some queries of one KV head's group, reduced to one value for each block of keys.

    Args:
        queries: float32 ``[group, M, D]``, scaled.
        keys: float32 ``[N, D]``, whole blocks.
        hidden: bool ``[M, W]``, which of the last W keys each query does not see.
        lse: float32 ``[group, M]``, of these queries; None: computed here.
        buffers: of :func:`make_buffers`; overwritten.
        over: what else is reduced, and first: 0, the heads, or 1, the queries.

    Returns:
        float32 ``[M or group, N / block_size]``.
    """
    (group, tokens, head_dim), visible = queries.shape, keys.shape[0]
    scores, probabilities = (buffers[i][: group * tokens * visible].view(-1, visible) for i in (0, -1))
    torch.mm(queries.reshape(-1, head_dim), keys.T, out=scores)
    scores.view(group, tokens, visible)[..., visible - hidden.shape[1] :].masked_fill_(hidden, float("-inf"))
    if lse is None:
        torch.softmax(scores, -1, out=probabilities)
    else:
        scores.sub_(lse.reshape(-1, 1))
        if wanted.reduce == "sum":
            scores.exp_()
    probabilities = probabilities.view(group, tokens, visible)
    blocks = (visible // wanted.block_size, wanted.block_size)
    if wanted.reduce == "sum":
        return probabilities.sum(over).unflatten(-1, blocks).sum(-1)
    pooled = probabilities.amax(over).unflatten(-1, blocks).amax(-1)
    # With lse these are logarithms so far: the exponential of the maximum is the maximum.
    return pooled if lse is None else pooled.exp_()
