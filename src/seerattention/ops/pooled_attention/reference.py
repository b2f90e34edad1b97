"""Pooled attention in plain torch, float32, one query block after the other: the definition, not the fast way."""

from __future__ import annotations

import torch
from torch import Tensor

from ..span import num_blocks
from .arguments import Content, Wanted, content_rows


def pooled_attention(q: Tensor, k: Tensor, rows: Tensor, wanted: Wanted) -> Tensor:
    block_size, span = wanted.block_size, wanted.span
    columns = span.num_key_blocks(block_size)
    out = q.new_zeros(span.batch, q.shape[1], rows.numel(), columns, dtype=torch.float32)
    for b, content in enumerate(content_rows(span)):
        keys = keys_of(k, q.shape[1], content)
        for slot, row in enumerate(rows.tolist()):
            block = content.start // block_size + row
            first, end = max(block * block_size, content.start), min((block + 1) * block_size, content.end)
            if first >= end:
                continue  # a block of padding
            positions = torch.arange(first, end, device=q.device)
            tiles = attention_map(q, keys, positions, content, wanted)
            tiles = reduce_tiles(tiles, wanted, over=1)
            if wanted.normalize and wanted.reduce == "sum":
                tiles /= len(positions)
            out[b, :, slot, : tiles.shape[1]] = tiles
    return divide_by_sum(out) if wanted.divides_by_sum else out


def keys_of(k: Tensor, heads: int, content: Content) -> Tensor:
    """The keys of one row, float32 ``[Hq, n, D]``, one for each query head."""
    own = k[content.memory, :, content.key_slot : content.key_slot + content.end]
    return own.float().repeat_interleave(heads // k.shape[1], dim=0)


def attention_map(q: Tensor, keys: Tensor, positions: Tensor, content: Content, wanted: Wanted) -> Tensor:
    """Probabilities of the queries of one row at some positions, cut into blocks of keys; 0 at keys they do not see.

    Args:
        q: as given to the op.
        keys: of :func:`keys_of`.
        positions: int64 ``[M]``, each one of a query of the row.

    Returns:
        float32 ``[Hq, M, n, block_size]``, n the blocks of the row's keys.
    """
    slots = positions - content.start + content.query_slot
    scores = q[content.memory, :, slots].float() @ keys.transpose(-1, -2) * wanted.scale
    hidden = torch.arange(keys.shape[1], device=q.device) > positions[:, None]
    scores = scores.masked_fill(hidden, float("-inf"))
    if wanted.lse is None:
        probabilities = scores.softmax(-1)
    else:
        probabilities = (scores - wanted.lse[content.memory, :, slots, None]).exp()
    num = num_blocks(keys.shape[1], wanted.block_size)
    padded = torch.nn.functional.pad(probabilities, (0, num * wanted.block_size - keys.shape[1]))
    return padded.unflatten(-1, (num, wanted.block_size))


def reduce_tiles(tiles: Tensor, wanted: Wanted, *, over: int) -> Tensor:
    """One value for each tile: probabilities, keys of a block last, reduced over these and over dimension ``over``."""
    if wanted.reduce == "max":
        return tiles.amax((over, -1))
    masses = tiles.sum(-1)
    return masses.amax(over) if wanted.reduce == "row_sum" else masses.sum(over)


def divide_by_sum(out: Tensor) -> Tensor:
    """Each row of ``out [..., Nk]`` divided in place by its sum; rows of 0 stay 0."""
    return out.div_(out.sum(-1, keepdim=True).clamp_(min=torch.finfo(torch.float32).tiny))
