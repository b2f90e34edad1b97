"""Block-sparse decoding on the CPU in plain torch: gather the tokens of the listed blocks, then batched products."""

from __future__ import annotations

import torch
from torch import Tensor

from ..span import KEY_SLOT, START, Span

# Gathered elements of keys and values at a time: a query token of a long context after the other where it is more.
MAX_ELEMENTS = 1 << 26


def block_sparse_decode_cpu(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, counts: Tensor, block_size: int, span: Span, scale: float
) -> tuple[Tensor, Tensor]:
    """Arguments as checked by the interface; computes in float32 whatever the dtype (faster than bf16 without AMX).

    Returns:
        ``out`` like q, and the natural-log ``lse``, float32, q's shape without the last dimension.
    """
    out = torch.zeros_like(q)
    lse = torch.full(q.shape[:-1], float("-inf"), dtype=torch.float32, device=q.device)
    width = int(counts.max()) if counts.numel() else 0
    if width == 0:
        return out, lse
    batch, kv_heads, queries, _ = indices.shape
    heads, head_dim = q.shape[1], q.shape[-1]
    grouped = span.gather_queries(q).float().view(batch, kv_heads, heads // kv_heads, queries, head_dim).transpose(2, 3)
    tokens = indices[..., :width, None].long() * block_size + torch.arange(block_size)  # positions
    known = (torch.arange(width) < counts[..., None])[..., None] & (indices[..., :width, None] >= 0)
    causal = tokens <= (span.column(START)[:, None] + torch.arange(queries))[:, None, :, None, None]
    visible = (known & causal & (tokens < span.ends()[:, None, None, None, None])).flatten(-2)
    tokens = tokens.flatten(-2).masked_fill(~visible, 0)
    step = max(1, MAX_ELEMENTS // (batch * kv_heads * width * block_size * head_dim))
    results = []
    for start in range(0, queries, step):
        part = slice(start, start + step)
        keys, values = (_gathered(x, tokens[:, :, part], span) for x in (k, v))
        scores = grouped[:, :, part] @ keys.transpose(-1, -2) * scale
        scores = scores.masked_fill_(~visible[:, :, part, None], float("-inf"))
        part_lse = scores.logsumexp(-1)
        weights = scores.sub_(part_lse.masked_fill(part_lse == float("-inf"), 0.0)[..., None]).exp_()
        results.append((weights @ values, part_lse))
    # [B, Hkv, Tq, group, D] -> [B, Hq, Tq, D]
    made = torch.cat([part for part, _ in results], 2).transpose(2, 3).reshape(batch, heads, queries, head_dim)
    made_lse = torch.cat([part for _, part in results], 2).transpose(2, 3).reshape(batch, heads, queries)
    return span.scatter_queries(made.to(q.dtype), out), span.scatter_queries(made_lse, lse)


def _gathered(x: Tensor, positions: Tensor, span: Span) -> Tensor:
    """Keys or values at ``positions [B, Hkv, Tq, n]``, float32 ``[B, Hkv, Tq, n, D]``."""
    batch, kv_heads = positions.shape[:2]
    head = torch.arange(kv_heads)[:, None, None]
    row = torch.arange(batch)[:, None, None, None]
    if span.pages is not None:
        size = span.pages.page_size
        page = span.pages.table.long()[row, positions // size]
        return x[page, head, positions % size].float()
    slots = positions if span.plain else positions + span.column(KEY_SLOT)[:, None, None, None]
    return x[0 if span.packed else row, head, slots].float()
