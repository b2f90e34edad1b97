"""Block indices: which key blocks each query block reads. The one data structure that every op shares.

* Blocks are cut from the content of each row of a batch (``span.py``), so a chunk of a prompt, and a row among others,
  has the blocks that the whole prompt has alone;
* row ``r`` of the lists is a query block, by default the ``r``-th of the last ones; the first and the last row may be
  partial;
* a query block sees the key blocks up to and including its own (*causal blocks*); inside its own (the *diagonal*
  block) the ordinary causal mask applies, token by token.

A list stands for the *set* of its causal blocks. The kernels take it ascending, each block once, and no block of the
future. Lists that this package makes are so (:func:`ordered_lists`) and nothing is spent on them; lists that come from
outside are brought into this form by :func:`clean_lists` before anything is computed or counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from . import lists
from .span import Span, num_blocks

__all__ = [
    "BlockIndices",
    "causal_block_mask",
    "check_span",
    "clean_lists",
    "first_query_block",
    "is_ordered",
    "num_blocks",
    "num_query_blocks",
    "ordered_lists",
    "read_lists",
    "span_of",
]


def first_query_block(query_length: int, key_length: int, block_size: int) -> int:
    """Query block that holds the first of the last ``query_length`` of ``key_length`` positions."""
    return Span(1, query_length, key_length).first_row(block_size)


def num_query_blocks(query_length: int, key_length: int, block_size: int) -> int:
    """Number of rows of block indices for the last ``query_length`` of ``key_length`` positions."""
    return Span(1, query_length, key_length).num_rows(block_size)


def causal_block_mask(
    num_rows: int, num_key_blocks: int, first_row: int = 0, device: torch.device | str | None = None
) -> Tensor:
    """Bool ``[num_rows, num_key_blocks]``: True where key block j is visible to absolute query block first_row + i."""
    rows = torch.arange(first_row, first_row + num_rows, device=device)
    return torch.arange(num_key_blocks, device=device)[None, :] <= rows[:, None]


@dataclass(frozen=True)
class BlockIndices:
    """Left-packed lists of key blocks, one list per (batch, head, query block). A list stands for a set.

    Lists may be in any order. Blocks that occur twice count once, and blocks after the query block are not read, so
    both make no difference. Lists that are not known to ascend cost a look at their values wherever they are used,
    which waits for the device; see :meth:`checked`.

    Attributes:
        indices: int32 ``[B, H, Nq, capacity]``. Entries past ``counts`` are undefined (-1 from ``from_mask``).
        counts: int32 ``[B, H, Nq]``, the number of valid entries of each list; 0 is allowed (such a row's output is 0).
        num_key_blocks: Nk, the number of key blocks that the lists index.
        block_size: tokens a block.
        by_token: rows are query tokens, not query blocks: lists of decoding.
        span: which query blocks (or tokens) the rows are, and where the queries and keys lie. None: the last ``Nq`` of
            the ``Nk`` key blocks in every batch row. Rows of a span that hold no query have no causal block.

    ``H`` is the number of query heads, or of KV heads when a whole group of query heads shares a list.

    Raises:
        ValueError: shapes that do not fit each other or the span. Entries that are no key block, and counts that are
            negative or above the capacity, raise where the lists are first used.
        TypeError: dtypes other than int32.
    """

    indices: Tensor
    counts: Tensor
    num_key_blocks: int
    block_size: int = 64
    by_token: bool = False
    span: Span | None = None

    # What is known of the order of the lists. None: nothing. True: they are the package's own (``ordered_lists``) and
    # nobody outside has seen their tensors. Two numbers: they were, when the tensors had these versions.
    _order: ClassVar[Any] = None

    # What an op is given that ``torch.compile`` sees as one, see ``custom_op.py``; the span goes by itself.
    OP_FIELDS: ClassVar[dict[str, Any]] = {
        "indices": Tensor,
        "counts": Tensor,
        "num_key_blocks": int,
        "block_size": int,
        "by_token": bool,
        "ordered": bool,
    }

    def __post_init__(self) -> None:
        indices, counts = read_lists(self)
        if indices.dim() != 4 or counts.shape != indices.shape[:3]:
            raise ValueError(
                f"indices must be [B, H, Nq, capacity] and counts [B, H, Nq], got {tuple(indices.shape)} "
                f"and {tuple(counts.shape)}"
            )
        if indices.dtype != torch.int32 or counts.dtype != torch.int32:
            raise TypeError(f"indices and counts must be int32, got {indices.dtype} and {counts.dtype}")
        if self.span is not None:
            check_span(indices.shape, indices.device, self.num_key_blocks, self.block_size, self.by_token, self.span)
        elif not self.by_token and self.num_rows > self.num_key_blocks:
            raise ValueError(f"got {self.num_rows} query blocks but only {self.num_key_blocks} key blocks")

    def __getstate__(self) -> dict[str, Any]:
        """A copy shares the tensors, or has others: what was known of their order stays behind."""
        _lend(self)
        return {name: value for name, value in vars(self).items() if name != "_order"}

    @staticmethod
    def from_arguments(
        indices: Tensor, counts: Tensor, num_key_blocks: int, block_size: int, by_token: bool, ordered: bool
    ) -> BlockIndices:
        """Undo :meth:`arguments`."""
        blocks = ordered_lists(indices, counts, num_key_blocks, block_size, by_token)
        if not ordered:
            object.__setattr__(blocks, "_order", None)
        return blocks

    def arguments(self) -> tuple[Any, ...]:
        """The lists as tensors and numbers, by ``OP_FIELDS``."""
        return *read_lists(self), self.num_key_blocks, self.block_size, self.by_token, is_ordered(self)

    @property
    def num_rows(self) -> int:
        """Nq, the number of query blocks."""
        return read_lists(self)[1].shape[2]

    @property
    def first_row(self) -> int:
        """Query block of the first row.

        Raises:
            ValueError: batch rows begin at different blocks.
        """
        return self.num_key_blocks - self.num_rows if self.span is None else self.span.first_row(self.block_size)

    @classmethod
    def from_mask(
        cls, mask: Tensor, block_size: int = 64, *, by_token: bool = False, span: Span | None = None
    ) -> BlockIndices:
        """Pack a bool mask ``[B, H, Nq, Nk]``. Non-causal entries (key block after the query block) are dropped.

        Args:
            mask: which key blocks each row reads.
            block_size: tokens a block.
            by_token, span: what the rows are, see :class:`BlockIndices`.

        Raises:
            ValueError: another shape or dtype, or one that does not fit the span.
        """
        if mask.dim() != 4 or mask.dtype != torch.bool:
            raise ValueError(f"mask must be bool [B, H, Nq, Nk], got {mask.dtype} {tuple(mask.shape)}")
        num_rows, num_keys = mask.shape[2:]
        if span is not None:
            check_span(mask.shape, mask.device, num_keys, block_size, by_token, span)
        elif not by_token and num_rows > num_keys:
            raise ValueError(f"mask has {num_rows} query blocks but only {num_keys} key blocks")
        last = _last_blocks(num_rows, num_keys, block_size, by_token, span, mask.device)
        mask = mask & (torch.arange(num_keys, device=mask.device) <= last[:, None, :, None])
        return ordered_lists(*lists.pack(mask, num_keys), num_keys, block_size, by_token, span)

    def to_mask(self) -> Tensor:
        """Bool ``[B, H, Nq, Nk]``: True where the causal key block is on the list.

        Raises:
            ValueError: an entry that is no key block, or a count outside of the capacity.
        """
        indices, counts = read_lists(self)
        last = self.last_blocks(counts.device)
        if not is_ordered(self) and lists.values_are_visible(indices):
            lists.examine(indices, counts, self.num_key_blocks, last)
        return lists.to_mask(indices, counts, self.num_key_blocks, last)

    def last_blocks(self, device: torch.device | str | None = None) -> Tensor:
        """The last key block that each row may see, int64 ``[B, Nq]`` or ``[1, Nq]``; -1 of rows without a query.

        Lists of query tokens without a span do not know their positions: that is the last of all there.
        """
        return _last_blocks(self.num_rows, self.num_key_blocks, self.block_size, self.by_token, self.span, device)

    def checked(self) -> BlockIndices:
        """The same sets in lists that ascend, hold each block once, and causal blocks only.

        Lists of this package (``from_mask``, policies, selections) that nobody has written into are returned as they
        are. Of others a copy is made, and their values are looked at, which waits for the device; under a CUDA graph
        capture or in ``torch.compile``, where nothing can be looked at, entries that are no key block are dropped and
        counts cut to the capacity. Whoever uses lists of their own many times calls this once.

        Writing into ``indices`` or ``counts`` is noticed: on the CPU, lists are looked at again once somebody has got
        hold of their tensors; elsewhere, as far as torch notices it (not through ``.data`` or a kernel of one's own).

        Raises:
            ValueError: an entry that is no key block, or a count outside of the capacity.
        """
        if is_ordered(self):
            return self
        given = read_lists(self)
        indices, counts = read_lists(clean_lists(self))
        if indices is given[0]:  # whose owner may write into it
            indices, counts = indices.clone(), counts.clone()
        return ordered_lists(indices, counts, self.num_key_blocks, self.block_size, self.by_token, self.span)

    def density(self) -> float:
        """Causal blocks on the lists over causal blocks, over all batch rows and heads (synchronises the device).

        Lists of query tokens without a span do not know their positions: all Nk blocks count as causal there. 1.0
        where there is no list. Raises as :meth:`checked` does.
        """
        counts = read_lists(self if is_ordered(self) else clean_lists(self))[1]
        last = self.last_blocks("cpu")
        causal = int((last + 1).expand(counts.shape[0], -1).sum()) * counts.shape[1]
        return int(counts.sum(dtype=torch.int64)) / causal if causal else 1.0


def check_span(
    shape: torch.Size, device: torch.device, num_key_blocks: int, block_size: int, by_token: bool, span: Span
) -> None:
    """Raise ValueError unless lists or a mask of ``shape [B, H, Nq, ...]`` are those of a span."""
    expected = span.batch, span.num_rows(block_size, by_token), span.num_key_blocks(block_size)
    if (shape[0], shape[2], num_key_blocks) != expected:
        raise ValueError(
            f"the span has {expected[0]} batch rows with {expected[1]} rows of lists over {expected[2]} key blocks of "
            f"{block_size} tokens, but the lists have {shape[0]} with {shape[2]} over {num_key_blocks}"
        )
    if span.table is not None and span.table.device != device:
        raise ValueError(f"the lists are on {device} but their span on {span.table.device}; use span.to()")


def _last_blocks(
    num_rows: int,
    num_key_blocks: int,
    block_size: int,
    by_token: bool,
    span: Span | None,
    device: torch.device | str | None,
) -> Tensor:
    """See :meth:`BlockIndices.last_blocks`."""
    if span is not None:
        return span.last_blocks(block_size, device, by_token)
    if by_token:
        return torch.full((1, num_rows), num_key_blocks - 1, dtype=torch.int64, device=device)
    return torch.arange(num_key_blocks - num_rows, num_key_blocks, device=device)[None]


def clean_lists(blocks: BlockIndices) -> BlockIndices:
    """The same sets in lists as :func:`ordered_lists` wants them, of the tensors given where these are so already.

    Raises:
        ValueError: as :meth:`BlockIndices.checked`.
    """
    indices, counts = read_lists(blocks)
    cleaned = lists.clean(indices, counts, blocks.num_key_blocks, blocks.last_blocks(counts.device))
    return ordered_lists(*cleaned, blocks.num_key_blocks, blocks.block_size, blocks.by_token, blocks.span)


# -- what is known of lists --------------------------------------------------------------------------------------------


class _Lent:
    """A tensor of :class:`BlockIndices`: who reads it may write into it, and that is remembered."""

    def __init__(self, name: str) -> None:
        self.name = f"_{name}"

    def __get__(self, instance: BlockIndices | None, owner: type | None = None) -> Tensor | _Lent:
        if instance is None:
            return self
        _lend(instance)
        return getattr(instance, self.name)

    def __set__(self, instance: BlockIndices, value: Tensor) -> None:
        object.__setattr__(instance, self.name, value)


# Fields of the dataclass first, so that they are plain ones to it and to type checkers.
for _field in ("indices", "counts"):
    setattr(BlockIndices, _field, _Lent(_field))


def ordered_lists(
    indices: Tensor,
    counts: Tensor,
    num_key_blocks: int,
    block_size: int,
    by_token: bool = False,
    span: Span | None = None,
) -> BlockIndices:
    """Lists that the package has made: ascending, each block once, causal, counts within the capacity, 0 where a row
    holds no query.

    Nobody checks that again. The tensors must be fresh: only this object may know them.
    """
    blocks = object.__new__(BlockIndices)  # without checks: this is called twice in every layer
    put = object.__setattr__
    put(blocks, "_indices", indices)
    put(blocks, "_counts", counts)
    put(blocks, "num_key_blocks", num_key_blocks)
    put(blocks, "block_size", block_size)
    put(blocks, "by_token", by_token)
    put(blocks, "span", span)
    put(blocks, "_order", True)
    return blocks


def read_lists(blocks: BlockIndices) -> tuple[Tensor, Tensor]:
    """``indices`` and ``counts`` for code of this package that only reads them: what is known of their order stays."""
    return blocks._indices, blocks._counts  # type: ignore[attr-defined]


def in_order(blocks: BlockIndices, span: Span) -> BlockIndices:
    """The lists as an implementation of an op gets them: in order, and with a span, the default one too.

    Raises:
        ValueError: as :meth:`BlockIndices.checked`.
    """
    ordered = is_ordered(blocks)
    if not ordered or blocks.span is not span:
        lists = read_lists(blocks)
        blocks = ordered_lists(*lists, blocks.num_key_blocks, blocks.block_size, blocks.by_token, span)
    return blocks if ordered else clean_lists(blocks)


def span_of(blocks: BlockIndices, q: Tensor, k: Tensor) -> Span:
    """The span of the lists, or the default one of ``q [B, Hq, Tq, D]`` and ``k [B, Hkv, Tk, D]``."""
    return Span(q.shape[0], q.shape[2], k.shape[2]) if blocks.span is None else blocks.span


def is_ordered(blocks: BlockIndices) -> bool:
    """Whether the lists are known to be as :func:`ordered_lists` says; costs nothing and waits for nothing."""
    known = blocks._order
    if known is None or known is True:
        return known is True
    # Of what a recorded graph reads, somebody who has got hold of it may change the values before a replay.
    return lists.values_are_visible(read_lists(blocks)[0]) and known == _versions(blocks)


def _lend(blocks: BlockIndices) -> None:
    """The tensors are about to be seen outside: from now on it is their versions that say whether they were changed.

    Tensors made in inference mode have no versions, so what is handed out there is a copy that has. In a trace nobody
    knows versions, and where looking at lists costs little they are not relied on: nothing is known any more.
    """
    if blocks._order is not True:
        return
    order: Any = None
    if not torch.compiler.is_compiling() and not _looking_costs_little(read_lists(blocks)[0]):
        for name in ("_indices", "_counts"):
            tensor = getattr(blocks, name)
            if tensor.is_inference():
                object.__setattr__(blocks, name, _with_version(tensor))
        order = _versions(blocks)
    object.__setattr__(blocks, "_order", order)


def _looking_costs_little(x: Tensor) -> bool:
    """On the CPU: nothing is waited for, and it takes half a percent of the time of attention at most."""
    return x.device.type == "cpu"


def _versions(blocks: BlockIndices) -> tuple[int, int]:
    indices, counts = read_lists(blocks)
    return indices._version, counts._version


def _with_version(x: Tensor) -> Tensor:
    """A copy that is no tensor of inference mode; what is expanded stays so."""
    with torch.inference_mode(False):
        once = [slice(0, 1) if step == 0 else slice(None) for step in x.stride()]
        return x[tuple(once)].clone().expand(x.shape)
