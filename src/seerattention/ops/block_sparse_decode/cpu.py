"""Block-sparse decoding on the CPU in plain torch: for each KV head gather the listed blocks, then two small products.

Whole blocks are copied, which runs at the speed of memory where a head's tokens follow each other (a contiguous cache);
the products read the copy from the cache of the processor.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..indices import BlockIndices, read_lists, span_of
from ..span import KEY_SLOT, LENGTH, QUERY_SLOT, START, Span


def block_sparse_decode(
    q: Tensor, k: Tensor, v: Tensor, blocks: BlockIndices, scale: float, return_lse: bool
) -> tuple[Tensor, Tensor]:
    """Arguments as checked by the interface; computes in float32 whatever the dtype (faster than bf16 without AMX).

    Returns:
        ``out`` like q, and the natural-log ``lse``, float32, q's shape without the last dimension.
    """
    (indices, counts), block_size, span = read_lists(blocks), blocks.block_size, span_of(blocks, q, k)
    out = torch.zeros_like(q)
    lse = torch.full(q.shape[:-1], -math.inf, dtype=torch.float32, device=q.device)
    batch, kv_heads, queries, _ = indices.shape
    group = q.shape[1] // kv_heads
    starts, lengths, query_slots, key_slots = (span.column(i).tolist() for i in (START, LENGTH, QUERY_SLOT, KEY_SLOT))
    listed = counts.tolist()
    for row in range(batch):
        at = 0 if span.packed else row
        for token in range(min(queries, lengths[row])):
            position, slot = starts[row] + token, query_slots[row] + token
            for head in range(kv_heads):
                chosen = indices[row, head, token, : listed[row][head][token]]
                chosen = chosen[(chosen >= 0) & (chosen <= position // block_size)].long()
                if not len(chosen):
                    continue
                of = slice(head * group, (head + 1) * group)
                keys, values = (
                    _blocks(x, row, head, chosen, block_size, position + 1, key_slots[row], span) for x in (k, v)
                )
                scores = q[at, of, slot].float().mul(scale) @ keys.T
                mine = lse[at, of, slot] = scores.logsumexp(-1)
                out[at, of, slot] = (scores.sub_(mine[:, None]).exp_() @ values).to(q.dtype)
    return out, lse


def _blocks(
    x: Tensor, row: int, head: int, blocks: Tensor, block_size: int, seen: int, key_slot: int, span: Span
) -> Tensor:
    """The tokens of ``blocks`` before position ``seen``, float32 ``[n, D]``: whole blocks, then an unfinished one."""
    if span.pages is not None:
        size = span.pages.page_size
        own = x[:, head].unflatten(1, (size // block_size, block_size)).flatten(0, 1)
        pages = span.pages.table[row].long()[blocks * block_size // size]
        tiles = own.index_select(0, pages * (size // block_size) + blocks % (size // block_size))
        tokens = (blocks[:, None] * block_size + torch.arange(block_size)).flatten()
        return tiles.flatten(0, 1)[tokens < seen].float()
    own = x[0 if span.packed else row, head, key_slot : key_slot + seen]
    whole = blocks[(blocks + 1) * block_size <= seen]
    tiles = own[: seen // block_size * block_size].unflatten(0, (-1, block_size)).index_select(0, whole).flatten(0, 1)
    if len(whole) < len(blocks):
        tiles = torch.cat([tiles, own[seen // block_size * block_size :]])
    return tiles.float()
