"""What the 2-D and the 1-D op of this directory share: what may be asked of them, and the checks of it."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from .. import dispatch
from ..span import KEY_SLOT, LENGTH, QUERY_SLOT, START, Span

REDUCTIONS = ("max", "sum", "row_sum")
NO_SPAN = Span(0, 0, 0)


class Wanted(NamedTuple):
    """What is asked of an implementation, checked; every one is called with ``q, k, rows`` and this.

    The public functions of both ops say what each field means. ``rows`` are rows of the span: query blocks (or tokens)
    counted from the first one of each batch row; ``first_row`` is what the caller counted them from.
    """

    block_size: int
    scale: float
    reduce: str
    normalize: bool
    lse: Tensor | None
    span: Span = NO_SPAN
    first_row: int = 0

    @property
    def divides_by_sum(self) -> bool:
        """Whether rows are divided by their sum; those of ``sum`` are divided by how many queries they add up."""
        return self.normalize and self.reduce != "sum"


def check_arguments(
    op: str,
    q: Tensor,
    k: Tensor,
    rows: Tensor | None,
    lengths: Tensor | None,
    span: Span | None,
    wanted: Wanted,
) -> tuple[Tensor, Tensor | None, Wanted]:
    """Check all arguments but the block size and the values of ``rows``.

    Args:
        op: for messages.
        q, k, rows, lengths, span: as given.
        wanted: the rest, as given.

    Returns:
        k without pages, rows on the device of q, and what is wanted, completed.

    Raises:
        ValueError: shapes that do not fit, an unknown reduction, a scale of 0 or less, lengths and a span.
        TypeError: unsupported dtypes.
    """
    lse = wanted.lse
    dispatch.check_query_key(op, q, k, with_span=span is not None)
    if wanted.reduce not in REDUCTIONS:
        raise ValueError(f"{op}: reduce must be one of {REDUCTIONS}, got {wanted.reduce!r}")
    if rows is not None and (rows.dim() != 1 or rows.dtype != torch.int64):
        raise ValueError(f"{op}: rows must be int64 [R], got {rows.dtype} {tuple(rows.shape)}")
    if not wanted.scale > 0:
        raise ValueError(f"{op}: scale must be positive, got {wanted.scale}")
    if lse is not None and (lse.shape != q.shape[:3] or lse.dtype != torch.float32 or lse.device != q.device):
        raise ValueError(
            f"{op}: lse must be float32 {list(q.shape[:3])} on {q.device}, got {lse.dtype} {list(lse.shape)} on "
            f"{lse.device}"
        )
    if span is None:
        span = _span_of_lengths(op, q, k, lengths)
    elif lengths is not None:
        raise ValueError(f"{op}: pass lengths or a span, not both; a span holds the lengths of its rows")
    span.check(op, q, k, wanted.block_size)
    if span.pages is not None:  # targets are of training, not of serving: pages are put in order first
        k, span = _without_pages(k, span)
    return k, None if rows is None else rows.to(q.device), wanted._replace(span=span)


def _without_pages(k: Tensor, span: Span) -> tuple[Tensor, Span]:
    """Keys in pages as rows of slots, one behind the other where rows are packed."""
    assert span.table is not None
    k, table = span.gather_keys(k), span.table.clone()
    table[:, KEY_SLOT] = 0
    if span.packed:
        table[:, KEY_SLOT] = torch.arange(span.batch, device=k.device) * span.keys
        k = k.transpose(0, 1).flatten(1, 2)[None]
    return k, dataclasses.replace(span, table=table, pages=None)


def _span_of_lengths(op: str, q: Tensor, k: Tensor, lengths: Tensor | None) -> Span:
    """The last Tq of Tk slots of right-padded rows."""
    if lengths is not None:
        if lengths.shape != q.shape[:1] or lengths.is_floating_point():
            raise ValueError(
                f"{op}: lengths must be integers [{q.shape[0]}], got {lengths.dtype} {tuple(lengths.shape)}"
            )
        lengths = lengths.to(q.device, torch.int64).clamp(max=k.shape[2])
    return Span.of_padded(q.shape[0], q.shape[2], k.shape[2], lengths)


class Content(NamedTuple):
    """Where the queries and keys of one batch row lie: its row in memory, and the columns of the table of its span."""

    memory: int
    query_slot: int
    start: int
    length: int
    key_slot: int

    @property
    def end(self) -> int:
        """Position behind the last query; the number of keys."""
        return self.start + self.length


def content_rows(span: Span) -> list[Content]:
    """For implementations that go row by row."""
    columns = [span.column(index).tolist() for index in (QUERY_SLOT, START, LENGTH, KEY_SLOT)]
    memory = [0] * span.batch if span.packed else range(span.batch)
    return [Content(*values) for values in zip(memory, *columns, strict=True)]


def check_range(op: str, rows: Tensor, num_rows: int, first_row: int, what: str) -> None:
    """Raise ValueError unless all ``rows`` lie in ``[0, num_rows)``, which ``what`` says in words.

    This reads values, and so would wait for a device: it is made on the CPU only.
    """
    if rows.device.type != "cpu" or not rows.numel():
        return
    if not (int(rows.min()) >= 0 and int(rows.max()) < num_rows):
        raise ValueError(
            f"{op}: rows must lie in [{first_row}, {first_row + num_rows}), {what}, got {(rows + first_row).tolist()}"
        )
