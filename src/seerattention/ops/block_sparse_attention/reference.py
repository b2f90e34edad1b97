"""Block-sparse attention spelled out: dense scores in float32, a mask, a softmax. Runs on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from ..indices import BlockIndices, span_of
from ..span import START

# Scores held at a time, in elements: long inputs are worked through in chunks of whole query blocks.
MAX_SCORES = 1 << 25


def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, blocks: BlockIndices, scale: float, return_lse: bool
) -> tuple[Tensor, Tensor]:
    """Masked softmax attention in float32; arguments as checked by the interface.

    Returns:
        ``out`` like q and the natural-log ``lse``, float32, q's shape without the last dimension.
    """
    span, block_size = span_of(blocks, q, k), blocks.block_size
    block_mask, rows = blocks.to_mask(), span.row_blocks(block_size, q.device)
    positions = span.column(START, q.device)[:, None] + torch.arange(span.queries, device=q.device)
    is_query = positions < span.ends(q.device)[:, None]
    keys = torch.arange(span.keys, device=q.device)
    queries, k, v = span.gather_queries(q), span.gather_keys(k), span.gather_keys(v)
    if not span.plain:  # what lies behind a row's last key may be NaN, and 0 * NaN is no 0
        v = v.masked_fill((keys >= span.ends()[:, None])[:, None, :, None], 0.0)
    batch, num_heads, num_queries, head_dim = queries.shape
    num_kv_heads = k.shape[1]
    group = num_heads // num_kv_heads

    out = queries.new_empty(queries.shape)
    lse = queries.new_empty(queries.shape[:3], dtype=torch.float32)
    # Whole query blocks, where rows are alike.
    chunk = max(1, MAX_SCORES // max(1, batch * num_heads * block_size * span.keys)) * block_size
    first = -((span.keys - num_queries) % block_size) if span.plain else 0
    for start in range(first, num_queries, chunk):
        part = slice(max(0, start), min(start + chunk, num_queries))
        size = part.stop - part.start
        # Keys after the last of these queries are never visible.
        end = span.keys - num_queries + part.stop if span.plain else span.keys
        row = (positions[:, part] // block_size - rows[:, :1]).clamp(0, block_mask.shape[2] - 1)
        listed = block_mask.gather(2, row[:, None, :, None].expand(-1, block_mask.shape[1], -1, block_mask.shape[3]))
        causal = (keys[:end] <= positions[:, part, None]) & is_query[:, part, None]
        visible = (listed[..., keys[:end] // block_size] & causal[:, None]).repeat_interleave(
            num_heads // listed.shape[1], 1
        )

        q_chunk = queries[:, :, part].float().reshape(batch, num_kv_heads, group * size, head_dim)
        scores = (q_chunk @ k[:, :, :end].float().transpose(2, 3)) * scale
        scores = scores.view(batch, num_heads, size, end).masked_fill(~visible, float("-inf"))
        chunk_lse = scores.logsumexp(-1)
        # A query without keys has lse -inf; exp(-inf - 0) makes its probabilities 0 rather than NaN.
        probabilities = (scores - chunk_lse.masked_fill(chunk_lse == float("-inf"), 0.0)[..., None]).exp()
        chunk_out = probabilities.view(batch, num_kv_heads, group * size, end) @ v[:, :, :end].float()
        out[:, :, part] = chunk_out.view(batch, num_heads, size, head_dim)
        lse[:, :, part] = chunk_lse
    empty_lse = torch.full(q.shape[:3], float("-inf"), dtype=torch.float32, device=q.device)
    return span.scatter_queries(out, torch.zeros_like(q)), span.scatter_queries(lse, empty_lse)
