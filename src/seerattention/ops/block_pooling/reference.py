"""Block pooling in plain torch; also the CPU path, as it reads whole blocks without a mask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..indices import num_blocks
from ..span import LENGTH, QUERY_SLOT, START


class Grid(NamedTuple):
    """Which blocks are pooled.

    Attributes:
        num: blocks of each row.
        offset: tokens of block 0 that come before the first token of x, which are not there.
        align: with a table, block 0 begins at the last multiple of so many tokens up to a row's first one; 0: at the
            first token of x, rows being whole prompts.
        table: that of a span, int32 ``[B, 4]``, where rows differ.
    """

    num: int
    offset: int
    align: int
    table: Tensor | None


def block_pooling(x: Tensor, kinds: Sequence[str], block_size: int, grid: Grid) -> Tensor:
    if grid.table is not None or grid.offset or grid.num != num_blocks(x.shape[2], block_size):
        return _pool_some(x, kinds, block_size, grid)
    length = x.shape[2]
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


def _pool_masked(blocks: Tensor, kinds: Sequence[str], valid: Tensor) -> Tensor:
    """As above with ``valid [B or 1, N, tokens]``; blocks without a valid token give 0."""
    padded = ~valid[:, None, :, :, None]
    counts = valid.sum(-1)[:, None, :, None]  # [B, 1, N, 1]
    pooled = []
    for kind in kinds:
        if kind == "avg":
            total = blocks.masked_fill(padded, 0).sum(-2, dtype=torch.float32)
            pooled.append((total / counts.clamp(min=1)).to(blocks.dtype))
        else:
            extreme = _reduce(blocks.masked_fill(padded, float("-inf") if kind == "max" else float("inf")), kind)
            pooled.append(extreme.masked_fill(counts == 0, 0))
    return torch.cat(pooled, dim=-1)


def _pool_some(x: Tensor, kinds: Sequence[str], block_size: int, grid: Grid) -> Tensor:
    """Blocks of chunks and padded rows: tokens before the first and behind the last of a row are not valid."""
    places = torch.arange(grid.num * block_size, device=x.device)
    if grid.table is None:
        tokens = (places - grid.offset)[None]  # [1, N * block_size], of the chunk
        valid, slots = (tokens >= 0) & (tokens < x.shape[2]), tokens
    else:
        table = grid.table.long()
        first = table[:, START] % grid.align if grid.align else torch.zeros_like(table[:, START])
        tokens = places - first[:, None]
        valid, slots = (tokens >= 0) & (tokens < table[:, LENGTH, None]), tokens + table[:, QUERY_SLOT, None]
    slots = slots.clamp(0, x.shape[2] - 1)
    rows = torch.arange(x.shape[0], device=x.device)[:, None]  # one row for all where rows are packed
    blocks = x.transpose(1, 2)[rows, slots].transpose(1, 2).unflatten(2, (grid.num, block_size))
    return _pool_masked(blocks, kinds, valid.unflatten(1, (grid.num, block_size)))
