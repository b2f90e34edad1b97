"""Block-sparse attention spelled out: dense scores in float32, a mask, a softmax. Runs on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from ..indices import BlockIndices

# Scores held at a time, in elements: long inputs are worked through in chunks of whole query blocks.
MAX_SCORES = 1 << 25


def block_sparse_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, blocks: BlockIndices, scale: float
) -> tuple[Tensor, Tensor]:
    """Masked softmax attention in float32; arguments as checked by the interface.

    Returns:
        ``out [B, Hq, Tq, D]`` in the dtype of q and the natural-log ``lse [B, Hq, Tq]`` in float32.
    """
    batch, num_heads, query_length, head_dim = q.shape
    num_kv_heads, key_length = k.shape[1:3]
    block_size, offset = blocks.block_size, key_length - query_length
    block_mask = blocks.to_mask()
    out = torch.empty_like(q)
    lse = torch.empty(batch, num_heads, query_length, dtype=torch.float32, device=q.device)
    row_scores = max(1, batch * num_heads * block_size * key_length)
    rows_per_chunk = max(1, MAX_SCORES // row_scores)
    for row in range(0, blocks.num_rows, rows_per_chunk):
        end_row = min(row + rows_per_chunk, blocks.num_rows)
        # Absolute positions of the queries of these rows; keys after the last of them are never visible.
        start = max(offset, (blocks.first_row + row) * block_size)
        end = min(key_length, (blocks.first_row + end_row) * block_size)
        positions = torch.arange(start, end, device=q.device)
        keys = torch.arange(end, device=q.device)
        visible = block_mask[:, :, positions // block_size - blocks.first_row][..., keys // block_size]
        visible = visible & (keys <= positions[:, None])
        visible = visible.repeat_interleave(num_heads // visible.shape[1], 1)

        group = num_heads // num_kv_heads
        q_chunk = q[:, :, start - offset : end - offset].float()
        q_chunk = q_chunk.reshape(batch, num_kv_heads, group * (end - start), head_dim)
        scores = (q_chunk @ k[:, :, :end].float().transpose(2, 3)) * scale
        scores = scores.view(batch, num_heads, end - start, end).masked_fill(~visible, float("-inf"))
        chunk_lse = scores.logsumexp(-1)
        # A query without keys has lse -inf; exp(-inf - 0) makes its probabilities 0 rather than NaN.
        probabilities = (scores - chunk_lse.masked_fill(chunk_lse == float("-inf"), 0.0)[..., None]).exp()
        chunk_out = probabilities.view(batch, num_kv_heads, group * (end - start), end) @ v[:, :, :end].float()
        out[:, :, start - offset : end - offset] = chunk_out.view(batch, num_heads, end - start, head_dim)
        lse[:, :, start - offset : end - offset] = chunk_lse
    return out, lse
