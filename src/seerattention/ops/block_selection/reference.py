"""Block selection in plain torch: the definition that the Triton kernels must equal bit for bit.

A rule makes a bool mask of wanted blocks, which is packed. All comparisons are on float32 values, ties go to the
lower block index, and the sums of top-p are taken over integers, so no result depends on the order of
summation.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..indices import BlockIndices, check_span, ordered_lists
from ..lists import pack
from ..span import LENGTH, START, Span

# Probabilities are counted in units of 2^-40: float32 probabilities above 2^-16 are exact in it, and sums of 2^22
# blocks still fit int64.
PROBABILITY_UNITS = 1 << 40


class Rule(NamedTuple):
    """What is asked of :func:`select`, checked. The public functions say what each field means.

    Attributes:
        kind: ``"threshold"``, ``"topk"`` or ``"topp"``.
        capacity: entries a list, at least as many as the rule may keep.
        bound: the threshold, or the mass to reach.
        bounds: float32 ``[1 or H, 1 or N]``, thresholds by head and by the block that is a row's own, instead of bound.
        keep: int64 ``[1 or B, Nq]`` on the device of the scores, at least 1; of ``"topk"``.
        table: that of a span, int32 ``[B, 4]``; None: the rows are the last of the key blocks, and all are valid.
    """

    kind: str
    capacity: int
    block_size: int
    table: Tensor | None
    last_blocks_dense: int
    bound: float = 0.0
    keep: Tensor | None = None
    softmax: bool = False
    relative: bool = False
    diagonal_extra: bool = False
    min_blocks: int = 0
    first_blocks: int = 0
    dense_rows: int = 0
    bounds: Tensor | None = None


class Rows(NamedTuple):
    """What is known of rows of scores, all int64.

    Attributes:
        own: ``[B or 1, Nq]``, the key block that is the row's own: its diagonal, and the last one that it sees.
        end: ``[B or 1, 1]``, the block behind the last one that holds a query; rows from there on are not valid.
    """

    own: Tensor
    end: Tensor

    def up_to(self, num_keys: int, before: int = 0) -> Tensor:
        """Bool ``[B or 1, 1, Nq, Nk]``: the key blocks up to the row's own, without the ``before`` last of them."""
        return (torch.arange(num_keys, device=self.own.device) <= (self.own - before)[..., None])[:, None]


def rows_of(scores: Tensor, table: Tensor | None, block_size: int) -> Rows:
    """What a table says of rows of ``scores [B, H, Nq, Nk]``."""
    num_rows, num_keys = scores.shape[-2:]
    own = torch.arange(num_rows, device=scores.device)[None]
    if table is None:
        return Rows(own + (num_keys - num_rows), own.new_full((1, 1), num_keys))
    start, length = table[:, START, None].long(), table[:, LENGTH, None].long()
    end = ((start + length + (block_size - 1)) // block_size).clamp(max=num_keys)
    return Rows(own + start // block_size, torch.where(length > 0, end, 0))


def causal_softmax(logits: Tensor, *, block_size: int = 64, span: Span | None = None) -> Tensor:
    """Softmax over the causal key blocks of each row.

    Args:
        logits: ``[B, H, Nq, Nk]``; query blocks are the last Nq of the Nk key blocks, or those of the span.
        block_size, span: tokens a block, and which query blocks the rows are.

    Returns:
        float32 ``[B, H, Nq, Nk]``, exactly 0 above the block diagonal. Rows without a query are undefined.
    """
    return _causal_softmax(logits, rows_of(logits, None if span is None else span.table, block_size))


def _causal_softmax(logits: Tensor, rows: Rows) -> Tensor:
    return logits.float().masked_fill(~rows.up_to(logits.shape[-1]), float("-inf")).softmax(-1)


def select(scores: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
    """``indices [B, H, Nq, capacity]`` and ``counts [B, H, Nq]`` of the lists, int32."""
    rows, num_keys = rows_of(scores, rule.table, rule.block_size), scores.shape[-1]
    values = (_causal_softmax(scores, rows) if rule.softmax else scores).float()
    if rule.relative:  # to uniform attention
        values = values * (rows.own + 1).float()[:, None, :, None]
    if rule.kind == "threshold":
        mask = values > (rule.bound if rule.bounds is None else _bounds_of(rule.bounds, rows))
        if rule.min_blocks:
            floor = torch.full_like(rows.own, rule.min_blocks)
            mask |= _topk_mask(values, floor, rows, diagonal_extra=False)
    elif rule.kind == "topk":
        assert rule.keep is not None
        mask = _topk_mask(values, rule.keep, rows, rule.diagonal_extra)
    else:
        mask = _topp_mask(values, rule.bound, rows)
    keys, own, end = torch.arange(num_keys, device=mask.device), rows.own[:, None, :, None], rows.end[:, None, :, None]
    mask = mask | (keys == own) | (keys < rule.first_blocks) | (own < rule.dense_rows)
    if rule.last_blocks_dense:
        mask = mask | (own >= end - rule.last_blocks_dense)
    indices, counts = pack(mask & rows.up_to(num_keys) & (own < end), num_keys)
    return (indices if rule.capacity == num_keys else indices[..., : rule.capacity].contiguous()), counts


def _bounds_of(bounds: Tensor, rows: Rows) -> Tensor:
    """``[B or 1, H or 1, Nq or 1, 1]``, what of ``bounds [H or 1, N or 1]`` is for each row."""
    if bounds.shape[1] == 1:
        return bounds[None, ..., None]
    own = rows.own.clamp(max=bounds.shape[1] - 1)  # rows that hold no query may lie behind all keys
    return bounds[:, own].transpose(0, 1)[..., None]


def _topk_mask(values: Tensor, keep: Tensor, rows: Rows, diagonal_extra: bool) -> Tensor:
    """Bool ``[B, H, Nq, Nk]``; ``keep [1 or B, Nq]``, at least 1."""
    num_keys = values.shape[-1]
    # Without diagonal_extra the diagonal is one of the k, and the other k - 1 compete below it. Cutting k to the
    # number of candidates keeps masked blocks, which sort last, off the list.
    candidates = rows.up_to(num_keys, 0 if diagonal_extra else 1)
    wanted = torch.minimum(keep, rows.own + 1) if diagonal_extra else torch.minimum(keep - 1, rows.own)
    values = torch.where(candidates & ~values.isnan(), values, float("-inf"))
    order = values.sort(dim=-1, descending=True, stable=True).indices
    ranks_wanted = torch.arange(num_keys, device=values.device) < wanted[:, None, :, None]
    return torch.zeros_like(values, dtype=torch.bool).scatter_(-1, order, ranks_wanted.expand(values.shape))


def _topp_mask(values: Tensor, p: float, rows: Rows) -> Tensor:
    num_keys = values.shape[-1]
    values = values.nan_to_num(0.0, 1.0, 0.0).clamp(0.0, 1.0)
    # The diagonal is taken first and its mass counts; the blocks below it make up the rest.
    own = rows.own.clamp(max=num_keys - 1)[:, None, :, None].expand(*values.shape[:3], 1)
    diagonal = (values.gather(-1, own).double() * PROBABILITY_UNITS).long()
    values = torch.where(rows.up_to(num_keys, 1), values, -1.0)  # sorts after every candidate
    ordered, order = values.sort(dim=-1, descending=True, stable=True)
    units = (ordered.clamp(min=0.0).double() * PROBABILITY_UNITS).long()
    mass_before = diagonal + units.cumsum(-1) - units
    return torch.zeros_like(values, dtype=torch.bool).scatter_(-1, order, mass_before < topp_target(p))


def topp_target(p: float) -> int:
    """The mass to reach, in units of 2^-40. p = 1 asks for every block, however the probabilities were rounded."""
    return int(p * PROBABILITY_UNITS) if p < 1.0 else (1 << 62)


def dense_indices(
    batch: int,
    heads: int,
    num_rows: int,
    num_key_blocks: int,
    *,
    block_size: int,
    lengths: Tensor | None = None,
    device: torch.device | str | None = None,
    span: Span | None = None,
) -> BlockIndices:
    """Lists of all causal blocks. ``indices`` is one expanded row: it takes no memory, so do not write into it.

    Args:
        batch, heads, num_rows, num_key_blocks: B, H, Nq and Nk; query blocks are the last Nq of the Nk key blocks, or
            those of the span.
        block_size: tokens a block.
        lengths: int64 ``[B]``, valid tokens of each right-padded row; rows of wholly padded blocks get count 0.
        device: where to make them.
        span: which query blocks the rows are, instead of ``lengths``; it lies on that device.

    Raises:
        ValueError: both lengths and a span, or numbers that are not those of the span.
    """
    if span is not None and lengths is not None:
        raise ValueError("dense_indices: got lengths and a span; give one of them, the span knows the lengths")
    indices = torch.arange(num_key_blocks, dtype=torch.int32, device=device).expand(batch, heads, num_rows, -1)
    if span is not None:
        check_span(indices.shape, indices.device, num_key_blocks, block_size, False, span)
    table = (span or span_of_lengths(batch, num_rows, num_key_blocks, block_size, lengths)).table
    rows = rows_of(indices, None if table is None else table.to(indices.device), block_size)
    counts = torch.where(rows.own < rows.end, rows.own + 1, 0).int()
    counts = counts[:, None].expand(batch, heads, num_rows).contiguous()
    return ordered_lists(indices, counts, num_key_blocks, block_size, span=span)


def span_of_lengths(batch: int, num_rows: int, num_key_blocks: int, block_size: int, lengths: Tensor | None) -> Span:
    """The span of right-padded rows of ``lengths [B]`` tokens (None: all), of whole blocks."""
    return Span.of_padded(batch, num_rows * block_size, num_key_blocks * block_size, lengths)
