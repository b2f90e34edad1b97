"""What a decode gate keeps of the queries that it has seen: the encoded ones of the last tokens.

Plain torch, no Hugging Face, as the :class:`KeyState` that it lies beside. A token's query cannot be made again from a
cache, so what is forgotten is forgotten: where fewer tokens are held than a window has, the window is shorter.

Slots end with the last token: the last slot of every row is the last token of that row. How many tokens each row holds
is known to the host, so nothing here waits for a device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .state import HISTORY, Lengths, Rows, listed, on_device


class Recent(NamedTuple):
    """Encoded queries of the tokens of a step, and of those before them.

    Attributes:
        queries: ``[B, Hv, E + T, W]``, the T tokens last.
        held: of each row, how many of the E are its tokens, the last ones of them; None: all are.
    """

    queries: Tensor
    held: list[int] | None = None


class QueryState(Rows):
    """Encoded queries of the last tokens of the rows of a batch, which grow, shrink and change places.

    Attributes:
        window: tokens that choose together: a token and those before it.
        history: tokens that a crop can take back without making a window shorter.
        held: of each row, how many of its last tokens are here: never more than ``capacity``.
    """

    def __init__(self, window: int, history: int = HISTORY) -> None:
        if window < 1 or history < 0:
            raise ValueError(f"window must be positive and history not negative, got {window} and {history}")
        self.window = window
        self.history = history
        self.reset()

    def reset(self) -> None:
        """Forget every row."""
        self.held: list[int] = []
        self._queries: Tensor | None = None  # [B, Hv, S, W], S at least as many as the row with most tokens holds

    @property
    def capacity(self) -> int:
        """Tokens of a row that are kept; to encode more of a prompt is of no use."""
        return self.window - 1 + self.history

    @property
    def nbytes(self) -> int:
        """Memory that it takes."""
        return 0 if self._queries is None else self._queries.untyped_storage().nbytes()

    @property
    def last(self) -> Recent:
        """The last tokens, ``window - 1`` at most: what an append of nothing gives.

        Raises:
            ValueError: nothing was appended yet.
        """
        if self._queries is None:
            raise ValueError("the state holds no encoded query; append some first")
        return self._before(self._queries)

    def append(self, queries: Tensor, *, lengths: Lengths = None) -> Recent:
        """Take in the next tokens of every row.

        Args:
            queries: ``[B, Hv, T, W]``, encoded; T may be 0.
            lengths: tokens of each right-padded row, ``[B]``: integers, or a tensor, which is read (None: all T).

        Returns:
            These queries with up to ``window - 1`` tokens in front: what :meth:`DecodeGate.score_window` takes.

        Raises:
            ValueError: another batch size than before, or lengths that do not fit.
        """
        batch, width = len(queries), queries.shape[2]
        old, held = self._queries, self.held or [0] * batch
        if width == 1 and lengths is None and old is not None and held == [old.shape[2]] * batch:
            return self._append_one(old, queries)
        if batch != len(held):
            raise ValueError(f"the state holds {len(held)} rows, got queries of {batch}; reset, repeat or select first")
        counts = [width] * batch if lengths is None else listed(lengths)
        if len(counts) != batch or any(not 0 <= count <= width for count in counts):
            raise ValueError(f"lengths must be {batch} integers from 0 to {width}, got {counts}")
        if old is None or not any(held):
            old = queries[:, :, :0]
        before = self._before(old)
        more = min(old.shape[2], max(self.capacity - min(counts), before.queries.shape[2]))
        joined = torch.cat((old[:, :, old.shape[2] - more :], queries), 2)  # in memory of its own
        recent = Recent(joined[:, :, joined.shape[2] - width - before.queries.shape[2] :], before.held)
        self.held = [min(self.capacity, has + count) for has, count in zip(held, counts, strict=True)]
        self._queries = self._ending(joined, [width - count for count in counts])
        return recent

    def _append_one(self, old: Tensor, queries: Tensor) -> Recent:
        """The next token of every row, of which all slots are tokens: most steps of decoding."""
        size = old.shape[2]
        more = min(size, max(self.capacity, self.window) - 1)
        joined = torch.cat((old[:, :, size - more :] if more < size else old, queries), 2)
        kept, end = min(self.capacity, size + 1), more + 1
        self.held, self._queries = [kept] * len(self.held), joined[:, :, end - kept :]
        return Recent(joined[:, :, max(0, end - self.window) :])

    def crop(self, removed: int | Lengths) -> None:
        """Forget the last tokens of each row: so many of all rows, or of each. Rows may lose all that they hold.

        Raises:
            ValueError: negative numbers, or not one for each row.
        """
        gone = [removed] * len(self.held) if isinstance(removed, int) else listed(removed)
        if len(gone) != len(self.held) or any(x < 0 for x in gone):
            raise ValueError(f"a crop takes back 0 tokens or more of each of {len(self.held)} rows, got {gone}")
        self.held = [max(0, has - x) for has, x in zip(self.held, gone, strict=True)]
        if self._queries is not None:
            self._queries = self._ending(self._queries, gone)

    @property
    def num_rows(self) -> int:
        """How many rows it holds."""
        return len(self.held)

    def select(self, index: Sequence[int] | Tensor) -> None:
        """Keep the rows of an index ``[B']``, in its order; a row may be taken several times."""
        alike = len(set(self.held)) == 1  # an index on a device is not read then
        self.held = self.held[:1] * len(index) if alike else [self.held[row] for row in listed(index)]
        if self._queries is not None:
            self._queries = self._queries.index_select(0, on_device(self._queries.device, index))

    def _before(self, queries: Tensor) -> Recent:
        """The last ``window - 1`` slots of ``queries``, or as many as the row with most tokens holds."""
        size = min(self.window - 1, max(self.held, default=0))
        held = [min(size, has) for has in self.held]
        return Recent(queries[:, :, queries.shape[2] - size :], None if held.count(size) == len(held) else held)

    def _ending(self, queries: Tensor, gone: list[int]) -> Tensor:
        """The slots that rows hold, without the last ``gone`` of each: those of the row with most, and no more than a
        few others in the same memory."""
        size, width = max(self.held), queries.shape[2]
        if gone.count(gone[0]) == len(gone):
            end = max(size, width - gone[0])
            kept = queries[:, :, end - size : end]
            return kept if width <= self.capacity + 1 else kept.clone()
        ends = width - torch.tensor(gone)
        slots = (ends[:, None] + torch.arange(-size, 0)).clamp(0, width - 1)
        rows, slots = on_device(queries.device, torch.stack((torch.arange(len(gone))[:, None].expand_as(slots), slots)))
        return queries.transpose(1, 2)[rows, slots].transpose(1, 2).contiguous()
