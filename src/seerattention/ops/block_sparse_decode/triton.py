"""Block-sparse decoding in Triton: the list of a KV head is shared out over several programs, then put together.

A program reads the blocks of its part of one list once, for all query heads of the group. It is memory that bounds
decoding, so parts are there to keep enough loads in flight on every multiprocessor. The number of parts follows from
shapes alone: nothing waits for the device, and a CUDA graph replays any lists.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import dispatch
from ..dispatch import power_of_2
from ..indices import BlockIndices, read_lists, span_of
from ..triton_launch import launch
from ..triton_span import LN2, LOG2E, key_offset, page_of, span_row

# Programs that share out the lists of a call, at most, for each multiprocessor.
PROGRAMS_PER_MULTIPROCESSOR = 4
# Entries of a part: below, writing and merging it costs more than it reads.
MIN_ENTRIES = 2
MAX_PARTS = 64

_RUNTIME_SCALARS = [
    "s_indices_b",
    "s_indices_h",
    "s_indices_t",
    "s_counts_b",
    "s_counts_h",
    "s_pages_b",
    "kv_heads",
    "queries",
    "keys",
    "slots",
]


@triton.jit(do_not_specialize=_RUNTIME_SCALARS)
def block_sparse_decode_fwd_kernel(
    p_q, p_k, p_v, p_out, p_lse, p_indices, p_counts, p_table, p_pages, s_q_b, s_q_h, s_q_t, s_k_b, s_k_h, s_k_t, s_v_b,
    s_v_h, s_v_t, s_out_b, s_out_h, s_out_t, s_indices_b, s_indices_h, s_indices_t, s_counts_b, s_counts_h, s_pages_b,
    kv_heads, queries, keys, slots, scale_log2, GROUP: tl.constexpr, PADDED_GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, TABLE: tl.constexpr, PACKED: tl.constexpr,
    PAGE: tl.constexpr, IN_PARTS: tl.constexpr, RETURN_LSE: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: a query token, the query heads of one KV head, one part of its list."""
    SPLIT: tl.constexpr = BLOCK // TILE
    i_part = tl.program_id(0)
    i_t = tl.program_id(1)
    i_b = (tl.program_id(2) // kv_heads).to(tl.int64)
    i_kv = (tl.program_id(2) % kv_heads).to(tl.int64)

    query_slot, start, length, key_slot = span_row(p_table, i_b, queries, keys, TABLE)
    i_row = i_b * 0 if PACKED else i_b  # of q, k and v
    position = start + i_t

    o_g = tl.arange(0, PADDED_GROUP)
    o_d = tl.arange(0, PADDED_DIM)
    o_tile = tl.arange(0, TILE)
    m_d = o_d < HEAD_DIM
    m_q = ((o_g < GROUP) & (i_t < length))[:, None] & m_d[None, :]
    o_q = (i_kv * GROUP + o_g)[:, None] * s_q_h + (query_slot + i_t).to(tl.int64) * s_q_t + o_d[None, :]
    # [GROUP, D]
    b_q = tl.load(p_q + i_row * s_q_b + o_q, mask=m_q, other=0.0)

    count = tl.load(p_counts + i_b * s_counts_b + i_kv * s_counts_h + i_t)
    count = tl.where(i_t < length, count, 0)
    p_list = p_indices + i_b * s_indices_b + i_kv * s_indices_h + i_t.to(tl.int64) * s_indices_t
    if IN_PARTS:
        parts = tl.num_programs(0)
        begin = count * i_part // parts
        count = count * (i_part + 1) // parts - begin
        p_list += begin

    p_k += i_kv * s_k_h
    p_v += i_kv * s_v_h
    if PAGE:
        p_pages += i_b * s_pages_b
    else:
        p_k += i_row * s_k_b + key_slot * s_k_t
        p_v += i_row * s_v_b + key_slot * s_v_t
    b_max = tl.full([PADDED_GROUP], float("-inf"), tl.float32)
    b_sum = tl.zeros([PADDED_GROUP], tl.float32)
    b_out = tl.zeros([PADDED_GROUP, PADDED_DIM], tl.float32)
    # The next block is carried from iteration to iteration: only then can the loads of K and V be pipelined.
    i_key, i_page = tl.load(p_list, mask=count > 0, other=0), 0
    if PAGE:
        i_page = page_of(p_pages, i_key, count > 0, BLOCK, PAGE)
    for i in tl.range(0, count * SPLIT, num_stages=STAGES):
        o_sub, o_key = (i % SPLIT) * TILE + o_tile, (i_key * BLOCK).to(tl.int64)
        k_start, v_start = key_offset(o_key, i_page, s_k_b, s_k_t, PAGE), key_offset(o_key, i_page, s_v_b, s_v_t, PAGE)
        m_key = (i_key >= 0) & (i_key * BLOCK + o_sub <= position)
        m_kv = m_key[:, None] & m_d[None, :]
        # [TILE, D]
        b_k = tl.load(p_k + k_start + o_sub.to(tl.int64)[:, None] * s_k_t + o_d[None, :], mask=m_kv, other=0.0)
        b_v = tl.load(p_v + v_start + o_sub.to(tl.int64)[:, None] * s_v_t + o_d[None, :], mask=m_kv, other=0.0)
        i_key = tl.load(p_list + tl.minimum((i + 1) // SPLIT, count - 1))
        if PAGE:
            i_page = page_of(p_pages, i_key, True, BLOCK, PAGE)
        b_scores = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        b_scores = tl.where(m_key[None, :], b_scores, float("-inf"))
        # A tile without a visible key: keep -inf - -inf out of exp2.
        b_new_max = tl.maximum(tl.maximum(b_max, tl.max(b_scores, 1)), -1e30)
        # Scaled after the subtraction: the largest terms, whose differences are exact, keep their precision.
        b_p = tl.exp2((b_scores - b_new_max[:, None]) * scale_log2)
        b_decay = tl.exp2((b_max - b_new_max) * scale_log2)
        b_sum = b_sum * b_decay + tl.sum(b_p, 1)
        b_out = tl.dot(b_p.to(b_v.dtype), b_v, b_out * b_decay[:, None], input_precision=PRECISION)
        b_max = b_new_max

    # A token without keys has sum 0: output 0, lse -inf.
    m_seen = b_sum > 0
    b_seen = tl.where(m_seen, b_sum, 1.0)
    b_out = b_out / b_seen[:, None]
    b_lse = tl.where(m_seen, (b_max * scale_log2 + tl.log2(b_seen)) * LN2, float("-inf"))
    i_head = i_kv * GROUP + o_g
    if IN_PARTS:
        # Every part of every token and head is written, so that merging reads nothing that was not.
        o_row = ((i_b * kv_heads * GROUP + i_head) * queries + i_t) * tl.num_programs(0) + i_part
        m_g = o_g < GROUP
        tl.store(p_out + o_row[:, None] * HEAD_DIM + o_d[None, :], b_out, mask=m_g[:, None] & m_d[None, :])
        tl.store(p_lse + o_row, b_lse, mask=m_g)
    else:
        o_out = i_row * s_out_b + i_head[:, None] * s_out_h + (query_slot + i_t).to(tl.int64) * s_out_t + o_d[None, :]
        tl.store(p_out + o_out, b_out.to(p_out.dtype.element_ty), mask=m_q)
        if RETURN_LSE:
            o_row = (i_row * kv_heads * GROUP + i_head) * slots + query_slot + i_t
            tl.store(p_lse + o_row, b_lse, mask=(o_g < GROUP) & (i_t < length))


@triton.jit(do_not_specialize=["heads", "queries", "slots", "parts"])
def merge_decode_parts_kernel(
    p_parts, p_part_lse, p_out, p_lse, p_table, s_out_b, s_out_h, s_out_t, heads, queries, slots, parts,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, PADDED_PARTS: tl.constexpr, TABLE: tl.constexpr,
    PACKED: tl.constexpr, RETURN_LSE: tl.constexpr,
):  # fmt: skip
    """One program: a query token of one head."""
    i_t = tl.program_id(0)
    i_b = (tl.program_id(1) // heads).to(tl.int64)
    i_h = (tl.program_id(1) % heads).to(tl.int64)
    query_slot, length = 0, queries
    if TABLE:
        query_slot = tl.load(p_table + i_b * 4)
        length = tl.load(p_table + i_b * 4 + 2)
    o_p = tl.arange(0, PADDED_PARTS)
    o_d = tl.arange(0, PADDED_DIM)
    m_p = o_p < parts
    o_row = ((i_b * heads + i_h) * queries + i_t) * parts + o_p
    # [PARTS], [PARTS, D]
    b_lse = tl.load(p_part_lse + o_row, mask=m_p, other=float("-inf"))
    b_parts = tl.load(
        p_parts + o_row[:, None] * HEAD_DIM + o_d[None, :], mask=m_p[:, None] & (o_d < HEAD_DIM)[None, :], other=0.0
    )
    # Parts without a key have lse -inf: keep -inf - -inf out of exp.
    b_max = tl.maximum(tl.max(b_lse, 0), -1e30)
    b_weight = tl.exp(b_lse - b_max)
    b_sum = tl.sum(b_weight, 0)
    b_seen = tl.where(b_sum > 0, b_sum, 1.0)
    b_out = tl.sum(b_parts * b_weight[:, None], 0) / b_seen
    if i_t < length:
        i_row = i_b * 0 if PACKED else i_b
        o_out = i_row * s_out_b + i_h * s_out_h + (query_slot + i_t).to(tl.int64) * s_out_t + o_d
        tl.store(p_out + o_out, b_out.to(p_out.dtype.element_ty), mask=o_d < HEAD_DIM)
        if RETURN_LSE:
            b_total = tl.where(b_sum > 0, b_max + tl.log(b_seen), float("-inf"))
            tl.store(p_lse + (i_row * heads + i_h) * slots + query_slot + i_t, b_total)


def block_sparse_decode(
    q: Tensor, k: Tensor, v: Tensor, blocks: BlockIndices, scale: float, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Launch the kernels; arguments as checked by the interface.

    Returns:
        ``out`` like q, and the natural-log ``lse``, float32, q's shape without the last dimension, or None.
    """
    heads, slots, head_dim = q.shape[1:]
    (indices, counts), block_size, span = read_lists(blocks), blocks.block_size, span_of(blocks, q, k)
    batch, kv_heads, queries, capacity = indices.shape
    group = heads // kv_heads
    out, lse = torch.empty_like(q), None
    if return_lse:
        lse = torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)
    if capacity == 0 or not span.plain:  # slots without a query are written by nobody
        out.zero_()
        if lse is not None:
            lse.fill_(float("-inf"))
    if capacity == 0:
        return out, lse
    indices = indices if indices.stride(-1) == 1 else indices.contiguous()
    counts = counts if counts.stride(-1) == 1 else counts.contiguous()
    parts = num_parts(batch * kv_heads * queries, capacity, q.device)
    table, pages = span.table, span.pages
    tile, num_warps, stages = _launch_shape(q.dtype, head_dim, block_size, dispatch.shared_memory(q.device))
    padded_dim = max(16, power_of_2(head_dim))
    written, written_lse = out, lse
    if parts > 1:
        new = {"dtype": torch.float32, "device": q.device}
        written = torch.empty(batch, heads, queries, parts, head_dim, **new)
        written_lse = torch.empty(batch, heads, queries, parts, **new)
    constants = {"TABLE": table is not None, "PACKED": span.packed, "RETURN_LSE": return_lse}
    launch(
        block_sparse_decode_fwd_kernel,
        (parts, queries, batch * kv_heads),
        q,
        k,
        v,
        written,
        written_lse,
        indices,
        counts,
        table,
        None if pages is None else pages.table,
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        *out.stride()[:3],
        *indices.stride()[:3],
        *counts.stride()[:2],
        0 if pages is None else pages.table.stride(0),
        kv_heads,
        queries,
        span.keys,
        slots,
        scale * LOG2E.value,
        GROUP=group,
        PADDED_GROUP=max(16, power_of_2(group)),
        HEAD_DIM=head_dim,
        PADDED_DIM=padded_dim,
        BLOCK=block_size,
        TILE=tile,
        PAGE=0 if pages is None else pages.page_size,
        IN_PARTS=parts > 1,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        STAGES=stages,
        num_warps=num_warps,
        **constants,
    )
    if parts > 1:
        launch(
            merge_decode_parts_kernel,
            (queries, batch * heads),
            written,
            written_lse,
            out,
            lse,
            table,
            *out.stride()[:3],
            heads,
            queries,
            slots,
            parts,
            HEAD_DIM=head_dim,
            PADDED_DIM=padded_dim,
            PADDED_PARTS=power_of_2(parts),
            num_warps=4,
            **constants,
        )
    return out, lse


def num_parts(lists: int, capacity: int, device: torch.device) -> int:
    """Parts into which lists are cut, from shapes alone: lists count as long as their capacity."""
    room = dispatch.multiprocessors(device) * PROGRAMS_PER_MULTIPROCESSOR // max(1, lists)
    return max(1, min(room, capacity // MIN_ENTRIES, MAX_PARTS))


def _launch_shape(dtype: torch.dtype, head_dim: int, block_size: int, shared_memory: int) -> tuple[int, int, int]:
    """Keys a step, warps and pipeline stages, within the device's shared memory."""
    padded_dim = max(16, power_of_2(head_dim))
    tile = min(block_size, 32 if dtype == torch.float32 or padded_dim > 128 else 64)
    step_bytes = 2 * tile * padded_dim * dtype.itemsize  # keys and values
    # Deeper pipelines were slower in every case (H200): more programs on a multiprocessor hide loads better.
    stages = (shared_memory // 2 - 8192) // step_bytes
    return tile, 4, max(1, min(2, stages))
