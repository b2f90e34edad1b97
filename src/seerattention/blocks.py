"""Block geometry for padded batches, above the ops: blocks are anchored to content, not to padded slots.

Inside the package a batch is always *right-padded*: the content of each row starts at position 0 and ``lengths[b]``
tokens are valid. Causality then keeps padding out of every valid query's sight, and a row of a padded batch is cut into
exactly the blocks that it would have alone. Left-padded batches are shifted on the way in and back on the way out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .ops.block_selection import dense_indices
from .ops.indices import (
    BlockIndices,
    causal_block_mask,
    first_query_block,
    is_ordered,
    num_blocks,
    num_query_blocks,
    ordered_lists,
    read_lists,
)

__all__ = [
    "BlockIndices",
    "causal_block_mask",
    "complete_short_rows",
    "completed",
    "content_bounds",
    "dense_indices",
    "first_query_block",
    "num_blocks",
    "num_query_blocks",
    "shift_left",
    "shift_right",
]


def content_bounds(attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Start and length of the content of each row of a 2-D attention mask.

    Args:
        attention_mask: ``[B, T]``, nonzero at valid tokens, which are one contiguous run in each row.

    Returns:
        ``starts`` and ``lengths``, int64 ``[B]``.

    Raises:
        ValueError: a row has a hole (masked tokens between valid ones) or no valid token.
    """
    valid = attention_mask.bool()
    lengths = valid.sum(-1)
    starts = valid.int().argmax(-1)
    positions = torch.arange(valid.shape[-1], device=valid.device)
    expected = (positions >= starts[:, None]) & (positions < (starts + lengths)[:, None])
    if bool((expected != valid).any()) or bool((lengths == 0).any()):
        raise ValueError(
            "attention_mask must be one contiguous run of ones in each row (left and right padding are supported); "
            "got a row with a hole or with no valid token"
        )
    return starts, lengths


def completed(blocks: BlockIndices, rows: Tensor, causal: Tensor, minimum: int) -> BlockIndices:
    """The same lists, but some rows, which see fewer than ``minimum`` tokens, read everything.

    Args:
        blocks: lists of query blocks or of query tokens.
        rows: bool ``[B, Nq]`` or ``[B, 1]``, which rows.
        causal: integers ``[B or 1, Nq]``, how many blocks each of them may see; 0 where it holds no query.
        minimum: decides how many entries a list has room for at least.
    """
    indices, counts = read_lists(blocks)
    longest = min(num_blocks(max(minimum - 1, 0), blocks.block_size), blocks.num_key_blocks)
    indices = torch.nn.functional.pad(indices, (0, max(longest - indices.shape[-1], 0)))
    everything = torch.arange(indices.shape[-1], dtype=indices.dtype, device=indices.device)
    rows = rows[:, None]
    indices = torch.where(rows[..., None], everything, indices)
    counts = torch.where(rows, causal.to(counts.dtype)[:, None], counts)
    make = ordered_lists if is_ordered(blocks) else BlockIndices
    return make(indices, counts, blocks.num_key_blocks, blocks.block_size, blocks.by_token, blocks.span)


def complete_short_rows(blocks: BlockIndices, lengths: Tensor, minimum: int) -> BlockIndices:
    """The same lists of query blocks, but rows of a padded batch that would be dense alone, for having fewer than
    ``minimum`` tokens, read everything."""
    if minimum <= 1:
        return blocks
    own = blocks.last_blocks(lengths.device)
    causal = torch.where(own * blocks.block_size < lengths[:, None], own + 1, 0)  # of padding there is nothing to read
    return completed(blocks, (lengths < minimum)[:, None], causal, minimum)


def shift_left(x: Tensor, starts: Tensor, dim: int = -2) -> Tensor:
    """Rotate each batch row of ``x [B, ...]`` along ``dim`` so that the token at ``starts[b]`` comes first."""
    return _rotate(x, starts, dim)


def shift_right(x: Tensor, starts: Tensor, dim: int = -2) -> Tensor:
    """Undo :func:`shift_left`."""
    return _rotate(x, -starts, dim)


def _rotate(x: Tensor, offsets: Tensor, dim: int) -> Tensor:
    dim = dim % x.dim()
    length = x.shape[dim]
    index = (torch.arange(length, device=x.device)[None, :] + offsets[:, None]) % length
    shape = [1] * x.dim()
    shape[0], shape[dim] = x.shape[0], length
    return x.gather(dim, index.view(shape).expand(x.shape))
