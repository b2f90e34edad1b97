"""Pooled attention for Hopper GPUs (compute capability 9.0) in Gluon, given the log-sum-exp of each query: maxima of
tiles, of their probabilities or of the masses of their queries.

The same loop as ``triton.py`` for blocks of 64: a program is one warpgroup with one query block of four query heads of
one KV head, so that each tile of keys, brought in by the tensor copy engine (TMA), feeds 256 rows of queries. These are
four products of 64 rows, all started at once: while the tensor cores work on the later ones, the earlier are reduced.
Each takes 16 queries of each head, so that all the queries of a head lie with one warp, and no step of the reduction
goes through shared memory. Two programs share a multiprocessor and fill each other's gaps.

TMA checks bounds itself: rows before the first query or after the last key, and columns past head_dim, arrive as zeros.
What it demands of addresses and strides is checked by ``hopper_usable`` in ``interface.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from ..hopper import copy_tile, pin, tile_descriptor
from ..triton_span import LOG2E
from .arguments import Wanted
from .triton import query_lse

TILE = 64
UNITS = 4  # query heads a program; 16 queries of each make the 64 rows of a product
NUM_WARPS = 4
# Tiles of keys under way. With 3, the queries and the keys of two programs fill the shared memory at head_dim 128.
STAGES = 3
# Of 65536, for two programs of 128 threads.
MAX_REGISTERS = 248

# Lengths and head counts vary from call to call: one binary serves them all.
_RUNTIME_SCALARS = ["num_heads", "kv_group", "query_slots", "key_length", "num_keys"]

_barrier = getattr(gl, "barrier", None) or gl.thread_barrier  # triton 3.7 renamed it


@gluon.jit
def _order():
    """Slot and place of this program; the order is that of ``order`` in ``triton.py``."""
    num_slots = gl.num_programs(0)
    num_places = gl.num_programs(1)
    i_program = gl.program_id(1) * num_slots + gl.program_id(0)
    i_eighth = (i_program // num_places * 8 + 7) // num_slots
    first = i_eighth * num_slots // 8
    size = (i_eighth + 1) * num_slots // 8 - first
    i_program -= first * num_places
    return num_slots - 1 - first - i_program % size, i_program // size


@gluon.jit
def _row_values(b_s, b_lse, scale_log2, ROW_SUM: gl.constexpr):
    """Of each query in the tile: logarithm of its largest probability, or its mass; of queries that are not valid the
    logarithm of 0, or 0."""
    if ROW_SUM:
        b_row = gl.sum(gl.exp2(b_s * scale_log2 - b_lse[:, None]), 1)
    else:
        b_row = gl.max(b_s, 1) * scale_log2 - b_lse
    return gl.where(b_lse < float("inf"), b_row, 0.0 if ROW_SUM else float("-inf"))


@gluon.jit
def _queries_of(p_lse, o_query, m_row):
    """Log-sum-exp (to base 2) of 64 rows of queries; +inf where a row is not valid."""
    return gl.load(p_lse + o_query, mask=m_row, other=float("inf")) * LOG2E


@gluon.jit
def _tile_value(b_0, b_1, b_2, b_3, UNITS: gl.constexpr, ROW_SUM: gl.constexpr):
    """From one number a row to the largest probability, or mass of a query, of each of the program's heads."""
    b_row = gl.maximum(gl.maximum(b_0, b_1), gl.maximum(b_2, b_3))
    b_value = gl.max(b_row.reshape([UNITS, 16]), 1)
    return b_value if ROW_SUM else gl.exp2(b_value)


@gluon.jit(do_not_specialize=_RUNTIME_SCALARS)
def pooled_attention_hopper_kernel(
    d_q, d_k, p_lse, p_rows, p_table, p_out, num_heads, kv_group, query_slots, key_length, num_keys, scale_log2,
    PADDED_DIM: gl.constexpr, TILE: gl.constexpr, UNITS: gl.constexpr, STAGES: gl.constexpr, TABLE: gl.constexpr,
    PACKED: gl.constexpr, ROW_SUM: gl.constexpr, NORMALIZE: gl.constexpr, BLOCK_OUT: gl.constexpr,
):  # fmt: skip
    """One row of the map for each of UNITS query heads: every element of it is written."""
    DTYPE: gl.constexpr = d_q.dtype
    SCORES: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, TILE, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, SCORES)

    smem_q0 = gl.allocate_shared_memory(DTYPE, [1, UNITS, 16, PADDED_DIM], d_q.layout)
    smem_q1 = gl.allocate_shared_memory(DTYPE, [1, UNITS, 16, PADDED_DIM], d_q.layout)
    smem_q2 = gl.allocate_shared_memory(DTYPE, [1, UNITS, 16, PADDED_DIM], d_q.layout)
    smem_q3 = gl.allocate_shared_memory(DTYPE, [1, UNITS, 16, PADDED_DIM], d_q.layout)
    smem_k = gl.allocate_shared_memory(DTYPE, [STAGES, 1, 1, TILE, PADDED_DIM], d_k.layout)
    bar_q = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    bar_pin = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    bars_k = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(bar_pin, count=1)
    mbarrier.init(bar_q, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(bars_k.index(i), count=1)

    i_slot, i_place = _order()
    parts = (kv_group + UNITS - 1) // UNITS
    num_kv_heads = num_heads // kv_group
    i_b = i_place // parts // num_kv_heads
    i_kv = i_place // parts % num_kv_heads
    i_unit = i_place % parts * UNITS
    i_h = i_kv * kv_group + i_unit
    i_memory = i_b * 0 if PACKED else i_b  # the row of q, k and lse
    query_slot, start, length, key_slot = 0, key_length - query_slots, query_slots, 0
    if TABLE:
        p_table += i_b * 4
        query_slot, start, length = gl.load(p_table), gl.load(p_table + 1), gl.load(p_table + 2)
        key_slot = gl.load(p_table + 3)
    i_row = gl.load(p_rows + i_slot).to(gl.int32) + start // TILE
    diagonal = i_row * TILE
    end = start + length
    has_queries = diagonal < end
    # Tiles before the diagonal one, which takes the causal mask; none at all in a block of padding.
    num_whole = gl.where(has_queries, i_row, 0)
    num_tiles = gl.where(has_queries, i_row + 1, 0)

    # Index of the first query of the block, negative where a chunk starts inside it.
    local = diagonal - start
    o_slot = gl.where(has_queries, local + query_slot, 0)  # far from q in a row of a span without a query
    mbarrier.expect(bar_q, 4 * d_q.block_type.nbytes)
    tma.async_copy_global_to_shared(d_q, [i_memory, i_h, o_slot, 0], bar_q, smem_q0)
    tma.async_copy_global_to_shared(d_q, [i_memory, i_h, o_slot + 16, 0], bar_q, smem_q1)
    tma.async_copy_global_to_shared(d_q, [i_memory, i_h, o_slot + 32, 0], bar_q, smem_q2)
    tma.async_copy_global_to_shared(d_q, [i_memory, i_h, o_slot + 48, 0], bar_q, smem_q3)
    for i in gl.static_range(STAGES):
        copy_tile(d_k, i_memory, i_kv, i * TILE + key_slot, bars_k.index(i), smem_k.index(i), i < num_tiles)

    o_m = gl.arange(0, TILE, layout=ROW)
    o_local = local + o_m % 16
    m_head = i_unit + o_m // 16 < kv_group
    p_head = p_lse + (i_memory.to(gl.int64) * num_heads + i_h) * query_slots + query_slot
    o_query = (o_m // 16).to(gl.int64) * query_slots + o_local
    b_lse0 = _queries_of(p_head, o_query, m_head & (o_local >= 0) & (o_local < length))
    b_lse1 = _queries_of(p_head, o_query + 16, m_head & (o_local + 16 >= 0) & (o_local + 16 < length))
    b_lse2 = _queries_of(p_head, o_query + 32, m_head & (o_local + 32 >= 0) & (o_local + 32 < length))
    b_lse3 = _queries_of(p_head, o_query + 48, m_head & (o_local + 48 >= 0) & (o_local + 48 < length))

    # One element for each head, made as the values of the tiles are, to have their layout.
    o_unit = gl.max((o_m // 16).reshape([UNITS, 16]), 1)
    m_unit = i_unit + o_unit < kv_group
    p_row = p_out + ((i_b.to(gl.int64) * num_heads + i_h + o_unit) * gl.num_programs(0) + i_slot) * num_keys
    b_total = (o_unit * 0).to(gl.float32)

    b_q0 = smem_q0.reshape([TILE, PADDED_DIM])
    b_q1 = smem_q1.reshape([TILE, PADDED_DIM])
    b_q2 = smem_q2.reshape([TILE, PADDED_DIM])
    b_q3 = smem_q3.reshape([TILE, PADDED_DIM])
    b_zero = gl.zeros([TILE, TILE], gl.float32, SCORES)
    mbarrier.wait(bar_q, 0)

    for i in range(num_whole):
        stage = i % STAGES
        bar = bars_k.index(stage)
        b_kt = smem_k.index(stage).reshape([TILE, PADDED_DIM]).permute((1, 0))
        mbarrier.wait(bar, i // STAGES & 1)
        b_s0 = warpgroup_mma(b_q0, b_kt, b_zero, use_acc=False, is_async=True)
        b_s1 = warpgroup_mma(b_q1, b_kt, b_zero, use_acc=False, is_async=True)
        b_s2 = warpgroup_mma(b_q2, b_kt, b_zero, use_acc=False, is_async=True)
        b_s3 = warpgroup_mma(b_q3, b_kt, b_zero, use_acc=False, is_async=True)
        b_s0 = warpgroup_mma_wait(3, deps=(b_s0,))
        b_0 = _row_values(b_s0, b_lse0, scale_log2, ROW_SUM)
        pin(bar_pin)
        b_s1 = warpgroup_mma_wait(2, deps=(b_s1,))
        b_1 = _row_values(b_s1, b_lse1, scale_log2, ROW_SUM)
        pin(bar_pin)
        b_s2 = warpgroup_mma_wait(1, deps=(b_s2,))
        b_2 = _row_values(b_s2, b_lse2, scale_log2, ROW_SUM)
        pin(bar_pin)
        b_s3 = warpgroup_mma_wait(0, deps=(b_s3,))
        o_key = (i + STAGES) * TILE + key_slot
        copy_tile(d_k, i_memory, i_kv, o_key, bar, smem_k.index(stage), i + STAGES < num_tiles)
        b_3 = _row_values(b_s3, b_lse3, scale_log2, ROW_SUM)
        b_value = _tile_value(b_0, b_1, b_2, b_3, UNITS, ROW_SUM)
        gl.store(p_row + i, b_value, mask=m_unit)
        b_total += b_value

    if has_queries:
        stage = num_whole % STAGES
        b_kt = smem_k.index(stage).reshape([TILE, PADDED_DIM]).permute((1, 0))
        mbarrier.wait(bars_k.index(stage), num_whole // STAGES & 1)
        b_s0 = warpgroup_mma(b_q0, b_kt, b_zero, use_acc=False, is_async=True)
        b_s1 = warpgroup_mma(b_q1, b_kt, b_zero, use_acc=False, is_async=True)
        b_s2 = warpgroup_mma(b_q2, b_kt, b_zero, use_acc=False, is_async=True)
        b_s3 = warpgroup_mma(b_q3, b_kt, b_zero, use_acc=False, is_async=True)
        b_s0 = warpgroup_mma_wait(3, deps=(b_s0,))
        b_s1 = warpgroup_mma_wait(2, deps=(b_s1,))
        b_s2 = warpgroup_mma_wait(1, deps=(b_s2,))
        b_s3 = warpgroup_mma_wait(0, deps=(b_s3,))
        # Queries and keys of this tile start at one position. Causality also hides the keys past the end from every
        # valid query.
        o_n = gl.arange(0, TILE, layout=gl.SliceLayout(0, SCORES))[None, :]
        o_first = (o_m % 16)[:, None]
        b_0 = _row_values(gl.where(o_first >= o_n, b_s0, float("-inf")), b_lse0, scale_log2, ROW_SUM)
        b_1 = _row_values(gl.where(o_first + 16 >= o_n, b_s1, float("-inf")), b_lse1, scale_log2, ROW_SUM)
        b_2 = _row_values(gl.where(o_first + 32 >= o_n, b_s2, float("-inf")), b_lse2, scale_log2, ROW_SUM)
        b_3 = _row_values(gl.where(o_first + 48 >= o_n, b_s3, float("-inf")), b_lse3, scale_log2, ROW_SUM)
        b_value = _tile_value(b_0, b_1, b_2, b_3, UNITS, ROW_SUM)
        gl.store(p_row + i_row, b_value, mask=m_unit)
        b_total += b_value

    # The rows are still in the cache: divide them, and fill them up with zeros. A row without queries is 0.
    OUT: gl.constexpr = gl.BlockedLayout([1, BLOCK_OUT // 32], [1, 32], [UNITS, 1], [1, 0])
    b_factor = 1.0 / gl.maximum(b_total, 1e-37)
    b_factor = gl.convert_layout(b_factor, gl.SliceLayout(1, OUT))[:, None]
    o_unit = gl.arange(0, UNITS, layout=gl.SliceLayout(1, OUT))
    m_unit = (i_unit + o_unit < kv_group)[:, None]
    o_row = ((i_b.to(gl.int64) * num_heads + i_h + o_unit) * gl.num_programs(0) + i_slot) * num_keys
    _barrier()
    for o_first in range(0, num_keys, BLOCK_OUT):
        o_key = o_first + gl.arange(0, BLOCK_OUT, layout=gl.SliceLayout(0, OUT))
        m_part = m_unit & (o_key < num_keys)[None, :]
        m_filled = m_part & (o_key < num_tiles)[None, :]
        p_part = p_out + (o_row[:, None] + o_key[None, :])
        if NORMALIZE:
            b_part = gl.load(p_part, mask=m_filled, other=0.0)
            gl.store(p_part, b_part * b_factor, mask=m_part)
        else:
            gl.store(p_part, gl.zeros([UNITS, BLOCK_OUT], gl.float32, OUT), mask=m_part & (m_filled == 0))


def pooled_attention(q: Tensor, k: Tensor, rows: Tensor, wanted: Wanted) -> Tensor:
    """Launch the kernel for blocks of 64; ``hopper_usable`` found no reason against it."""
    _, scale, reduce, normalize, lse, span, _ = wanted
    heads, query_slots, head_dim = q.shape[1:]
    kv_heads, num_keys = k.shape[1], span.num_key_blocks(TILE)
    out = torch.empty(span.batch, heads, rows.numel(), num_keys, dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out
    if lse is None:
        lse = query_lse(q, k, rows, wanted)
    padded_dim = 64 if head_dim <= 64 else 128
    group = heads // kv_heads
    with torch.cuda.device(q.device):
        pooled_attention_hopper_kernel[(rows.numel(), span.batch * kv_heads * -(-group // UNITS))](
            tile_descriptor(q, [1, UNITS, 16, padded_dim]),
            tile_descriptor(k, [1, 1, TILE, padded_dim]),
            lse.contiguous(),
            rows.contiguous(),
            span.table,
            out,
            heads,
            group,
            query_slots,
            span.keys,
            num_keys,
            scale * LOG2E.value,
            PADDED_DIM=padded_dim,
            TILE=TILE,
            UNITS=UNITS,
            STAGES=STAGES,
            TABLE=span.table is not None,
            PACKED=span.packed,
            ROW_SUM=reduce == "row_sum",
            NORMALIZE=normalize,
            BLOCK_OUT=256,
            num_warps=NUM_WARPS,
            maxnreg=MAX_REGISTERS,
        )
    return out
