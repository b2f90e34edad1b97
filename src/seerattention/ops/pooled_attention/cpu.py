"""Pooled attention on the CPU: one query block and KV head at a time, against the keys that it can see."""

from __future__ import annotations

import torch
from torch import Tensor

from .arguments import Content, Wanted, content_rows
from .reference import divide_by_sum


def pooled_attention(q: Tensor, k: Tensor, rows: Tensor, wanted: Wanted) -> Tensor:
    block_size, span, lse = wanted.block_size, wanted.span, wanted.lse
    heads, kv_heads = q.shape[1], k.shape[1]
    group, columns = heads // kv_heads, span.num_key_blocks(block_size)
    out = torch.zeros(span.batch, heads, rows.numel(), columns, dtype=torch.float32)
    buffers = make_buffers(group * block_size * columns * block_size, wanted)
    above_diagonal = torch.ones(block_size, block_size, dtype=torch.bool).triu_(1)

    for b, content in enumerate(content_rows(span)):
        keys = whole_blocks(k, content, block_size)
        for slot, row in enumerate(rows.tolist()):
            block = content.start // block_size + row
            start, end = max(block * block_size, content.start), min((block + 1) * block_size, content.end)
            if start >= end:
                continue  # a wholly padded block
            here = slice(start - content.start + content.query_slot, end - content.start + content.query_slot)
            queries = (q[content.memory, :, here].float() * wanted.scale).unflatten(0, (kv_heads, group))
            hidden = above_diagonal[start - block * block_size : end - block * block_size]
            for head in range(kv_heads):
                heads_here = slice(head * group, (head + 1) * group)
                lse_here = None if lse is None else lse[content.memory, heads_here, here]
                visible = keys[head, : (block + 1) * block_size]
                # Over the queries first: this reduction runs over contiguous rows of keys.
                tiles = pool(queries[head], visible, hidden, lse_here, buffers, wanted, over=1)
                if wanted.normalize and wanted.reduce == "sum":
                    tiles /= end - start
                out[b, heads_here, slot, : block + 1] = tiles
    return divide_by_sum(out) if wanted.divides_by_sum else out


def whole_blocks(k: Tensor, content: Content, block_size: int) -> Tensor:
    """The keys of a row in float32 ``[Hkv, n, D]``, padded to whole blocks; the causal mask hides the padding as it
    hides later keys."""
    own = k[content.memory, :, content.key_slot : content.key_slot + content.end].float()
    return torch.nn.functional.pad(own, (0, 0, 0, -content.end % block_size))


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
        over: what else is reduced, and first where order makes no difference: 0, the heads, or 1, the queries.

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
        if wanted.reduce != "max":
            scores.exp_()
    probabilities = probabilities.view(group, tokens, visible)
    blocks = (visible // wanted.block_size, wanted.block_size)
    if wanted.reduce == "sum":
        return probabilities.sum(over).unflatten(-1, blocks).sum(-1)
    if wanted.reduce == "row_sum":
        return probabilities.unflatten(-1, blocks).sum(-1).amax(over)
    pooled = probabilities.amax(over).unflatten(-1, blocks).amax(-1)
    # With lse these are logarithms so far: the exponential of the maximum is the maximum.
    return pooled if lse is None else pooled.exp_()
