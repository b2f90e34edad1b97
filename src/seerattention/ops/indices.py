"""Block indices: which key blocks each query block reads. The one data structure that every op shares.

Geometry, for queries that are the last ``Tq`` of ``Tk`` positions (``Tq == Tk`` for a whole prompt):

* blocks are cut at multiples of ``block_size`` of the *key* positions, so a chunk of a prompt sees the same grid as
  the whole prompt does;
* row ``r`` of the lists is the absolute query block ``first_query_block(Tq, Tk, block_size) + r``; the first and the
  last row may be partial;
* a query block sees the key blocks up to and including its own (*causal blocks*); inside its own (the *diagonal*
  block) the ordinary causal mask applies, token by token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def num_blocks(length: int, block_size: int) -> int:
    """Number of blocks of ``block_size`` tokens that cover ``length`` tokens; the last one may be partial."""
    return -(-length // block_size)


def first_query_block(query_length: int, key_length: int, block_size: int) -> int:
    """Absolute index of the block that holds the first of the last ``query_length`` of ``key_length`` positions."""
    if query_length > key_length:
        raise ValueError(
            f"got {query_length} queries for {key_length} keys; queries are the last positions of the keys, "
            "so there can be at most as many queries as keys"
        )
    return (key_length - query_length) // block_size


def num_query_blocks(query_length: int, key_length: int, block_size: int) -> int:
    """Number of rows of block indices for the last ``query_length`` of ``key_length`` positions."""
    return num_blocks(key_length, block_size) - first_query_block(query_length, key_length, block_size)


def causal_block_mask(
    num_rows: int, num_key_blocks: int, first_row: int = 0, device: torch.device | str | None = None
) -> Tensor:
    """Bool ``[num_rows, num_key_blocks]``: True where key block j is visible to absolute query block first_row + i."""
    rows = torch.arange(first_row, first_row + num_rows, device=device)
    return torch.arange(num_key_blocks, device=device)[None, :] <= rows[:, None]


@dataclass(frozen=True)
class BlockIndices:
    """Left-packed, ascending lists of key blocks, one list per (batch, head, query block).

    Attributes:
        indices: int32 ``[B, H, Nq, capacity]``. Entries past ``counts`` are undefined (-1 from ``from_mask``).
        counts: int32 ``[B, H, Nq]``, the number of valid entries of each list; 0 is allowed (such a row's output is 0).
        num_key_blocks: Nk, the number of key blocks that the lists index.
        block_size: tokens a block.
        by_token: rows are query tokens, not query blocks: lists of decoding.

    ``H`` is the number of query heads, or of KV heads when a whole group of query heads shares a list.
    Query blocks are the last ``Nq`` of the ``Nk`` key blocks.
    """

    indices: Tensor
    counts: Tensor
    num_key_blocks: int
    block_size: int = 64
    by_token: bool = False

    def __post_init__(self) -> None:
        if self.indices.dim() != 4 or self.counts.shape != self.indices.shape[:3]:
            raise ValueError(
                f"indices must be [B, H, Nq, capacity] and counts [B, H, Nq], got {tuple(self.indices.shape)} "
                f"and {tuple(self.counts.shape)}"
            )
        if self.indices.dtype != torch.int32 or self.counts.dtype != torch.int32:
            raise TypeError(f"indices and counts must be int32, got {self.indices.dtype} and {self.counts.dtype}")
        if not self.by_token and self.num_rows > self.num_key_blocks:
            raise ValueError(f"got {self.num_rows} query blocks but only {self.num_key_blocks} key blocks")

    @property
    def num_rows(self) -> int:
        """Nq, the number of query blocks."""
        return self.indices.shape[2]

    @property
    def first_row(self) -> int:
        """Absolute index of the first query block."""
        return self.num_key_blocks - self.num_rows

    @classmethod
    def from_mask(cls, mask: Tensor, block_size: int = 64) -> BlockIndices:
        """Pack a bool mask ``[B, H, Nq, Nk]``. Non-causal entries (key block after the query block) are dropped."""
        if mask.dim() != 4 or mask.dtype != torch.bool:
            raise ValueError(f"mask must be bool [B, H, Nq, Nk], got {mask.dtype} {tuple(mask.shape)}")
        num_rows, num_keys = mask.shape[2:]
        if num_rows > num_keys:
            raise ValueError(f"mask has {num_rows} query blocks but only {num_keys} key blocks")
        mask = mask & causal_block_mask(num_rows, num_keys, num_keys - num_rows, mask.device)
        counts = mask.sum(-1, dtype=torch.int32)
        slot = mask.cumsum(-1) - 1
        # Unselected entries all go to one spare slot, which is cut off.
        slot = torch.where(mask, slot, num_keys)
        indices = torch.full((*mask.shape[:3], num_keys + 1), -1, dtype=torch.int32, device=mask.device)
        blocks = torch.arange(num_keys, dtype=torch.int32, device=mask.device).expand(mask.shape)
        indices.scatter_(-1, slot, blocks)
        return cls(indices[..., :num_keys], counts, num_keys, block_size)

    def to_mask(self) -> Tensor:
        """Bool ``[B, H, Nq, Nk]``: True where the key block is on the list."""
        capacity = self.indices.shape[-1]
        valid = torch.arange(capacity, device=self.indices.device) < self.counts[..., None]
        slot = torch.where(valid, self.indices.long(), self.num_key_blocks)
        mask = torch.zeros((*self.counts.shape, self.num_key_blocks + 1), dtype=torch.bool, device=self.indices.device)
        mask.scatter_(-1, slot, True)
        return mask[..., : self.num_key_blocks]

    def density(self) -> float:
        """Listed blocks over causal blocks, over all batch rows and heads (synchronises the device)."""
        selected = int(self.counts.sum(dtype=torch.int64))
        batch, heads, rows = self.counts.shape
        causal = batch * heads * sum(range(self.first_row + 1, self.first_row + rows + 1))
        return selected / causal
