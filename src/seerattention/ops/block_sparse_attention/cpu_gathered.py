"""Block-sparse attention on the CPU in plain torch: gather the listed blocks of each row, then batched matmul.

Needs no C++ compiler, has no warm-up and returns LSE. It gathers in small buckets whose keys, values and scores stay in
the L2 cache: larger buckets measured up to 1.5 times slower.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..indices import BlockIndices

# Elements of gathered keys a bucket (1 MiB of float32): the best of 2^18, 2^20, 2^21 and 2^23 on a 2-core Zen 4.
BUCKET_ELEMENTS = 1 << 18


def block_sparse_attention_cpu_gathered(
    q: Tensor, k: Tensor, v: Tensor, blocks: BlockIndices, scale: float
) -> tuple[Tensor, Tensor]:
    """Arguments as checked by the interface; computes in float32 whatever the dtype (faster than bf16 without AMX).

    Returns:
        ``out [B, Hq, Tq, D]`` in the dtype of q and the natural-log ``lse [B, Hq, Tq]`` in float32.
    """
    batch, num_heads, query_length, head_dim = q.shape
    num_kv_heads, key_length = k.shape[1:3]
    block_size, num_rows, num_key_blocks = blocks.block_size, blocks.num_rows, blocks.num_key_blocks
    list_heads = blocks.counts.shape[1]
    shared = num_heads // list_heads  # query heads that read one list, stacked into one matmul

    # Pad to whole blocks. Padded keys lie after every real query, in its diagonal block at most: causality hides them.
    front = key_length - query_length - blocks.first_row * block_size
    back = num_key_blocks * block_size - key_length
    q_blocks = F.pad(q.float(), (0, 0, front, back)) * scale
    q_blocks = q_blocks.view(batch, list_heads, shared, num_rows, block_size, head_dim)
    q_blocks = q_blocks.transpose(2, 3).reshape(-1, shared * block_size, head_dim)
    k_blocks = F.pad(k.float(), (0, 0, 0, back)).reshape(-1, block_size, head_dim)
    v_blocks = F.pad(v.float(), (0, 0, 0, back)).reshape(-1, block_size, head_dim)

    indices = blocks.indices.flatten(0, 2).long()
    counts = blocks.counts.reshape(-1).long()
    last = indices.gather(1, (counts - 1).clamp(min=0)[:, None])[:, 0] if indices.shape[1] else counts
    query_block = torch.arange(blocks.first_row, num_key_blocks, device=q.device).repeat(batch * list_heads)
    off_diagonal = last != query_block
    # Where the KV head of each list begins in k_blocks.
    kv_head = torch.arange(list_heads, device=q.device) // (list_heads // num_kv_heads)
    base = torch.arange(batch, device=q.device)[:, None] * num_kv_heads + kv_head
    base = (base * num_key_blocks).reshape(-1).repeat_interleave(num_rows)

    out = torch.empty_like(q_blocks)
    lse = torch.empty(out.shape[:2], dtype=torch.float32, device=q.device)
    future = torch.ones(block_size, block_size, dtype=torch.bool, device=q.device).triu(1).repeat(shared, 1)
    order = counts.argsort(stable=True)
    sorted_counts = counts[order]
    empty = int((sorted_counts == 0).sum())
    out[order[:empty]] = 0.0
    lse[order[:empty]] = float("-inf")
    for start, end in _buckets(sorted_counts.tolist(), empty, block_size * head_dim):
        rows, width = order[start:end], int(sorted_counts[end - 1])
        # Lists are packed to the right, so that the diagonal block, always the last of a list, is the last column.
        slot = counts[rows, None] + torch.arange(-width, 0, device=q.device)
        gathered = (base[rows, None] + indices[rows[:, None], slot.clamp(min=0)]).reshape(-1)
        keys = k_blocks.index_select(0, gathered).view(len(rows), -1, head_dim)
        values = v_blocks.index_select(0, gathered).view(len(rows), -1, head_dim)
        scores = torch.bmm(q_blocks.index_select(0, rows), keys.transpose(1, 2))
        by_block = scores.view(len(rows), shared * block_size, width, block_size)
        by_block[:, :, -1].masked_fill_(future & ~off_diagonal[rows, None, None], float("-inf"))
        if sorted_counts[start] != width:
            by_block.masked_fill_((slot < 0)[:, None, :, None], float("-inf"))
        lse[rows] = scores.logsumexp(-1)
        out[rows] = torch.bmm(scores.softmax(-1), values)

    out = out.view(batch, list_heads, num_rows, shared, block_size, head_dim).transpose(2, 3)
    out = out.reshape(batch, num_heads, -1, head_dim)[:, :, front : front + query_length]
    lse = lse.view(batch, list_heads, num_rows, shared, block_size).transpose(2, 3)
    lse = lse.reshape(batch, num_heads, -1)[:, :, front : front + query_length]
    return torch.empty_like(q).copy_(out), lse.contiguous()


def _buckets(sorted_counts: list[int], start: int, block_elements: int) -> list[tuple[int, int]]:
    """Cut rows sorted by list length into runs of similar length (padding at most 1/8) and bounded size."""
    buckets = []
    while start < len(sorted_counts):
        longest_allowed = sorted_counts[start] + sorted_counts[start] // 8
        end = start + 1
        while (
            end < len(sorted_counts)
            and sorted_counts[end] <= longest_allowed
            and (end + 1 - start) * sorted_counts[end] * block_elements <= BUCKET_ELEMENTS
        ):
            end += 1
        buckets.append((start, end))
        start = end
    return buckets
