"""Pooled attention in Triton: Q K^T, reduced tile by tile, given the log-sum-exp of each query.

The maximum of exp(s - lse) over a tile is exp(max(s - lse)), so ``max`` takes one exponential per tile; masses take one
per score. V is never read and nothing but the result is stored. Where no log-sum-exp is given, a kernel of its own
finds it first.

One tile of keys feeds little work, so a program shares it: it holds one query block of several query heads of one KV
head (``UNITS``). Rows of these heads are interleaved 16 at a time, as warps take them from a product, so that the
queries of one head lie with one warp (of four warps and four heads) and reducing them takes no shared memory.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import dispatch
from ..dispatch import power_of_2
from ..span import Span
from ..triton_span import LN2, LOG2E, span_row
from .arguments import Wanted

# A strip of keys takes at most this much shared memory per pipeline stage. float32 products are unrolled multiply-adds,
# not tensor core instructions: with larger strips they take minutes to compile.
MAX_STRIP_BYTES = {torch.float16: 32768, torch.bfloat16: 32768, torch.float32: 8192}

# Lengths and head counts are not specialised: a prompt of another length must not compile the kernels again.
_RUNTIME_SCALARS = ["heads", "group", "query_slots", "key_length", "num_keys"]


@triton.jit
def _unit_of(o_m, UNITS: tl.constexpr):
    """Which of the program's query heads a row belongs to."""
    return o_m // 16 % UNITS


@triton.jit
def _query_of(o_m, UNITS: tl.constexpr):
    """Which query of the block a row holds."""
    return o_m // (16 * UNITS) * 16 + o_m % 16


@triton.jit
def order():
    """Slot and place (batch row, KV head and part of its heads in one number) of this program.

    The usual ascending rows are longest at the end. Their longest eighth comes first, for one place after the other, so
    that what runs at one time shares keys in the L2 cache; then the next eighth; and what runs last is short.
    """
    num_slots, num_places = tl.num_programs(0), tl.num_programs(1)
    i_program = tl.program_id(1) * num_slots + tl.program_id(0)
    i_eighth = (i_program // num_places * 8 + 7) // num_slots
    first = i_eighth * num_slots // 8
    size = (i_eighth + 1) * num_slots // 8 - first
    i_program -= first * num_places
    return num_slots - 1 - first - i_program % size, i_program // size


@triton.jit
def locate(
    i_bkv, p_q, p_k, p_table, heads, group, query_slots, key_length,
    s_q_b, s_q_t, s_k_b, s_k_h, s_k_t, TABLE: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Where a place without parts lies: batch row, its row in memory, KV head, pointers to where the position 0 of its
    queries would be and is of its keys, the same slot of its queries, its first position, and behind its last one."""
    kv_heads = heads // group
    i_b, i_kv = (i_bkv // kv_heads).to(tl.int64), (i_bkv % kv_heads).to(tl.int64)
    i_memory = i_b * 0 if PACKED else i_b
    query_slot, start, length, key_slot = span_row(p_table, i_b, query_slots, key_length, TABLE)
    slot = query_slot - start
    p_q += i_memory * s_q_b + slot.to(tl.int64) * s_q_t
    p_k += i_memory * s_k_b + i_kv * s_k_h
    if TABLE:
        p_k += key_slot * s_k_t
    return i_b, i_memory, i_kv, p_q, p_k, slot, start, start + length


@triton.jit
def _place(
    p_rows, p_q, p_k, p_table, heads, group, query_slots, key_length, s_q_b, s_q_t, s_k_b, s_k_h,
    s_k_t, TABLE: tl.constexpr, PACKED: tl.constexpr, UNITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Slot and query block of this program, first of its query heads within the group, and what ``locate`` says."""
    i_slot, i_place = order()
    parts = (group + UNITS - 1) // UNITS
    i_b, i_memory, i_kv, p_q, p_k, slot, start, end = locate(
        i_place // parts, p_q, p_k, p_table, heads, group, query_slots, key_length,
        s_q_b, s_q_t, s_k_b, s_k_h, s_k_t, TABLE, PACKED,
    )  # fmt: skip
    i_row = tl.load(p_rows + i_slot).to(tl.int32) + start // BLOCK
    return i_slot, i_row, i_place % parts * UNITS, i_b, i_memory, i_kv, p_q, p_k, slot, start, end


@triton.jit
def _rows(i_row, i_kv, i_unit, group, start, end, UNITS: tl.constexpr, BLOCK: tl.constexpr):
    """Position and head of every row of queries of this program, and which rows are valid."""
    o_m = tl.arange(0, UNITS * BLOCK)
    o_q = i_row * BLOCK + _query_of(o_m, UNITS)
    o_unit = i_unit + _unit_of(o_m, UNITS)
    return o_q, i_kv * group + o_unit, (o_q >= start) & (o_q < end) & (o_unit < group)


@triton.jit
def _strip(p_k, o_keys, o_d, s_k_t, head_dim, limit, MASK_KEYS: tl.constexpr, MASK_DIM: tl.constexpr):
    """Keys ``[N, D]``; zeros from ``limit`` on and past head_dim, where these are asked for."""
    # [N, D]
    p_strip = p_k + o_keys.to(tl.int64)[:, None] * s_k_t + o_d[None, :]
    if MASK_KEYS:
        b_k = tl.load(p_strip, mask=(o_keys < limit)[:, None] & (o_d < head_dim)[None, :], other=0.0)
    elif MASK_DIM:
        b_k = tl.load(p_strip, mask=(o_d < head_dim)[None, :], other=0.0)
    else:
        b_k = tl.load(p_strip)
    return b_k


@triton.jit
def scores(
    b_q, p_k, o_keys, o_q, o_d, s_k_t, head_dim, limit, MASKED: tl.constexpr, MASK_DIM: tl.constexpr
):  # fmt: skip
    """Products of queries at positions ``o_q`` with a strip of keys, not yet scaled; ``MASKED``: -inf where a key comes
    after the query, and no key from ``limit`` on is read."""
    b_k = _strip(p_k, o_keys, o_d, s_k_t, head_dim, limit, MASKED, MASK_DIM)
    # [M, N]
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
    if MASKED:
        b_s = tl.where(o_keys[None, :] <= o_q[:, None], b_s, float("-inf"))
    return b_s


@triton.jit
def queries(p_q, o_head, o_q, m_valid, o_d, s_q_h, s_q_t, head_dim):
    """Queries ``[M, D]``: one head and one position a row, zeros where a row is not valid."""
    p_q += o_head * s_q_h + o_q.to(tl.int64) * s_q_t
    # [M, D]
    return tl.load(p_q[:, None] + o_d[None, :], mask=m_valid[:, None] & (o_d < head_dim)[None, :], other=0.0)


@triton.jit
def accumulate(b_s, b_max, b_sum):
    """One step of the running log-sum-exp of each query."""
    b_new = tl.maximum(b_max, tl.max(b_s, 1))
    b_sum = b_sum * tl.exp2(b_max - b_new) + tl.sum(tl.exp2(b_s - b_new[:, None]), 1)
    return b_new, b_sum


@triton.jit(do_not_specialize=_RUNTIME_SCALARS)
def query_lse_fwd_kernel(
    p_q, p_k, p_rows, p_table, p_lse, scale_log2,
    heads, group, query_slots, key_length, head_dim,
    s_q_b, s_q_h, s_q_t, s_k_b, s_k_h, s_k_t,
    TABLE: tl.constexpr, PACKED: tl.constexpr, UNITS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, MASK_DIM: tl.constexpr,
):  # fmt: skip
    """Natural log-sum-exp of the scaled causal logits of every valid query of the rows asked for."""
    _, i_row, i_unit, _, i_memory, i_kv, p_own_q, p_own_k, slot, start, end = _place(
        p_rows, p_q, p_k, p_table, heads, group, query_slots, key_length,
        s_q_b, s_q_t, s_k_b, s_k_h, s_k_t, TABLE, PACKED, UNITS, BLOCK,
    )  # fmt: skip
    diagonal = i_row * BLOCK
    o_n, o_d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    o_q, o_head, m_valid = _rows(i_row, i_kv, i_unit, group, start, end, UNITS, BLOCK)
    if diagonal < end:
        # [M, D]
        b_q = queries(p_own_q, o_head, o_q, m_valid, o_d, s_q_h, s_q_t, head_dim)
        b_max = tl.full([UNITS * BLOCK], float("-inf"), tl.float32)
        b_sum = tl.zeros([UNITS * BLOCK], tl.float32)
        # Every query sees the first key of its own block, so b_max is finite from the first strip on.
        for MASKED in tl.static_range(2):
            first, last = diagonal if MASKED else 0, diagonal + BLOCK if MASKED else diagonal
            for o_strip in tl.range(first, last, BLOCK_N, num_stages=1 if MASKED else None):
                # [M, N]
                b_s = scores(b_q, p_own_k, o_strip + o_n, o_q, o_d, s_k_t, head_dim, end, MASKED, MASK_DIM)
                b_max, b_sum = accumulate(b_s * scale_log2, b_max, b_sum)
        p_own_lse = p_lse + (i_memory * heads + o_head) * query_slots + o_q + slot
        tl.store(p_own_lse, (b_max + tl.log2(b_sum)) * LN2, mask=m_valid)


@triton.jit
def _reduce(b_s, b_lse, scale_log2, REDUCE: tl.constexpr, UNITS: tl.constexpr, BLOCK: tl.constexpr):
    """A strip of raw scores to one value for each of the program's heads: the logarithm of the largest probability (to
    base 2), or the mass; for ``row_sum`` to the mass of each query. Rows that are not valid have lse +inf and count for
    nothing."""
    if REDUCE == "max":
        # A thread holds pairs of neighbouring columns, eight apart, of rows eight apart: it reduces what it has, and
        # only the last two steps are between threads.
        N: tl.constexpr = b_s.shape[1]
        b_row = tl.max(tl.max(tl.reshape(b_s, [UNITS * BLOCK, N // 8, 4, 2]), 3), 1)
        b_row = b_row * scale_log2 - b_lse[:, None]
        b_row = tl.max(tl.max(tl.reshape(b_row, [BLOCK // 16, UNITS, 2, 8, 4]), 2), 0)
        b_value = tl.max(tl.max(b_row, 2), 1)
    else:
        b_value = tl.sum(tl.exp2(b_s * scale_log2 - b_lse[:, None]), 1)
        if REDUCE == "sum":
            b_value = tl.sum(tl.sum(tl.reshape(b_value, [BLOCK // 16, UNITS, 16]), 2), 0)
    return b_value


@triton.jit
def _add_strip(
    b_tile, b_q, b_lse, p_k, o_keys, o_q, o_d, s_k_t, head_dim, limit, scale_log2,
    MASKED: tl.constexpr, MASK_DIM: tl.constexpr, REDUCE: tl.constexpr, UNITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One strip of keys more in what :func:`_reduce` makes of a tile."""
    # [M, N]
    b_s = scores(b_q, p_k, o_keys, o_q, o_d, s_k_t, head_dim, limit, MASKED, MASK_DIM)
    b_strip = _reduce(b_s, b_lse, scale_log2, REDUCE, UNITS, BLOCK)
    return tl.maximum(b_tile, b_strip) if REDUCE == "max" else b_tile + b_strip


@triton.jit
def _value(b_tile, REDUCE: tl.constexpr, UNITS: tl.constexpr, BLOCK: tl.constexpr):
    """What is stored of a tile, ``[UNITS]``, once all its strips are in."""
    if REDUCE == "max":
        b_tile = tl.exp2(b_tile)
    elif REDUCE == "row_sum":
        b_tile = tl.max(tl.max(tl.reshape(b_tile, [BLOCK // 16, UNITS, 16]), 2), 0)
    return b_tile


@triton.jit(do_not_specialize=_RUNTIME_SCALARS)
def pooled_attention_fwd_kernel(
    p_q, p_k, p_lse, p_rows, p_table, p_out, scale_log2,
    heads, group, query_slots, key_length, head_dim, num_keys,
    s_q_b, s_q_h, s_q_t, s_k_b, s_k_h, s_k_t,
    TABLE: tl.constexpr, PACKED: tl.constexpr, REDUCE: tl.constexpr, NORMALIZE: tl.constexpr,
    UNITS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, MASK_DIM: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):  # fmt: skip
    """One row of the map for each of UNITS query heads: every element of it is written."""
    i_slot, i_row, i_unit, i_b, i_memory, i_kv, p_own_q, p_own_k, slot, start, end = _place(
        p_rows, p_q, p_k, p_table, heads, group, query_slots, key_length,
        s_q_b, s_q_t, s_k_b, s_k_h, s_k_t, TABLE, PACKED, UNITS, BLOCK,
    )  # fmt: skip
    diagonal = i_row * BLOCK
    o_u = i_unit + tl.arange(0, UNITS)
    m_u = o_u < group
    p_own_out = p_out + ((i_b * heads + i_kv * group + o_u) * tl.num_programs(0) + i_slot) * num_keys
    has_queries = diagonal < end
    b_total = tl.zeros([UNITS], tl.float32)
    if has_queries:
        o_n, o_d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
        o_q, o_head, m_valid = _rows(i_row, i_kv, i_unit, group, start, end, UNITS, BLOCK)
        # [M, D]
        b_q = queries(p_own_q, o_head, o_q, m_valid, o_d, s_q_h, s_q_t, head_dim)
        p_own_lse = p_lse + (i_memory * heads + o_head) * query_slots + o_q + slot
        # [M]
        b_lse = tl.load(p_own_lse, mask=m_valid, other=float("inf")) * LOG2E

        # A tile of several strips is stored with its last one.
        initial = float("-inf") if REDUCE == "max" else 0.0
        b_tile = tl.full([UNITS * BLOCK if REDUCE == "row_sum" else UNITS], initial, tl.float32)
        for o_strip in range(0, diagonal, BLOCK_N):
            b_tile = _add_strip(
                b_tile, b_q, b_lse, p_own_k, o_strip + o_n, o_q, o_d, s_k_t, head_dim, end, scale_log2,
                False, MASK_DIM, REDUCE, UNITS, BLOCK,
            )  # fmt: skip
            done = (o_strip + BLOCK_N) % BLOCK == 0
            b_value = _value(b_tile, REDUCE, UNITS, BLOCK)
            tl.store(p_own_out + o_strip // BLOCK, b_value, mask=m_u & done)
            b_total += tl.where(done, b_value, 0.0)
            b_tile = tl.where(done, initial, b_tile)
        for o_strip in tl.range(diagonal, diagonal + BLOCK, BLOCK_N, num_stages=1):
            b_tile = _add_strip(
                b_tile, b_q, b_lse, p_own_k, o_strip + o_n, o_q, o_d, s_k_t, head_dim, end, scale_log2,
                True, MASK_DIM, REDUCE, UNITS, BLOCK,
            )  # fmt: skip
        b_value = _value(b_tile, REDUCE, UNITS, BLOCK)
        tl.store(p_own_out + i_row, b_value, mask=m_u)
        b_total += b_value
        if REDUCE == "sum":
            b_total = tl.zeros_like(b_total) + (tl.minimum(diagonal + BLOCK, end) - tl.maximum(diagonal, start))
    # Wholly padded rows are 0 and stay 0.
    b_factor = 1.0 / tl.maximum(b_total, 1e-37)

    # The row is still in the cache: divide it, and fill it up with zeros.
    tl.debug_barrier()
    for o_first in tl.range(0, num_keys, BLOCK_OUT, num_stages=1):
        o_key = o_first + tl.arange(0, BLOCK_OUT)
        m_out = m_u[:, None] & (o_key < num_keys)[None, :]
        p_part = p_own_out[:, None] + o_key[None, :]
        m_causal = (o_key <= i_row)[None, :] & has_queries
        if NORMALIZE:
            # [UNITS, BLOCK_OUT]
            b_part = tl.load(p_part, mask=m_out & m_causal, other=0.0)
            tl.store(p_part, b_part * b_factor[:, None], mask=m_out)
        else:
            tl.store(p_part, tl.zeros([UNITS, BLOCK_OUT], tl.float32), mask=m_out & (m_causal == 0))


def query_lse(q: Tensor, k: Tensor, rows: Tensor, wanted: Wanted) -> Tensor:
    """float32, q's shape without the last dimension, natural logarithm; written for the valid queries of the blocks in
    ``rows`` only."""
    lse, span = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device), wanted.span
    shape = _launch_shape(q, k, wanted.block_size, 64 if q.dtype == torch.float32 else 128)
    with torch.cuda.device_of(q):
        query_lse_fwd_kernel[_grid(q, k, rows, span, shape)](
            q, k, rows, span.table, lse, wanted.scale * LOG2E.value, *sizes(q, k, span), *strides(q, k),
            TABLE=span.table is not None, PACKED=span.packed, **shape,
        )  # fmt: skip
    return lse


def pooled_attention(q: Tensor, k: Tensor, rows: Tensor, wanted: Wanted) -> Tensor:
    block_size, scale, reduce, normalize, lse, span, _ = wanted
    num_keys = span.num_key_blocks(block_size)
    out = torch.empty(span.batch, q.shape[1], rows.numel(), num_keys, dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out
    rows = rows.contiguous()
    if lse is None:
        lse = query_lse(q, k, rows, wanted)
    shape = _launch_shape(q, k, block_size, query_rows(q))
    with torch.cuda.device_of(q):
        pooled_attention_fwd_kernel[_grid(q, k, rows, span, shape)](
            q, k, lse.contiguous(), rows, span.table, out, scale * LOG2E.value, *sizes(q, k, span), num_keys,
            *strides(q, k), TABLE=span.table is not None, PACKED=span.packed, REDUCE=reduce,
            NORMALIZE=normalize, BLOCK_OUT=256, **shape,
        )  # fmt: skip
    return out


def sizes(q: Tensor, k: Tensor, span: Span) -> tuple[int, int, int, int, int]:
    """Query heads, those of a group, slots of queries, keys, head_dim, as kernels take them."""
    heads, query_slots, head_dim = q.shape[1:]
    return heads, heads // k.shape[1], query_slots, span.keys, head_dim


def strides(q: Tensor, k: Tensor) -> tuple[int, ...]:
    """Of queries and keys, but for the last dimension, as kernels take them."""
    return *q.stride()[:3], *k.stride()[:3]


def _grid(q: Tensor, k: Tensor, rows: Tensor, span: Span, shape: dict[str, Any]) -> tuple[int, int]:
    """Slots, and places: batch rows, KV heads and parts of their groups."""
    return rows.numel(), span.batch * k.shape[1] * -(-(q.shape[1] // k.shape[1]) // shape["UNITS"])


def query_rows(q: Tensor) -> int:
    """Rows of queries a program: on Hopper, whose products read them from shared memory, more fit than elsewhere, where
    they stay in registers."""
    if q.dtype == torch.float32:
        return 64
    more_fit = q.shape[3] <= 128 and dispatch.shared_memory(q.device) >= 200_000
    return 256 if more_fit and dispatch.capability(q.device) == 9 else 128


def strip_shape(dtype: torch.dtype, head_dim: int, keys: int) -> tuple[int, int]:
    """Keys a strip, at most ``keys`` of them, and padded head_dim."""
    block_d = max(16, power_of_2(head_dim))
    while keys > 16 and keys * block_d * dtype.itemsize > MAX_STRIP_BYTES[dtype]:
        keys //= 2
    return keys, block_d


def small_memory(q: Tensor) -> bool:
    """Whether wide heads meet a GPU on which 128 rows of queries and two strips of keys do not fit: a consumer's (99 KB
    of shared memory) or one of AMD (64 KB)."""
    return q.shape[3] > 128 and dispatch.shared_memory(q.device) < 160_000


def _launch_shape(q: Tensor, k: Tensor, block_size: int, tokens: int) -> dict[str, Any]:
    """Constants and options of a launch, from the rows of queries that a program may hold."""
    group = q.shape[1] // k.shape[1]
    small, full_precision = small_memory(q), q.dtype == torch.float32
    if small:
        tokens = 64
    # A block of 128 tokens is 128 rows of queries at least, and leaves less for keys.
    keys = 32 if small and block_size == 128 else min(block_size, 64)
    block_n, block_d = strip_shape(q.dtype, q.shape[3], keys)
    # As many heads as fit, unless more than a quarter of them would be missing in the last program of a group.
    units = max(1, tokens // block_size)
    while units > 1 and 4 * (-(-group // units) * units - group) > group:
        units //= 2
    return {
        "UNITS": units,
        "BLOCK": block_size,
        "BLOCK_N": block_n,
        "BLOCK_D": block_d,
        "MASK_DIM": block_d != q.shape[3],
        "num_warps": 8 if block_size == 128 or full_precision else 4,
        "num_stages": 1 if full_precision else 2 if small else 3,
    }
