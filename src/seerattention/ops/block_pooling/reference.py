"""Block pooling in plain torch; also the CPU path, as it reads whole blocks without a mask."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..indices import num_blocks


def block_pooling(x: Tensor, kinds: Sequence[str], *, block_size: int, lengths: Tensor | None) -> Tensor:
    length = x.shape[2]
    if lengths is not None:
        return _pool_masked(x, kinds, block_size, lengths)
    whole = length // block_size * block_size
    parts = [_pool(x[:, :, :whole].unflatten(2, (-1, block_size)), kinds)] if whole else []
    if whole < length:
        parts.append(_pool(x[:, :, None, whole:], kinds))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _pool(blocks: Tensor, kinds: Sequence[str]) -> Tensor:
    """``[B, H, N, tokens, D] -> [B, H, N, len(kinds) * D]``, every token valid."""
    return torch.cat([_reduce(blocks, kind) for kind in kinds], dim=-1)


def _reduce(blocks: Tensor, kind: str) -> Tensor:
    if kind == "max":
        return blocks.amax(-2)
    if kind == "min":
        return blocks.amin(-2)
    return blocks.mean(-2, dtype=torch.float32).to(blocks.dtype)


def _pool_masked(x: Tensor, kinds: Sequence[str], block_size: int, lengths: Tensor) -> Tensor:
    """As above with ``lengths[b]`` valid tokens in each right-padded row; blocks without a valid token give 0."""
    length = x.shape[2]
    num = num_blocks(length, block_size)
    blocks = torch.nn.functional.pad(x, (0, 0, 0, num * block_size - length)).unflatten(2, (num, block_size))
    positions = torch.arange(num * block_size, device=x.device).view(num, block_size)
    valid = (positions < lengths[:, None, None]) & (positions < length)  # [B, N, block_size]
    padded = ~valid[:, None, :, :, None]
    counts = valid.sum(-1)[:, None, :, None]  # [B, 1, N, 1]
    pooled = []
    for kind in kinds:
        if kind == "avg":
            total = blocks.masked_fill(padded, 0).sum(-2, dtype=torch.float32)
            pooled.append((total / counts.clamp(min=1)).to(x.dtype))
        else:
            extreme = _reduce(blocks.masked_fill(padded, float("-inf") if kind == "max" else float("inf")), kind)
            pooled.append(extreme.masked_fill(counts == 0, 0))
    return torch.cat(pooled, dim=-1)
