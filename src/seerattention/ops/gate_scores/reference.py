"""Gate scores in plain torch: the definition, differentiable, and the path of training and of the CPU.

Linear layers run in the dtype that they are given, rotation and product in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor


def gate_scores(
    pooled_q: Tensor,
    pooled_k: Tensor,
    k_linear: Tensor,
    q_linear: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    *,
    block_size: int,
    scale: float,
    rows: Tensor | None = None,
) -> Tensor:
    """Logits ``[B, Hq, R, N]``, -inf above the block diagonal."""
    if rows is not None:
        pooled_q = pooled_q.index_select(2, rows)
    queries, keys = _project(pooled_q, pooled_k, k_linear, q_linear)
    queries, keys = queries.float(), keys.float()
    if cos is not None and sin is not None:
        cos, sin = (_block_rotary(table, block_size, queries.shape[-1]) for table in (cos, sin))
        keys = _rotate(keys, cos[:, None, None], sin[:, None, None])
        if rows is not None:
            cos, sin = cos.index_select(1, rows), sin.index_select(1, rows)
        queries = _rotate(queries, cos[:, None, None], sin[:, None, None])
    logits = (queries @ keys.transpose(-1, -2)).flatten(1, 2) * scale
    columns = torch.arange(keys.shape[-2], device=logits.device)
    absolute = columns if rows is None else rows
    return logits.masked_fill(columns[None, :] > absolute[:, None], float("-inf"))


def _project(pooled_q: Tensor, pooled_k: Tensor, k_linear: Tensor, q_linear: Tensor | None) -> tuple[Tensor, Tensor]:
    """Queries ``[B, Hkv, G, R, W]`` and keys ``[B, Hkv, G or 1, N, W]``, G query heads to a KV head."""
    kv_heads = pooled_k.shape[1]
    if q_linear is not None:
        pooled_q = pooled_q @ q_linear
    queries = pooled_q.unflatten(1, (kv_heads, pooled_q.shape[1] // kv_heads))
    # One key projection per query head reads the keys of its KV head, which need not be repeated for it.
    keys = pooled_k[:, :, None] @ k_linear.unflatten(0, (kv_heads, -1))
    return queries, keys


def _block_rotary(table: Tensor, block_size: int, width: int) -> Tensor:
    """The rotary table at block starts, float32 ``[B or 1, N, min(rotary_dim, W)]``."""
    starts = table[:, ::block_size].float()
    if starts.shape[-1] > width:
        # A gate narrower than the model's heads rotates by every s-th frequency, which spans the same range.
        return starts[..., :: starts.shape[-1] // width]
    return starts


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, half-split pairing, of the first ``cos.shape[-1]`` channels; the others pass unrotated."""
    rotary = cos.shape[-1]
    turned, straight = x[..., :rotary], x[..., rotary:]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((turned, straight), dim=-1) if straight.shape[-1] else turned
