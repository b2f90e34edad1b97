"""Span: where the queries and keys of a call lie, row by row. The one geometry that every op shares.

The *content* of a row is its tokens without padding, numbered from 0; *positions* count content, *slots* count places
in memory. Blocks are cut from the content, so a row of a padded or packed batch, or a chunk of a prompt, has exactly
the blocks that the whole prompt has alone.

A call holds, for each row, queries at positions ``start .. start + length`` and keys at positions
``0 .. start + length``: a query sees the keys up to its own position, and there are none after the last query. The
default, and the cheap case, is that the queries are the last ``queries`` of ``keys`` positions in every row alike.

Row ``r`` of block lists, scores and targets is the query block ``start // block_size + r`` of its batch row; the first
and the last of them may be partial. Rows behind a batch row's last query hold no query: they are *not valid*.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

QUERY_SLOT, START, LENGTH, KEY_SLOT = range(4)
"""Columns of :attr:`Span.table`."""


def num_blocks(length: int, block_size: int) -> int:
    """Number of blocks of ``block_size`` tokens that cover ``length`` tokens; the last one may be partial."""
    return -(-length // block_size)


@dataclass(frozen=True)
class Pages:
    """Keys and values in pages: ``k`` and ``v`` are ``[pages, Hkv, page_size, D]`` instead of ``[B, Hkv, Tk, D]``.

    Attributes:
        table: int32 ``[B, N]``, the pages of each row in the order of its content. Entries behind a row's last key are
            not read.
        page_size: tokens a page, a multiple of the block size, so that no block lies in two pages.
    """

    table: Tensor
    page_size: int


@dataclass(frozen=True)
class Span:
    """Which positions the queries and keys of a call are, and in which slots they lie.

    Attributes:
        batch: rows.
        queries: query slots of each row, ``Tq``; of packed rows, the queries of the longest.
        keys: key slots of each row, ``Tk``; of packed rows or pages, the keys of the longest. Scores have
            ``num_blocks(keys, block_size)`` columns.
        table: int32 ``[B, 4]`` on the device of the tensors, or None for the default. Columns: slot of the first query,
            its position (``start``), number of queries (``length``), slot of position 0 among the keys. What it says is
            not checked on a GPU, as that would wait for it.
        packed: rows follow each other in one long row: q is ``[1, Hq, T, D]``, k and v ``[1, Hkv, T', D]``.
        pages: keys and values lie in pages; the last column of the table is then not used.
    """

    batch: int
    queries: int
    keys: int
    table: Tensor | None = None
    packed: bool = False
    pages: Pages | None = None

    def __post_init__(self) -> None:
        if self.batch < 0 or self.queries < 0 or self.keys < 0:
            raise ValueError(f"a span cannot have {self.batch} rows of {self.queries} queries and {self.keys} keys")
        if self.queries > self.keys:
            raise ValueError(
                f"got {self.queries} queries for {self.keys} keys; queries are among the positions of the keys, so "
                "there can be at most as many queries as keys"
            )
        if self.table is None:
            if self.packed or self.pages is not None:
                raise ValueError("packed rows and pages need a table; use Span.of_rows or Span.of_packed")
        elif self.table.shape != (self.batch, 4) or self.table.dtype != torch.int32:
            raise ValueError(
                f"the table of a span must be int32 [{self.batch}, 4], got {self.table.dtype} {tuple(self.table.shape)}"
            )

    # ---- makers --------------------------------------------------------------------------------------------------

    @classmethod
    def of_padded(cls, batch: int, queries: int, keys: int, lengths: Tensor | None = None) -> Span:
        """The last ``queries`` of ``keys`` slots of right-padded rows of ``lengths [B]`` tokens (None: all valid)."""
        if lengths is None:
            return cls(batch, queries, keys)
        start = torch.full_like(lengths, keys - queries)
        return cls.of_rows(queries, keys, start=start, length=(lengths - start).clamp(min=0))

    @classmethod
    def of_rows(
        cls,
        queries: int,
        keys: int,
        *,
        start: Tensor,
        length: Tensor,
        query_slot: Tensor | None = None,
        key_slot: Tensor | None = None,
        pages: Pages | None = None,
    ) -> Span:
        """Rows that differ: integers ``[B]`` for each column of the table; slots are 0 by default.

        Raises:
            ValueError: pages whose table has not a row for each of these.
        """
        none = torch.zeros_like(start)
        columns = (none if query_slot is None else query_slot, start, length, none if key_slot is None else key_slot)
        table = torch.stack([column.to(start.device, torch.int32) for column in columns], dim=1)
        if pages is not None and pages.table.shape[0] != len(start):
            raise ValueError(f"the page table has {pages.table.shape[0]} rows for a batch of {len(start)}")
        return cls(len(start), queries, keys, table, pages=pages)

    @classmethod
    def of_packed(
        cls, cu_queries: Tensor, cu_keys: Tensor | None = None, *, queries: int | None = None, keys: int | None = None
    ) -> Span:
        """Rows packed one after the other.

        Args:
            cu_queries: integers ``[B + 1]``, the slot at which the queries of each row begin, and where the last ones
                end. The queries of a row are its last positions.
            cu_keys: the same of the keys; None: each row is a whole prompt.
            queries, keys: of the longest row. Without them they are read from the tensors (which waits for a GPU).
        """
        cu_keys = cu_queries if cu_keys is None else cu_keys
        length, total = cu_queries.diff(), cu_keys.diff()
        if queries is None:
            queries = int(length.max()) if len(length) else 0
        if keys is None:
            keys = int(total.max()) if len(total) else 0
        columns = (cu_queries[:-1], total - length, length, cu_keys[:-1])
        table = torch.stack([column.to(torch.int32) for column in columns], dim=1)
        return cls(len(length), queries, keys, table, packed=True)

    # What an op is given that ``torch.compile`` sees as one, see ``custom_op.py``.
    OP_FIELDS: ClassVar[dict[str, Any]] = {
        "batch": int,
        "queries": int,
        "keys": int,
        "table": Tensor | None,
        "packed": bool,
        "page_table": Tensor | None,
        "page_size": int,
    }

    @classmethod
    def from_arguments(cls, *arguments: Any) -> Span:
        """Undo :meth:`arguments`."""
        batch, queries, keys, table, packed, page_table, page_size = arguments
        pages = None if page_table is None else Pages(page_table, page_size)
        return cls(batch, queries, keys, table, packed, pages)

    def arguments(self) -> tuple[Any, ...]:
        """The span as tensors and numbers, by ``OP_FIELDS``."""
        pages = (None, 0) if self.pages is None else (self.pages.table, self.pages.page_size)
        return self.batch, self.queries, self.keys, self.table, self.packed, *pages

    def to(self, device: torch.device | str) -> Span:
        """The same on another device."""
        if self.table is None:
            return self
        pages = self.pages and Pages(self.pages.table.to(device), self.pages.page_size)
        return dataclasses.replace(self, table=self.table.to(device), pages=pages)

    # ---- rows ----------------------------------------------------------------------------------------------------

    @property
    def plain(self) -> bool:
        """Whether this is the default: the last slots of every row alike."""
        return self.table is None

    def column(self, index: int, device: torch.device | str | None = None) -> Tensor:
        """A column of the table, int64 ``[B]``; of the default too."""
        if self.table is None:
            value = {START: self.keys - self.queries, LENGTH: self.queries}.get(index, 0)
            return torch.full((self.batch,), value, dtype=torch.int64, device=device)
        return self.table[:, index].long()

    def ends(self, device: torch.device | str | None = None) -> Tensor:
        """Position behind each row's last query, which is its number of keys; int64 ``[B]``."""
        return self.column(START, device) + self.column(LENGTH, device)

    # ---- blocks --------------------------------------------------------------------------------------------------
    # by_token: rows are query tokens, as in lists of decoding, and not query blocks.

    def num_key_blocks(self, block_size: int) -> int:
        """Columns of scores and masks."""
        return num_blocks(self.keys, block_size)

    def num_rows(self, block_size: int, by_token: bool = False) -> int:
        """Rows of lists and scores. Where rows differ, one more than the queries fill: chunks may begin anywhere."""
        if by_token or self.queries == 0:
            return self.queries
        if self.table is None:
            return self.num_key_blocks(block_size) - (self.keys - self.queries) // block_size
        return min(self.num_key_blocks(block_size), num_blocks(self.queries - 1, block_size) + 1)

    def first_row(self, block_size: int) -> int:
        """Query block of the first row, of the default only.

        Raises:
            ValueError: rows differ.
        """
        if self.table is not None:
            raise ValueError("the rows of this span begin at different blocks; use row_blocks()")
        return (self.keys - self.queries) // block_size

    def row_blocks(self, block_size: int, device: torch.device | str | None = None, by_token: bool = False) -> Tensor:
        """Query block of each row, int64 ``[B, R]`` (``[1, R]`` where all are alike)."""
        device = device if self.table is None else self.table.device
        rows = torch.arange(self.num_rows(block_size, by_token), device=device)
        if self.table is None:
            first = self.keys - self.queries
            return ((rows + first) // block_size if by_token else rows + first // block_size)[None]
        start = self.column(START)[:, None]
        return (rows + start) // block_size if by_token else rows + start // block_size

    def valid_rows(self, block_size: int, device: torch.device | str | None = None, by_token: bool = False) -> Tensor:
        """Bool ``[B, R]`` (``[1, R]`` where all are alike): whether a row holds a query."""
        blocks = self.row_blocks(block_size, device, by_token)
        if self.table is None:
            return torch.ones_like(blocks, dtype=torch.bool)
        length = self.column(LENGTH)[:, None]
        if by_token:
            return torch.arange(self.queries, device=blocks.device) < length
        return (blocks * block_size < self.ends()[:, None]) & (length > 0)

    def last_blocks(self, block_size: int, device: torch.device | str | None = None, by_token: bool = False) -> Tensor:
        """The last key block that each row may see, its own; -1 of rows that are not valid. As :meth:`row_blocks`."""
        blocks = self.row_blocks(block_size, device, by_token)
        if self.table is None:
            return blocks
        # A table that says too much must not lead out of the memory.
        blocks = blocks.clamp(max=self.num_key_blocks(block_size) - 1)
        return blocks.masked_fill(~self.valid_rows(block_size, by_token=by_token), -1)

    def causal_blocks(
        self, block_size: int, device: torch.device | str | None = None, by_token: bool = False
    ) -> Tensor:
        """Bool ``[B, R, N]`` (``[1, R, N]``): which key blocks a row may see: those up to its own, if it is valid."""
        last = self.last_blocks(block_size, device, by_token)
        return torch.arange(self.num_key_blocks(block_size), device=last.device) <= last[..., None]

    # ---- tensors -------------------------------------------------------------------------------------------------

    def check(self, op: str, q: Tensor | None = None, k: Tensor | None = None, block_size: int | None = None) -> None:
        """Check tensors ``[B, H, T, D]`` against the span.

        Raises:
            ValueError: they do not have its rows and slots, lie on another device, or its pages do not hold whole
                blocks.
        """
        for name, x, slots in (("q", q, self.queries), ("k", k, self.keys)):
            if x is None:
                continue
            if self.table is not None and self.table.device != x.device:
                raise ValueError(f"{op}: {name} is on {x.device} but its span on {self.table.device}")
            if name == "k" and self.pages is not None:
                if x.shape[2] != self.pages.page_size:
                    raise ValueError(f"{op}: pages hold {self.pages.page_size} tokens, but k is {tuple(x.shape)}")
                continue
            if self.packed and x.shape[0] == 1:
                continue
            if self.packed or x.shape[0] != self.batch or x.shape[2] != slots:
                rows, slots_ = ("1", "any number of") if self.packed else (self.batch, slots)
                raise ValueError(
                    f"{op}: the span has {rows} rows of {slots_} slots, but {name} is {tuple(x.shape)}; the tensors "
                    "must be those that it was made for"
                )
        if self.pages is not None:
            self._check_pages(op, self.pages, block_size)

    def _check_pages(self, op: str, pages: Pages, block_size: int | None) -> None:
        assert self.table is not None
        table = pages.table
        if block_size is not None and pages.page_size % block_size:
            raise ValueError(f"{op}: pages of {pages.page_size} tokens do not hold whole blocks of {block_size}")
        if table.dim() != 2 or table.dtype != torch.int32 or table.stride(1) != 1 or table.device != self.table.device:
            raise ValueError(
                f"{op}: the page table must be int32 [B, N] with contiguous rows on {self.table.device}, got "
                f"{table.dtype} {tuple(table.shape)} on {table.device}"
            )
        if table.shape[1] * pages.page_size < self.keys:
            raise ValueError(
                f"{op}: {table.shape[1]} pages of {pages.page_size} tokens a row do not hold {self.keys} keys; give "
                "the page table more columns"
            )

    def gather_queries(self, x: Tensor) -> Tensor:
        """``x`` with the slots of q -> ``[B, H, queries, D]``, each row's first query first.

        What follows a row's last query is undefined.
        """
        if self.table is None:
            return x
        return _gather(x, self.column(QUERY_SLOT), self.queries, self.packed)

    def gather_query_blocks(self, x: Tensor, block_size: int) -> Tensor:
        """``x`` with the slots of q -> ``[B, H, num_rows * block_size, D]``: whole query blocks, row by row.

        What lies before a row's first query and behind its last one is undefined, and 0 by default.
        """
        if self.table is None:
            front = (self.keys - self.queries) % block_size
            back = self.num_rows(block_size) * block_size - front - self.queries
            return torch.nn.functional.pad(x, (0, 0, front, back)) if front or back else x
        first = self.column(QUERY_SLOT) - self.column(START) % block_size
        return _gather(x, first, self.num_rows(block_size) * block_size, self.packed)

    def scatter_query_blocks(self, x: Tensor, out: Tensor, block_size: int) -> Tensor:
        """Undo :meth:`gather_query_blocks`, of ``x [B, H, num_rows * block_size, ...]``, as :meth:`scatter_queries`."""
        if self.table is None:
            front = (self.keys - self.queries) % block_size
            return out.copy_(x[:, :, front : front + self.queries])
        return self.scatter_queries(_gather(x, self.column(START) % block_size, self.queries, False), out)

    def gather_keys(self, x: Tensor) -> Tensor:
        """``x`` with the slots (or pages) of k -> ``[B, H, keys, D]``, position 0 first.

        What follows a row's last key is undefined.
        """
        if self.table is None:
            return x
        if self.pages is None:
            return _gather(x, self.column(KEY_SLOT), self.keys, self.packed)
        needed = num_blocks(self.keys, self.pages.page_size)
        pages = self.pages.table[:, :needed].long().clamp(0, x.shape[0] - 1)
        rows = x[pages]  # [B, N, H, page, D]
        return rows.permute(0, 2, 1, 3, 4).flatten(2, 3)[:, :, : self.keys]

    def scatter_queries(self, x: Tensor, out: Tensor) -> Tensor:
        """Undo :meth:`gather_queries`: put ``x [B, H, queries, ...]`` into the slots of ``out``, which is returned.

        Slots without a query keep what ``out`` holds there.
        """
        if self.table is None:
            return out.copy_(x)
        place = torch.arange(self.queries, device=x.device)
        row, slot = torch.nonzero(place < self.column(LENGTH)[:, None], as_tuple=True)
        target = slot + self.column(QUERY_SLOT)[row]
        out.transpose(1, 2)[torch.zeros_like(row) if self.packed else row, target] = x.transpose(1, 2)[row, slot]
        return out


def _gather(x: Tensor, first: Tensor, count: int, packed: bool) -> Tensor:
    """``count`` slots of each row of ``x [B or 1, H, T, ...]`` from ``first [B]`` on; what is not there repeats."""
    slots = (first[:, None] + torch.arange(count, device=x.device)).clamp(0, x.shape[2] - 1)
    rows = torch.zeros_like(slots) if packed else torch.arange(len(first), device=x.device)[:, None].expand_as(slots)
    return x.transpose(1, 2)[rows, slots].transpose(1, 2)


def cumulative(lengths: Sequence[int] | Tensor) -> Tensor:
    """Lengths ``[B]`` -> where packed rows begin and end, int32 ``[B + 1]``, as ``Span.of_packed`` takes it."""
    lengths = torch.as_tensor(lengths)
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
