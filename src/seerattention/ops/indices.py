"""Block indices: which key blocks each query block reads. The one data structure that every op shares.

Geometry, for queries that are the last ``Tq`` of ``Tk`` positions (``Tq == Tk`` for a whole prompt):

* blocks are cut at multiples of ``block_size`` of the *key* positions, so a chunk of a prompt sees the same grid as
  the whole prompt does;
* row ``r`` of the lists is the absolute query block ``first_query_block(Tq, Tk, block_size) + r``; the first and the
  last row may be partial;
* a query block sees the key blocks up to and including its own (*causal blocks*); inside its own (the *diagonal*
  block) the ordinary causal mask applies, token by token.

A list stands for the *set* of its causal blocks. The kernels take it ascending, each block once, and no block of the
future. Lists that this package makes are so (:func:`ordered_lists`) and nothing is spent on them; lists that come from
outside are brought into this form by :func:`clean_lists` before anything is computed or counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

# Entries that are looked at together when lists are cleaned: 2^24 take some 0.5 GiB of temporary memory.
CHUNK_ENTRIES = 1 << 24


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

    ``H`` is the number of query heads, or of KV heads when a whole group of query heads shares a list.
    Query blocks are the last ``Nq`` of the ``Nk`` key blocks.

    Raises:
        ValueError: shapes that do not fit. Entries that are no key block, and counts that are negative or above the
            capacity, raise where the lists are first used.
        TypeError: dtypes other than int32.
    """

    indices: Tensor
    counts: Tensor
    num_key_blocks: int
    block_size: int = 64
    by_token: bool = False

    # What is known of the order of the lists. None: nothing. True: they are the package's own (``ordered_lists``) and
    # nobody outside has seen their tensors. Two numbers: they were, when the tensors had these versions.
    _order: ClassVar[Any] = None

    def __post_init__(self) -> None:
        indices, counts = read_lists(self)
        if indices.dim() != 4 or counts.shape != indices.shape[:3]:
            raise ValueError(
                f"indices must be [B, H, Nq, capacity] and counts [B, H, Nq], got {tuple(indices.shape)} "
                f"and {tuple(counts.shape)}"
            )
        if indices.dtype != torch.int32 or counts.dtype != torch.int32:
            raise TypeError(f"indices and counts must be int32, got {indices.dtype} and {counts.dtype}")
        if not self.by_token and self.num_rows > self.num_key_blocks:
            raise ValueError(f"got {self.num_rows} query blocks but only {self.num_key_blocks} key blocks")

    def __getstate__(self) -> dict[str, Any]:
        """A copy shares the tensors, or has others: what was known of their order stays behind."""
        _lend(self)
        return {name: value for name, value in vars(self).items() if name != "_order"}

    @property
    def num_rows(self) -> int:
        """Nq, the number of query blocks."""
        return read_lists(self)[1].shape[2]

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
        return ordered_lists(*_pack(mask, num_keys), num_keys, block_size)

    def to_mask(self) -> Tensor:
        """Bool ``[B, H, Nq, Nk]``: True where the causal key block is on the list.

        Raises:
            ValueError: an entry that is no key block, or a count outside of the capacity.
        """
        indices, counts = read_lists(self)
        if not is_ordered(self) and _values_are_visible(indices):
            _examine(indices, counts, self.num_key_blocks, self.by_token)
        seen = _last_seen(slice(0, self.num_rows), counts, self.num_key_blocks, self.by_token)
        return _causal_set(indices, counts, seen, self.num_key_blocks)

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
        indices, counts = clean_lists(*given, self.num_key_blocks, self.by_token)
        if indices is given[0]:  # whose owner may write into it
            indices, counts = indices.clone(), counts.clone()
        return ordered_lists(indices, counts, self.num_key_blocks, self.block_size, self.by_token)

    def density(self) -> float:
        """Causal blocks on the lists over causal blocks, over all batch rows and heads (synchronises the device).

        Lists of query tokens do not know their positions: all Nk blocks count as causal there. 1.0 where there is no
        list. Raises as :meth:`checked` does.
        """
        counts = read_lists(self)[1]
        batch, heads, rows = counts.shape
        seen = [self.num_key_blocks] * rows if self.by_token else range(self.first_row + 1, self.num_key_blocks + 1)
        causal = batch * heads * sum(seen)
        if not is_ordered(self):
            counts = clean_lists(*read_lists(self), self.num_key_blocks, self.by_token)[1]
        return int(counts.sum(dtype=torch.int64)) / causal if causal else 1.0


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
    indices: Tensor, counts: Tensor, num_key_blocks: int, block_size: int, by_token: bool = False
) -> BlockIndices:
    """Lists that the package has made: ascending, each block once, causal, counts within the capacity.

    Nobody checks that again. The tensors must be fresh: only this object may know them.
    """
    blocks = object.__new__(BlockIndices)  # without checks: this is called twice in every layer
    put = object.__setattr__
    put(blocks, "_indices", indices)
    put(blocks, "_counts", counts)
    put(blocks, "num_key_blocks", num_key_blocks)
    put(blocks, "block_size", block_size)
    put(blocks, "by_token", by_token)
    put(blocks, "_order", True)
    return blocks


def read_lists(blocks: BlockIndices) -> tuple[Tensor, Tensor]:
    """``indices`` and ``counts`` for code of this package that only reads them: what is known of their order stays."""
    return blocks._indices, blocks._counts  # type: ignore[attr-defined]


def is_ordered(blocks: BlockIndices) -> bool:
    """Whether the lists are known to be as :func:`ordered_lists` says; costs nothing and waits for nothing."""
    known = blocks._order
    if known is None or known is True:
        return known is True
    # Of what a recorded graph reads, somebody who has got hold of it may change the values before a replay.
    return _values_are_visible(read_lists(blocks)[0]) and known == _versions(blocks)


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


# -- lists from outside ------------------------------------------------------------------------------------------------


@torch.no_grad()
def clean_lists(indices: Tensor, counts: Tensor, num_key_blocks: int, by_token: bool = False) -> tuple[Tensor, Tensor]:
    """Lists of the same causal blocks, ascending and each block once; those given, where they are so already.

    Args:
        indices, counts, num_key_blocks, by_token: as of :class:`BlockIndices`. Rows that are query tokens keep blocks
            of the future: which these are only the op knows.

    Returns:
        int32 ``[B, H, Nq, capacity]``, the capacity at most Nk where lists had to be made, and int32 ``[B, H, Nq]``.

    Raises:
        ValueError: an entry that is no key block, or a count outside of the capacity; not under a CUDA graph capture
            or in a trace, where such entries are dropped and such counts cut.
    """
    if _values_are_visible(indices) and _examine(indices, counts, num_key_blocks, by_token):
        return indices, counts
    width = min(indices.shape[-1], num_key_blocks)
    clean = indices.new_empty(*counts.shape, width)
    clean_counts = counts.new_empty(counts.shape)
    for rows in _chunks(counts, max(num_key_blocks, indices.shape[-1])):
        seen = _last_seen(rows, counts, num_key_blocks, by_token)
        mask = _causal_set(indices[:, :, rows], counts[:, :, rows], seen, num_key_blocks)
        clean[:, :, rows], clean_counts[:, :, rows] = _pack(mask, width)
    return clean, clean_counts


def _values_are_visible(x: Tensor) -> bool:
    """Whether the host may look at values: not while a graph is traced or recorded."""
    if x.device.type == "meta" or torch.compiler.is_compiling():
        return False
    return x.device.type != "cuda" or not torch.cuda.is_current_stream_capturing()


def _chunks(counts: Tensor, width: int) -> Iterator[slice]:
    """Rows to look at together, of ``width`` entries in each list."""
    batch, heads, rows = counts.shape
    step = max(1, CHUNK_ENTRIES // max(1, batch * heads * width))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _last_seen(rows: slice, counts: Tensor, num_key_blocks: int, by_token: bool) -> Tensor:
    """The last key block that these rows may see, ``[rows, 1]``: their own, or any block of a query token."""
    if by_token:
        return torch.full((rows.stop - rows.start, 1), num_key_blocks - 1, dtype=torch.int64, device=counts.device)
    first = num_key_blocks - counts.shape[2]
    return torch.arange(first + rows.start, first + rows.stop, device=counts.device)[:, None]


def _examine(indices: Tensor, counts: Tensor, num_key_blocks: int, by_token: bool) -> bool:
    """Whether lists are as :func:`ordered_lists` says. Waits for the device; raises ValueError where none can be."""
    capacity = indices.shape[-1]
    slots = torch.arange(capacity, device=indices.device)
    found = torch.zeros(3, dtype=torch.bool, device=indices.device)
    found[0] = ((counts < 0) | (counts > capacity)).any()
    for rows in _chunks(counts, capacity):
        entries, listed = indices[:, :, rows], slots < counts[:, :, rows, None]
        future = entries > _last_seen(rows, counts, num_key_blocks, by_token)
        unordered = (entries[..., 1:] <= entries[..., :-1]) & listed[..., 1:]
        found[1] |= (listed & _no_block(entries, num_key_blocks)).any()
        found[2] |= (listed & future).any() | unordered.any()
    count_is_wrong, entry_is_wrong, out_of_order = found.tolist()
    if count_is_wrong:
        b, h, row = ((counts < 0) | (counts > capacity)).nonzero()[0].tolist()
        raise ValueError(
            f"BlockIndices: counts[{b}, {h}, {row}] is {int(counts[b, h, row])}, but a list has room for 0 to "
            f"{capacity} entries (the last dimension of indices); correct counts, or give indices more room"
        )
    if entry_is_wrong:
        _raise_for_entry(indices, counts, num_key_blocks)
    return not out_of_order


def _no_block(entries: Tensor, num_key_blocks: int) -> Tensor:
    return (entries < 0) | (entries >= num_key_blocks)


def _raise_for_entry(indices: Tensor, counts: Tensor, num_key_blocks: int) -> None:
    slots = torch.arange(indices.shape[-1], device=indices.device)
    for rows in _chunks(counts, indices.shape[-1]):
        wrong = (slots < counts[:, :, rows, None]) & _no_block(indices[:, :, rows], num_key_blocks)
        if bool(wrong.any()):
            b, h, row, slot = wrong.nonzero()[0].tolist()
            row += rows.start
            raise ValueError(
                f"BlockIndices: indices[{b}, {h}, {row}, {slot}] is {int(indices[b, h, row, slot])}, but the key "
                f"blocks are 0 to {num_key_blocks - 1}; what is not to be read belongs past counts[{b}, {h}, {row}]"
            )


def _causal_set(indices: Tensor, counts: Tensor, last_seen: Tensor, num_key_blocks: int) -> Tensor:
    """Bool ``[B, H, rows, Nk]``: the blocks on the lists that are not after ``last_seen [rows, 1]``."""
    slots = torch.arange(indices.shape[-1], device=indices.device)
    listed = (slots < counts[..., None]) & (indices >= 0) & (indices <= last_seen)
    # What is not listed goes to one spare place, which is cut off.
    place = torch.where(listed, indices, num_key_blocks).long()
    mask = torch.zeros((*counts.shape, num_key_blocks + 1), dtype=torch.bool, device=indices.device)
    return mask.scatter_(-1, place, True)[..., :num_key_blocks]


def _pack(mask: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """Lists of the blocks of a bool mask ``[B, H, rows, Nk]``, none with more than ``capacity``, and their counts."""
    num_keys = mask.shape[-1]
    # Unselected entries all go to one spare slot, which is cut off.
    slot = torch.where(mask, mask.cumsum(-1) - 1, capacity)
    indices = torch.full((*mask.shape[:3], capacity + 1), -1, dtype=torch.int32, device=mask.device)
    blocks = torch.arange(num_keys, dtype=torch.int32, device=mask.device).expand(mask.shape)
    indices.scatter_(-1, slot, blocks)
    return indices[..., :capacity], mask.sum(-1, dtype=torch.int32)
