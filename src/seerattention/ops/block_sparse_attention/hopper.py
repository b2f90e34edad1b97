"""Block-sparse FlashAttention forward for Hopper GPUs (compute capability 9.0) in Gluon.

The same loop over an index list as ``triton.py``, with tiles of 64 queries and 64 keys, K and V brought in by the
tensor copy engine (TMA) and both products on ``wgmma``. A tile is little work, so latency is hidden by neighbours and
not by depth: a program is one warpgroup with a single buffer for K and one for V, each refilled as soon as the product
that read it is done, and several programs share a multiprocessor (``MAX_REGISTERS``). What bounds it is the L2 cache,
from which every query block reads its own tiles: 32 KiB for 2 MFLOP at head_dim 128 (docs/experiments.md). Where few
queries meet long lists, several programs share a list (``triton_parts.py``).

TMA checks bounds itself: rows of partial blocks that lie before the first query or after the last key, and columns past
head_dim, arrive as zeros. What it demands of addresses and strides is checked by ``hopper_usable`` in ``interface.py``.

Gluon is an experimental interface that moves between versions of triton; ``dispatch.GLUON_VERSIONS`` lists those for
which this file has been compiled, and ``tests/ops/test_offline_compile.py`` compiles it without a GPU.
"""

from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ..hopper import copy_tile, key_place, pin, thread_barrier, tile_descriptor
from ..indices import BlockIndices
from ..triton_launch import launch
from ..triton_span import LN2
from .triton_parts import RUNTIME_SCALARS, empty_results, plan

TILE = 64
NUM_WARPS = 4  # one warpgroup: what a wgmma of 64 rows takes
# Registers a thread by padded head_dim, which set how many programs of 128 threads share the 65536 registers of a
# multiprocessor: 5 and 4. With fewer registers ptxas serialises the wgmma even before it spills.
MAX_REGISTERS = {64: 96, 128: 128}
# Where a grid has fewer programs than that, lists are cut into parts, see ``triton_parts.num_parts``.
PROGRAMS_PER_MULTIPROCESSOR = {64: 2, 128: 1}


@gluon.jit
def _key_start(p_list, i_tile, BLOCK: gl.constexpr, TILE: gl.constexpr):
    """Position of the first key of the i-th tile on a list."""
    SPLIT: gl.constexpr = BLOCK // TILE
    return gl.load(p_list + i_tile // SPLIT) * BLOCK + (i_tile % SPLIT) * TILE


@gluon.jit
def _softmax_step(b_scores, b_max, b_sum, scale_log2):
    """Probabilities relative to the new running maximum, what decays the old ones, and the new maximum and sum."""
    b_new_max = gl.maximum(b_max, gl.max(b_scores, 1) * scale_log2)
    b_p = gl.exp2(b_scores * scale_log2 - b_new_max[:, None])
    b_decay = gl.exp2(b_max - b_new_max)
    return b_p, b_decay, b_new_max, b_sum * b_decay + gl.sum(b_p, 1)


@gluon.jit(do_not_specialize=RUNTIME_SCALARS)
def block_sparse_attention_hopper_kernel(
    d_q, d_k, d_v, p_out, p_lse, p_indices, p_counts, p_table, p_pages, s_out_b, s_out_h, s_out_t, s_out_p, s_indices_b,
    s_indices_h, s_indices_r, s_counts_b, s_counts_h, s_counts_r, s_pages_b, num_heads, kv_group, list_group,
    query_slots, key_length, first_row, scale_log2, HEAD_DIM: gl.constexpr, PADDED_DIM: gl.constexpr,
    BLOCK: gl.constexpr, TILE: gl.constexpr, TABLE: gl.constexpr, PACKED: gl.constexpr, PAGE: gl.constexpr,
    RETURN_LSE: gl.constexpr, IN_PARTS: gl.constexpr,
):  # fmt: skip
    """One program: TILE queries of one query block of one head; keys in tiles of TILE.

    IN_PARTS: and only those of one part of the list, of which the second dimension of the grid has the number;
    results are float32 then. TABLE, PACKED, PAGE: see ``triton_span.py``; without a table the queries are the last
    ``query_slots`` of ``key_length`` positions.
    """
    SPLIT: gl.constexpr = BLOCK // TILE
    DTYPE: gl.constexpr = d_q.dtype
    SCORES: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, TILE, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, PADDED_DIM, 16]
    )
    P: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=OUT, k_width=2)
    SCORES_ROW: gl.constexpr = gl.SliceLayout(1, SCORES)
    OUT_ROW: gl.constexpr = gl.SliceLayout(1, OUT)
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [256 // PADDED_DIM, PADDED_DIM // 8], [4, 1], [1, 0])

    smem_q = gl.allocate_shared_memory(DTYPE, [1, 1, TILE, PADDED_DIM], d_q.layout)
    smem_k = gl.allocate_shared_memory(DTYPE, [1, 1, TILE, PADDED_DIM], d_k.layout)
    smem_v = gl.allocate_shared_memory(DTYPE, [1, 1, TILE, PADDED_DIM], d_v.layout)
    bar_q = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    bar_k = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    bar_v = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    bar_pin = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(bar_pin, count=1)
    mbarrier.init(bar_q, count=1)
    mbarrier.init(bar_k, count=1)
    mbarrier.init(bar_v, count=1)

    # Programs that run at one time are neighbours in this order: the query heads of one KV head side by side, so that
    # what their lists share is still in the L2 cache; and later rows, which have longer lists, first, so that the short
    # ones fill the tail of the grid.
    i_tile = gl.num_programs(0) // kv_group - 1 - gl.program_id(0) // kv_group
    i_row = i_tile // SPLIT
    i_sub = i_tile % SPLIT
    num_kv_heads = num_heads // kv_group
    i_b = gl.program_id(2) // num_kv_heads
    i_kv = gl.program_id(2) % num_kv_heads
    i_h = i_kv * kv_group + gl.program_id(0) % kv_group
    i_list = (i_h // list_group).to(gl.int64)
    i_batch = i_b * 0 if PACKED else i_b  # of q, k, v and the results
    start, length, query_slot, key_slot = key_length - query_slots, query_slots, 0, 0
    if TABLE:
        p_table += i_b * 4
        query_slot, start, length = gl.load(p_table), gl.load(p_table + 1), gl.load(p_table + 2)
        key_slot = gl.load(p_table + 3)
        first_row = start // BLOCK
    if PAGE:
        p_pages += i_b.to(gl.int64) * s_pages_b
    # Position of the first query of the tile, and its index, negative where a chunk starts inside a block.
    diagonal = first_row + i_row
    tile = diagonal * BLOCK + i_sub * TILE
    local = tile - start
    if TABLE:
        m_tile = (local + TILE > 0) & (local < length)  # whether the tile has a query
    else:
        m_tile = True

    copy_tile(d_q, i_batch, i_h, local + query_slot, bar_q, smem_q, m_tile)
    # Nearly every list has the diagonal, whose place is known: its tile is on its way before the list has been read. Of
    # the parts of a list the last one has it.
    if IN_PARTS:
        m_ahead = (gl.program_id(1) == gl.num_programs(1) - 1) & m_tile
    else:
        m_ahead = m_tile
    k_row, o_key = key_place(p_pages, tile, i_batch, key_slot, m_ahead, PAGE)
    copy_tile(d_k, k_row, i_kv, o_key, bar_k, smem_k, m_ahead)
    copy_tile(d_v, k_row, i_kv, o_key, bar_v, smem_v, m_ahead)

    count = gl.load(p_counts + i_b.to(gl.int64) * s_counts_b + i_list * s_counts_h + i_row.to(gl.int64) * s_counts_r)
    p_list = p_indices + i_b.to(gl.int64) * s_indices_b + i_list * s_indices_h + i_row.to(gl.int64) * s_indices_r
    if TABLE:
        count = count * m_tile.to(gl.int32)
    ahead = 1  # tiles copied before those of the list
    if IN_PARTS or TABLE:
        ahead = m_ahead.to(gl.int32)
    if IN_PARTS:
        i_part = gl.program_id(1)
        begin = count * i_part // gl.num_programs(1)
        count = count * (i_part + 1) // gl.num_programs(1) - begin
        p_list += begin
        i_part = i_part.to(gl.int64)
        p_out += i_part * s_out_p
        p_lse += i_part * (num_heads if PACKED else gl.num_programs(2) * kv_group) * query_slots
    # Lists ascend, so the diagonal block, if listed, is the last entry. Of its tiles, those before this program's
    # queries are visible as a whole, like all the blocks before it; one needs the causal mask; the rest is not visible.
    last = gl.load(p_list + gl.maximum(count - 1, 0))
    has_diagonal = (count > 0) & (last == diagonal)
    num_whole = count * SPLIT
    if has_diagonal:
        num_whole = (count - 1) * SPLIT + i_sub
    # The slot read for an empty list is undefined, but then nothing is copied.
    o_key = _key_start(p_list, 0, BLOCK, TILE)
    k_row, o_key = key_place(p_pages, o_key, i_batch, key_slot, num_whole > 0, PAGE)

    b_q = smem_q.reshape([TILE, PADDED_DIM])
    b_kt = smem_k.reshape([TILE, PADDED_DIM]).permute((1, 0))
    b_v = smem_v.reshape([TILE, PADDED_DIM])
    b_max = gl.full([TILE], float("-inf"), gl.float32, SCORES_ROW)
    b_sum = gl.zeros([TILE], gl.float32, SCORES_ROW)
    b_out = gl.zeros([TILE, PADDED_DIM], gl.float32, OUT)
    b_zero = gl.zeros([TILE, TILE], gl.float32, SCORES)
    # Waited for even where there is nothing to do: a program must not end with a copy under way.
    if m_tile:
        mbarrier.wait(bar_q, 0)

    if has_diagonal:
        mbarrier.wait(bar_k, 0)
        b_scores = warpgroup_mma(b_q, b_kt, b_zero, use_acc=False, is_async=True)
        b_scores = warpgroup_mma_wait(0, deps=(b_scores,))
        copy_tile(d_k, k_row, i_kv, o_key, bar_k, smem_k, num_whole > 0)
        pin(bar_pin)
        # Queries and keys of this tile start at one position. Causality also hides the keys past key_length from every
        # query that is stored.
        o_m = gl.arange(0, TILE, layout=SCORES_ROW)
        o_n = gl.arange(0, TILE, layout=gl.SliceLayout(0, SCORES))
        b_scores = gl.where(o_m[:, None] >= o_n[None, :], b_scores, float("-inf"))
        b_p, _, b_max, b_sum = _softmax_step(b_scores, b_max, b_sum, scale_log2)
        b_p = gl.convert_layout(b_p.to(DTYPE), P)
        mbarrier.wait(bar_v, 0)
        if TABLE:  # noqa: SIM102 (a constant, and not)
            # What follows the last value is anything, NaN too, which a probability of 0 does not hide.
            if local + TILE > length:
                b_rows = b_v.load(ROWS)
                m_value = local + gl.arange(0, TILE, layout=gl.SliceLayout(1, ROWS)) < length
                b_v.store(gl.where(m_value[:, None], b_rows, 0.0))
                fence_async_shared()
                thread_barrier()
        b_out = warpgroup_mma(b_p, b_v, b_out, is_async=True)
        b_out = warpgroup_mma_wait(0, deps=(b_out,))
        copy_tile(d_v, k_row, i_kv, o_key, bar_v, smem_v, num_whole > 0)
    else:
        if m_ahead:
            mbarrier.wait(bar_k, 0)
            mbarrier.wait(bar_v, 0)
        copy_tile(d_k, k_row, i_kv, o_key, bar_k, smem_k, num_whole > 0)
        copy_tile(d_v, k_row, i_kv, o_key, bar_v, smem_v, num_whole > 0)

    for i in range(num_whole):
        # Never past the list, whose spare slots are undefined. Read early, so that the load hides behind the product.
        m_more = i + 1 < num_whole
        o_key = _key_start(p_list, gl.minimum(i + 1, num_whole - 1), BLOCK, TILE)
        k_row, o_key = key_place(p_pages, o_key, i_batch, key_slot, True, PAGE)
        mbarrier.wait(bar_k, (i + ahead) & 1)
        b_scores = warpgroup_mma(b_q, b_kt, b_zero, use_acc=False, is_async=True)
        b_scores = warpgroup_mma_wait(0, deps=(b_scores,))
        copy_tile(d_k, k_row, i_kv, o_key, bar_k, smem_k, m_more)
        pin(bar_pin)
        b_p, b_decay, b_max, b_sum = _softmax_step(b_scores, b_max, b_sum, scale_log2)
        b_out = b_out * gl.convert_layout(b_decay, OUT_ROW)[:, None]
        b_p = gl.convert_layout(b_p.to(DTYPE), P)
        mbarrier.wait(bar_v, (i + ahead) & 1)
        b_out = warpgroup_mma(b_p, b_v, b_out, is_async=True)
        b_out = warpgroup_mma_wait(0, deps=(b_out,))
        copy_tile(d_v, k_row, i_kv, o_key, bar_v, smem_v, m_more)

    # A row without keys has sum 0: output 0, lse -inf.
    b_seen = gl.where(b_sum > 0, b_sum, 1.0)
    b_out = b_out * (1.0 / gl.convert_layout(b_seen, OUT_ROW))[:, None]
    if RETURN_LSE:
        b_lse = gl.where(b_sum > 0, (b_max + gl.log2(b_seen)) * LN2, float("-inf"))
        o_local = local + gl.arange(0, TILE, layout=SCORES_ROW)
        p_lse += (i_batch.to(gl.int64) * num_heads + i_h) * query_slots + query_slot
        gl.store(p_lse + o_local, b_lse, mask=(o_local >= 0) & (o_local < length))
    p_out += i_batch.to(gl.int64) * s_out_b + i_h.to(gl.int64) * s_out_h
    if TABLE:
        p_out += query_slot.to(gl.int64) * s_out_t
    if IN_PARTS:
        o_local = local + gl.arange(0, TILE, layout=OUT_ROW)
        o_d = gl.arange(0, PADDED_DIM, layout=gl.SliceLayout(0, OUT))
        m_out = ((o_local >= 0) & (o_local < length))[:, None] & (o_d < HEAD_DIM)[None, :]
        gl.store(p_out + o_local.to(gl.int64)[:, None] * s_out_t + o_d[None, :], b_out, mask=m_out)
    else:
        # Through the buffer of q, which nothing reads any more, into whole rows of 16 bytes a thread.
        b_q.store(b_out.to(DTYPE))
        b_rows = b_q.load(ROWS)
        o_local = local + gl.arange(0, TILE, layout=gl.SliceLayout(1, ROWS))
        o_d = gl.arange(0, PADDED_DIM, layout=gl.SliceLayout(0, ROWS))
        m_out = ((o_local >= 0) & (o_local < length))[:, None] & (o_d < HEAD_DIM)[None, :]
        gl.store(p_out + o_local.to(gl.int64)[:, None] * s_out_t + o_d[None, :], b_rows, mask=m_out)


def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, blocks: BlockIndices, scale: float, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """As in ``triton.py``; ``hopper_usable`` found no reason against it."""
    padded_dim, num_kv_heads = 64 if q.shape[3] <= 64 else 128, k.shape[1]
    planned = plan(q, k, blocks, scale, return_lse, TILE, PROGRAMS_PER_MULTIPROCESSOR[padded_dim])
    if planned is None:
        return empty_results(q, return_lse)
    tile = [1, 1, TILE, padded_dim]
    programs = planned.programs * (q.shape[1] // num_kv_heads)  # of one KV head
    launch(
        block_sparse_attention_hopper_kernel,
        (programs, planned.parts, planned.batch * num_kv_heads),
        tile_descriptor(q, tile),
        tile_descriptor(k, tile),
        tile_descriptor(v, tile),
        *planned.arguments,
        HEAD_DIM=q.shape[3],
        PADDED_DIM=padded_dim,
        TILE=TILE,
        num_warps=NUM_WARPS,
        maxnreg=MAX_REGISTERS[padded_dim],
        **planned.constants,
    )
    return planned.results()
