"""Lists in parts: several programs share one list, and a small kernel puts their results together.

A program for each query block of each head leaves most of a GPU idle where there are few query blocks: the question of
a later turn, or a chunk of a hundred tokens, on a long cache. There each list is cut into parts of as many entries, one
program each (as split-KV decoding does), which write their output and log-sum-exp in float32. With
lse = log(sum_p exp(lse_p)), the output is sum_p exp(lse_p - lse) out_p.

A program or two a multiprocessor are enough: it is memory that bounds so few queries on so many keys, and programs that
walk their lists side by side share what they read. More parts than that made 256 and 512 queries slower
(docs/experiments.md).
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import dispatch
from ..dispatch import power_of_2
from ..indices import BlockIndices, read_lists, span_of
from ..span import Span
from ..triton_launch import launch
from ..triton_span import LOG2E, span_constants

# A part writes, and its merging reads, as many bytes as two tiles of keys and values: shorter parts would not pay.
MIN_ENTRIES = 8
MAX_PARTS = 32

# Lengths, head counts and list strides vary from call to call: one binary serves them all. Strides of q, k, v and out
# stay specialised because their divisibility by 16 is what lets loads be vectorised.
RUNTIME_SCALARS = [f"s_{name}" for name in ("indices_b", "indices_h", "indices_r", "counts_b", "counts_h", "counts_r")]
RUNTIME_SCALARS += ["s_pages_b", "num_heads", "kv_group", "list_group", "query_slots", "key_length", "first_row"]


def num_parts(programs: int, capacity: int, device: torch.device, per_multiprocessor: int) -> int:
    """Parts into which lists are cut so that the GPU has work everywhere; 1 where it has without.

    It follows from shapes alone, so that nothing waits for the device: lists count as long as their capacity.

    Args:
        programs: as many as there are with whole lists.
        capacity: of the lists, in entries.
        per_multiprocessor: programs that keep a multiprocessor busy.
    """
    room = dispatch.multiprocessors(device) * per_multiprocessor // max(1, programs)
    return max(1, min(room, capacity // MIN_ENTRIES, MAX_PARTS))


class Plan(NamedTuple):
    """What the launches of both attention kernels have in common.

    Attributes:
        programs: query tiles of one head.
        parts: into which lists are cut.
        batch: rows.
        arguments: those of a kernel from ``p_out`` to ``scale_log2``.
        constants: those that follow from the lists and their span.
        out, lse: memory for the results.
    """

    programs: int
    parts: int
    batch: int
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    out: Tensor
    lse: Tensor | None

    def results(self) -> tuple[Tensor, Tensor | None]:
        """``out`` and ``lse``, once the kernel has been launched."""
        if self.parts > 1:
            merge_parts(*self.arguments[:2], self.out, self.lse)
        return self.out, self.lse


def plan(
    q: Tensor,
    k: Tensor,
    blocks: BlockIndices,
    scale: float,
    return_lse: bool,
    tile: int,
    per_multiprocessor: int,
) -> Plan | None:
    """Plan a launch for query tiles of ``tile`` tokens; None where no list has room for an entry.

    Args:
        per_multiprocessor: see :func:`num_parts`.
    """
    num_heads, query_slots = q.shape[1:3]
    indices, counts = read_lists(blocks)
    if indices.shape[-1] == 0:  # and there is no index to read
        return None
    span, block_size = span_of(blocks, q, k), blocks.block_size
    indices = indices if indices.stride(-1) == 1 else indices.contiguous()
    programs = blocks.num_rows * (block_size // tile)
    parts = num_parts(programs * span.batch * num_heads, indices.shape[-1], q.device, per_multiprocessor)
    out, lse = new_results(q, return_lse, span)
    written, written_lse = result_buffers(out, lse, parts, span)
    page_table = None if span.pages is None else span.pages.table
    arguments = (
        written,
        written_lse,
        indices,
        counts,
        span.table,
        page_table,
        *written.stride()[-4:-1],
        written.stride(0),
        *indices.stride()[:3],
        *counts.stride(),
        0 if page_table is None else page_table.stride(0),
        num_heads,
        num_heads // k.shape[1],
        num_heads // counts.shape[1],
        query_slots,
        span.keys,
        span.first_row(block_size) if span.plain else 0,
        scale * LOG2E.value,
    )
    constants = {"BLOCK": block_size, "RETURN_LSE": written_lse is not None, "IN_PARTS": parts > 1}
    return Plan(programs, parts, span.batch, arguments, constants | span_constants(span), out, lse)


def empty_results(q: Tensor, return_lse: bool) -> tuple[Tensor, Tensor | None]:
    """Of queries that see no key."""
    lse = torch.full(q.shape[:3], float("-inf"), dtype=torch.float32, device=q.device) if return_lse else None
    return torch.zeros_like(q), lse


def new_results(q: Tensor, return_lse: bool, span: Span) -> tuple[Tensor, Tensor | None]:
    """Memory for ``out`` and ``lse``. Slots without a query, which no program writes, hold 0 and -inf."""
    lse = None
    if return_lse:
        lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    if span.plain:
        return torch.empty_like(q), lse
    return torch.zeros_like(q), None if lse is None else lse.fill_(float("-inf"))


def result_buffers(out: Tensor, lse: Tensor | None, parts: int, span: Span) -> tuple[Tensor, Tensor | None]:
    """What the programs write into: ``out`` and ``lse`` themselves, or float32 with a leading dimension of parts."""
    if parts == 1:
        return out, lse
    shape = (parts, *out.shape)
    new = functools.partial(torch.empty, dtype=torch.float32, device=out.device)
    if span.plain:
        return new(shape), new(shape[:-1])
    return new(shape).zero_(), new(shape[:-1]).fill_(float("-inf"))  # as above: these are merged, too


@triton.jit(do_not_specialize=["num_heads", "query_length", "parts"])
def merge_parts_kernel(
    p_parts, p_part_lse, p_out, p_lse, s_out_b, s_out_h, s_out_t, num_heads, query_length, parts,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, ROWS: tl.constexpr, RETURN_LSE: tl.constexpr,
):  # fmt: skip
    """One program: ROWS queries of one head."""
    i_bh = tl.program_id(1).to(tl.int64)
    o_query = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    o_d = tl.arange(0, PADDED_DIM)
    m_query = o_query < query_length
    m_out = m_query[:, None] & (o_d < HEAD_DIM)[None, :]
    part_size = tl.num_programs(1).to(tl.int64) * query_length
    o_row = i_bh * query_length + o_query

    b_max = tl.full([ROWS], float("-inf"), tl.float32)
    b_sum = tl.zeros([ROWS], tl.float32)
    b_out = tl.zeros([ROWS, PADDED_DIM], tl.float32)
    for i in range(0, parts):
        b_lse = tl.load(p_part_lse + i * part_size + o_row, mask=m_query, other=float("-inf"))
        b_part = tl.load(
            p_parts + (i * part_size + o_row)[:, None] * HEAD_DIM + o_d[None, :], mask=m_out, other=0.0
        )  # fmt: skip
        # Parts without a key have lse -inf: keep -inf - -inf out of exp.
        b_new_max = tl.maximum(tl.maximum(b_max, b_lse), -1e30)
        b_decay, b_weight = tl.exp(b_max - b_new_max), tl.exp(b_lse - b_new_max)
        b_sum = b_sum * b_decay + b_weight
        b_out = b_out * b_decay[:, None] + b_part * b_weight[:, None]
        b_max = b_new_max

    m_seen = b_sum > 0
    b_seen = tl.where(m_seen, b_sum, 1.0)
    p_out += i_bh // num_heads * s_out_b + i_bh % num_heads * s_out_h
    tl.store(
        p_out + o_query.to(tl.int64)[:, None] * s_out_t + o_d[None, :],
        (b_out / b_seen[:, None]).to(p_out.dtype.element_ty),
        mask=m_out,
    )
    if RETURN_LSE:
        tl.store(p_lse + o_row, tl.where(m_seen, b_max + tl.log(b_seen), float("-inf")), mask=m_query)


def merge_parts(part_out: Tensor, part_lse: Tensor, out: Tensor, lse: Tensor | None) -> None:
    """Put parts ``[parts, B, Hq, Tq(, D)]`` together, into ``out [B, Hq, Tq, D]`` and ``lse [B, Hq, Tq]``."""
    batch, num_heads, query_length, head_dim = out.shape
    rows = 16
    launch(
        merge_parts_kernel,
        (triton.cdiv(query_length, rows), batch * num_heads),
        part_out,
        part_lse,
        out,
        lse,
        *out.stride()[:3],
        num_heads,
        query_length,
        part_out.shape[0],
        HEAD_DIM=head_dim,
        PADDED_DIM=power_of_2(head_dim),
        ROWS=rows,
        RETURN_LSE=lse is not None,
        num_warps=4,
    )
