"""What a gate keeps of the keys that it has seen: one encoded vector a block, and the last tokens as they came.

Plain torch, no Hugging Face: a cache layer or the pages of an engine hold it.

Why the last tokens are kept raw (keys before RoPE) instead of a running maximum, minimum and sum: those cannot be
undone, and generation takes tokens back all the time (rejected candidates, turns that are edited). Pooled anew from the
same tokens, an open block is what it would have been, whatever was appended and cropped before. ``history`` tokens and
the open block are kept. Cropping further back, into a block whose tokens are gone, takes them from the caller, who can
turn the keys of its cache back by the rotary table.

How many tokens each row holds is known to the host, so nothing here waits for a device.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..ops.span import num_blocks

HISTORY = 64
"""Tokens that a crop can always take back, by default."""

Lengths = Sequence[int] | Tensor | None
# keys [B, Hkv, T, D], rotary tables [B or 1, N, rotary_dim] at block starts or None, lengths int64 [B] or None
# -> encoded [B, H, N, W]
Encode = Callable[[Tensor, Tensor | None, Tensor | None, Tensor | None], Tensor]


class Rows(ABC):
    """The rows of a batch, of which a state keeps something: how they change places."""

    @property
    @abstractmethod
    def num_rows(self) -> int:
        """How many rows it holds."""

    @abstractmethod
    def select(self, index: Sequence[int] | Tensor) -> None:
        """Keep the rows of an index ``[B']``, in its order; a row may be taken several times."""

    def reorder(self, index: Sequence[int] | Tensor) -> None:
        """Row i becomes what row ``index[i]`` was; as many rows as before (beam search)."""
        if len(index) != self.num_rows:
            raise ValueError(f"an order of {self.num_rows} rows has as many entries, got {len(index)}; see select")
        self.select(index)

    def repeat(self, times: int) -> None:
        """Every row becomes ``times`` rows that follow each other."""
        self.select([row for row in range(self.num_rows) for _ in range(times)])


class KeyState(Rows):
    """Encoded keys of the rows of a batch, which grow, shrink and change places.

    Attributes:
        pitch: tokens a block.
        history: tokens before the last one that are kept as they came, beside the open block.
        lengths: tokens of each row.
    """

    def __init__(self, pitch: int, history: int = HISTORY) -> None:
        if pitch < 1 or history < 0:
            raise ValueError(f"pitch must be positive and history not negative, got {pitch} and {history}")
        self.pitch = pitch
        self.history = history
        self.reset()

    def reset(self) -> None:
        """Forget every row."""
        self.lengths: list[int] = []
        self._blocks: Tensor | None = None  # [B, H, capacity, W]
        self._open_encoded = True  # whether the vectors of open blocks are among them
        # Tokens of each row from _first on, a multiple of the pitch: keys [B, Hkv, S, D]; cos and sin at their blocks'
        # first tokens, side by side: [B or 1, 1, ceil(S / pitch), 2 * rotary_dim].
        self._first: list[int] = []
        self._joined: Tensor | None = None
        self._single: list[Tensor] = []  # the tokens behind these, one by one: they are put together when they are read
        self._room: int | None = 0  # see ``room``; None: not known
        self._starts: Tensor | None = None

    # ---- what it holds -------------------------------------------------------------------------------------------

    @property
    def encoded(self) -> Tensor:
        """``[B, H, N, W]``, the blocks of the longest row, open ones too; behind a row's own last block undefined.

        Raises:
            ValueError: nothing has been encoded yet, or open blocks have not been since they changed.
        """
        if not self._open_encoded:
            raise ValueError(
                "the open blocks of this state are not encoded, after a crop or an append with only_complete; append "
                "the next tokens (none, [B, Hkv, 0, D], will do) or read `complete`"
            )
        return self._vectors()[:, :, : num_blocks(max(self.lengths), self.pitch)]

    @property
    def complete(self) -> Tensor:
        """``[B, H, N, W]``, the complete blocks of the longest row; behind a row's own undefined.

        Raises:
            ValueError: nothing has been encoded yet.
        """
        return self._vectors()[:, :, : max(self.lengths) // self.pitch]

    def _vectors(self) -> Tensor:
        if self._blocks is None:
            raise ValueError("the state holds no encoded block; append keys first")
        return self._blocks

    @property
    def vectors(self) -> Tensor | None:
        """``[B, H, capacity, W]``: all that :attr:`complete` is the first part of; None: nothing is encoded."""
        return self._blocks

    @property
    def nbytes(self) -> int:
        """Memory that it takes, room to grow included."""
        return sum(x.nbytes for x in (self._blocks, self._joined, self._starts, *self._single) if x is not None)

    @property
    def _tokens(self) -> Tensor | None:
        if self._single:
            assert self._joined is not None
            self._joined, self._single = torch.cat((self._joined, *self._single), 2), []
        return self._joined

    @_tokens.setter
    def _tokens(self, tokens: Tensor | None) -> None:
        self._joined, self._single, self._room = tokens, [], None

    # ---- growing and shrinking -----------------------------------------------------------------------------------

    def append(
        self,
        keys: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        *,
        encode: Encode,
        lengths: Lengths = None,
        only_complete: bool = False,
    ) -> None:
        """Take in the next tokens of every row; the blocks that they begin, continue or complete are encoded.

        Args:
            keys: ``[B, Hkv, T, D]`` before RoPE; T may be 0.
            cos, sin: ``[B or 1, T, rotary_dim]``, the rotary table at these tokens; None: a gate without one.
            encode: makes the vectors; keys begin with a block.
            lengths: tokens of each right-padded row, ``[B]``: integers, or a tensor, which is read (None: all T).
            only_complete: leave out open blocks, which saves encoding them anew with every token.

        Raises:
            ValueError: another batch size than before, or lengths that do not fit.
        """
        batch, _, width, _ = keys.shape
        if width == 1 and lengths is None and only_complete and len(self.lengths) == batch and self.room:
            self.append_inside_a_block(keys.clone())
            return
        before, first = self.lengths or [0] * batch, self._first or [0] * batch
        if batch != len(before):
            raise ValueError(f"the state holds {len(before)} rows, got keys of {batch}; reset, repeat or select first")
        counts = [width] * batch if lengths is None else listed(lengths)
        if len(counts) != batch or any(not 0 <= count <= width for count in counts):
            raise ValueError(f"lengths must be {batch} integers from 0 to {width}, got {counts}")
        after = [length + count for length, count in zip(before, counts, strict=True)]
        # Positions are tokens or, where a name says so, blocks.
        begins = [length // self.pitch * self.pitch for length in before]
        ends = [length // self.pitch * self.pitch for length in after] if only_complete else after
        history = [(length - self.history) // self.pitch * self.pitch for length in after]
        kept = [max(old, new) for old, new in zip(first, history, strict=True)]
        new_starts = self._new_starts(cos, sin, before, after)

        def starts(begins: list[int], ends: list[int]) -> Tensor | None:
            if new_starts is None:
                return None
            known, new = self._blocks_of(first), self._blocks_of(before)
            return _cut(self._starts, known, new_starts, new, self._blocks_of(begins), self._blocks_of(ends))

        if any(end > begin for begin, end in zip(begins, ends, strict=True)):
            window = _cut(self._tokens, first, keys, before, begins, ends)
            sizes = [end - begin for begin, end in zip(begins, ends, strict=True)]
            vectors = _encoded(encode, window, starts(begins, ends), sizes)
            self._write(vectors, self._blocks_of(begins), self._blocks_of(sizes))
        self._starts = _own(starts(kept, after), keys)
        self._tokens = _own(_cut(self._tokens, first, keys, before, kept, after), keys)
        self._open_encoded = not only_complete or all(length % self.pitch == 0 for length in after)
        self.lengths, self._first = after, kept
        self._room = None

    def append_inside_a_block(self, keys: Tensor) -> None:
        """:meth:`append` of one token of every row with ``only_complete``, where there is :attr:`room`: nothing is
        encoded, nor copied.

        Args:
            keys: ``[B, Hkv, 1, D]`` before RoPE, in memory that stays as it is.
        """
        assert self._room
        self._single.append(keys)
        self._room -= 1
        self.lengths, self._open_encoded = [length + 1 for length in self.lengths], False

    @property
    def room(self) -> int:
        """How many tokens of every row neither begin nor complete a block, and make it forget nothing: most steps of
        decoding."""
        if self._room is None:
            self._room = self._find_room()
        return self._room

    def _find_room(self) -> int:
        rows = len(self.lengths)
        if self._joined is None or rows == 0 or len(self._joined) != rows:
            return 0
        length, first = self.lengths[0], self._first[0]
        held = self._joined.shape[2] + len(self._single)
        if held != length - first or self.lengths.count(length) < rows or self._first.count(first) < rows:
            return 0  # a crop leaves tokens that it forgets
        begun = length % self.pitch
        forgets = first + self.pitch + self.history - 1
        return max(0, min(self.pitch - 1 - begun, forgets - length)) if begun else 0

    def crop(
        self,
        lengths: int | Lengths,
        *,
        keys: Tensor | None = None,
        cos: Tensor | None = None,
        sin: Tensor | None = None,
    ) -> None:
        """Forget the tokens of each row from a position on.

        Args:
            lengths: tokens that stay: of all rows, or of each.
            keys: ``[B, Hkv, S, D]`` before RoPE, the first S tokens of the block that is then open in each row, S being
                at least as many as it holds; needed where :meth:`crop_needs_keys` says so.
            cos, sin: ``[B or 1, S, rotary_dim]``, the rotary table at these tokens.

        Raises:
            ValueError: lengths that are not from 0 to those of the rows, or keys that are needed and not given.
        """
        left = self._left(lengths)
        if keys is not None:
            begins = [length // self.pitch * self.pitch for length in left]
            if len(keys) != len(left) or keys.shape[2] < max(x - y for x, y in zip(left, begins, strict=True)):
                raise ValueError(
                    f"keys must hold the open blocks of {len(left)} rows, up to tokens {left}, got {tuple(keys.shape)}"
                )
            self._tokens, self._first = keys.clone(), begins
            self._starts = None if cos is None or sin is None else torch.cat((cos, sin), -1)[:, None, :1]
        elif self.crop_needs_keys(left):
            raise ValueError(
                f"a crop to {left} opens blocks of which the state no longer has the tokens (it has those from "
                f"{self._first} on); pass keys, cos and sin of these blocks, or crop to multiples of {self.pitch}"
            )
        changed = any(x != y and x % self.pitch for x, y in zip(left, self.lengths, strict=True))
        closed = all(x % self.pitch == 0 for x in left)
        self._open_encoded = closed or (self._open_encoded and not changed)
        self._room = None
        self.lengths, self._first = left, [min(x, y) for x, y in zip(self._first, left, strict=True)]

    def crop_needs_keys(self, lengths: int | Lengths) -> bool:
        """Whether a crop to these lengths opens blocks whose tokens the state no longer has."""
        left = self._left(lengths)
        return any(x % self.pitch and x // self.pitch * self.pitch < y for x, y in zip(left, self._first, strict=True))

    def _left(self, lengths: int | Lengths) -> list[int]:
        left = [lengths] * len(self.lengths) if isinstance(lengths, int) else listed(lengths)
        if len(left) != len(self.lengths) or any(not 0 <= x <= y for x, y in zip(left, self.lengths, strict=True)):
            raise ValueError(f"rows of {self.lengths} tokens cannot be cropped to {left}")
        return left

    # ---- rows ----------------------------------------------------------------------------------------------------

    @property
    def num_rows(self) -> int:
        """How many rows it holds."""
        return len(self.lengths)

    def select(self, index: Sequence[int] | Tensor) -> None:
        """Keep the rows of an index ``[B']``, in its order; a row may be taken several times."""
        if len(set(zip(self.lengths, self._first, strict=True))) == 1:  # all alike: an index on a device is not read
            chosen = [0] * len(index)
        else:
            chosen = listed(index)
        self.lengths, self._first = [self.lengths[row] for row in chosen], [self._first[row] for row in chosen]
        self._room = None
        for name in ("_blocks", "_tokens", "_starts"):
            x = getattr(self, name)
            if x is not None and not (name == "_starts" and len(x) == 1):  # one table serves all rows
                setattr(self, name, x.index_select(0, on_device(x.device, index)))

    # ---- parts ---------------------------------------------------------------------------------------------------

    def _blocks_of(self, positions: list[int]) -> list[int]:
        """Blocks that begin before each position."""
        return [num_blocks(position, self.pitch) for position in positions]

    def _new_starts(self, cos: Tensor | None, sin: Tensor | None, before: list[int], after: list[int]) -> Tensor | None:
        """Tables at the first tokens of the blocks that begin with an append, ``[B or 1, 1, N, 2 * rotary_dim]``."""
        if cos is None or sin is None:
            return None
        skips = [-length % self.pitch for length in before]
        if len(set(skips)) == 1:
            return torch.cat([table[:, None, skips[0] :: self.pitch] for table in (cos, sin)], -1)
        count = max(y - x for x, y in zip(self._blocks_of(before), self._blocks_of(after), strict=True))
        places = torch.tensor(skips)[:, None] + torch.arange(count) * self.pitch
        return torch.cat([_gather(table[:, None], places, len(before)) for table in (cos, sin)], -1)

    def _write(self, vectors: Tensor, begins: list[int], counts: list[int]) -> None:
        """Put the first ``counts`` vectors of each row into its blocks from ``begins`` on."""
        needed = max(x + y for x, y in zip(begins, counts, strict=True))
        if self._blocks is None or self._blocks.shape[2] < needed:
            old, self._blocks = self._blocks, None
            capacity = needed if old is None else max(needed, old.shape[2] + old.shape[2] // 2)
            grown = vectors.new_empty(*vectors.shape[:2], capacity, vectors.shape[3])
            if old is not None:
                grown[:, :, : old.shape[2]] = old
            self._blocks = grown
        if len(set(zip(begins, counts, strict=True))) == 1:
            self._blocks[:, :, begins[0] : begins[0] + counts[0]] = vectors
            return
        rows, places = (torch.arange(vectors.shape[2]) < torch.tensor(counts)[:, None]).nonzero(as_tuple=True)
        targets = places + torch.tensor(begins)[rows]
        rows, places, targets = on_device(vectors.device, torch.stack((rows, places, targets)))
        self._blocks.transpose(1, 2)[rows, targets] = vectors.transpose(1, 2)[rows, places].to(self._blocks.dtype)


def _encoded(encode: Encode, keys: Tensor, starts: Tensor | None, sizes: list[int]) -> Tensor:
    """Vectors of the first ``sizes`` tokens of each row."""
    cos, sin = (None, None) if starts is None else starts[:, 0].chunk(2, -1)
    lengths = None if set(sizes) == {keys.shape[2]} else on_device(keys.device, sizes)
    return encode(keys, cos, sin, lengths)


def _cut(
    old: Tensor | None, old_first: list[int], new: Tensor, new_first: list[int], begins: list[int], ends: list[int]
) -> Tensor:
    """``[B, H, S, D]``: positions ``begins .. ends`` of each row, undefined behind a row's end.

    Old holds those from ``old_first`` up to ``new_first``, new those from there on.
    """
    if len(set(zip(old_first, new_first, begins, ends, strict=True))) == 1:
        first, at, begin, behind = old_first[0], new_first[0], begins[0], ends[0]
        parts = []
        if begin < min(at, behind) and old is not None:
            parts.append(old[:, :, begin - first : min(at, behind) - first])
        if behind > max(at, begin) or not parts:
            parts.append(new[:, :, max(at, begin) - at : behind - at])
        if len(parts) == 1:
            return parts[0]
        rows = max(len(part) for part in parts)
        return torch.cat([part.expand(rows, -1, -1, -1) for part in parts], 2)
    known, fresh, wanted, end = (torch.tensor(x)[:, None] for x in (old_first, new_first, begins, ends))
    source, width = new, 0
    if old is not None:
        rows, width = max(len(old), len(new)), old.shape[2]
        source = torch.cat((old.expand(rows, -1, -1, -1), new.expand(rows, -1, -1, -1)), 2)
    positions = wanted + torch.arange(int((end - wanted).max()))
    places = torch.where(positions < fresh, positions - known, width + positions - fresh)
    return _gather(source, places.clamp(0, max(0, source.shape[2] - 1)), len(begins))


def _own(x: Tensor | None, given: Tensor) -> Tensor | None:
    """The same in memory of its own: a view would keep all keys of a long prompt, or change with the caller's."""
    if x is None:
        return None
    storage = x.untyped_storage()
    if storage.nbytes() == x.nbytes and storage.data_ptr() != given.untyped_storage().data_ptr():
        return x
    return x.clone()


def _gather(x: Tensor, places: Tensor, batch: int) -> Tensor:
    """``x [B or 1, H, T, D]`` at ``places [B, S]`` of each row -> ``[B, H, S, D]``."""
    places = places.clamp(max=x.shape[2] - 1)
    rows = torch.arange(batch)[:, None].expand_as(places) if len(x) > 1 else torch.zeros_like(places)
    rows, places = on_device(x.device, torch.stack((rows, places)))
    return x.transpose(1, 2)[rows, places].transpose(1, 2)


def listed(values: Lengths) -> list[int]:
    return values.tolist() if isinstance(values, Tensor) else [int(value) for value in values or ()]


def on_device(device: torch.device, values: Sequence[int] | Tensor) -> Tensor:
    """Integers of the host on a device, without waiting for it."""
    x = values if isinstance(values, Tensor) else torch.tensor(values, dtype=torch.int64)
    if device.type == "cuda" and x.device.type == "cpu":
        x = x.pin_memory()
    return x.to(device, non_blocking=True)
