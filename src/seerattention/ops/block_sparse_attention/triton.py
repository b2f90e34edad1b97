"""Block-sparse FlashAttention forward in Triton: a loop over an index list, no test per block.

Runs on CUDA and ROCm, and on the CPU under TRITON_INTERPRET=1 (float32 and float16). Where few queries meet long lists,
several programs share a list (``triton_parts.py``).
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import dispatch
from ..dispatch import power_of_2
from ..indices import BlockIndices
from ..triton_launch import launch
from ..triton_span import LN2, key_offset, page_of, span_row
from .triton_parts import RUNTIME_SCALARS, empty_results, plan

# Where a grid has fewer programs than that, lists are cut into parts, see ``triton_parts.num_parts``.
PROGRAMS_PER_MULTIPROCESSOR = 1


@triton.jit
def _add_tile(b_p, b_v, b_w, b_max, b_new_max, b_sum, b_out, b_out_w, HALVES: tl.constexpr, PRECISION: tl.constexpr):
    """One step of the running maximum, sum and output of each query: probabilities of a tile, relative to the new
    maximum, and its values."""
    b_decay = tl.exp2(b_max - b_new_max)
    b_sum = b_sum * b_decay + tl.sum(b_p, 1)
    b_p = b_p.to(b_v.dtype)
    b_out = tl.dot(b_p, b_v, b_out * b_decay[:, None], input_precision=PRECISION)
    if HALVES:
        b_out_w = tl.dot(b_p, b_w, b_out_w * b_decay[:, None], input_precision=PRECISION)
    return b_new_max, b_sum, b_out, b_out_w


@triton.jit(do_not_specialize=RUNTIME_SCALARS)
def block_sparse_attention_fwd_kernel(
    p_q, p_k, p_v, s_q_b, s_q_h, s_q_t, s_k_b, s_k_h, s_k_t, s_v_b, s_v_h, s_v_t,
    p_out, p_lse, p_indices, p_counts, p_table, p_pages, s_out_b, s_out_h, s_out_t, s_out_p,
    s_indices_b, s_indices_h, s_indices_r, s_counts_b, s_counts_h, s_counts_r, s_pages_b,
    num_heads, kv_group, list_group, query_slots, key_length, first_row, scale_log2,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, HALVES: tl.constexpr,
    TABLE: tl.constexpr, PACKED: tl.constexpr, PAGE: tl.constexpr, RETURN_LSE: tl.constexpr, IN_PARTS: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: TILE queries of one query block of one head; keys in tiles of TILE.

    IN_PARTS: and only those of one part of the list, of which the second dimension of the grid has the number. HALVES:
    the channels of v and of the output are two tensors each. TABLE, PACKED, PAGE: see ``triton_span.py``; without a
    table the queries are the last ``query_slots`` of ``key_length`` positions.
    """
    V_DIM: tl.constexpr = PADDED_DIM // 2 if HALVES else PADDED_DIM
    SPLIT: tl.constexpr = BLOCK // TILE
    # Later rows have longer lists: start them first, so that the short ones fill the tail of the grid.
    i_tile = tl.num_programs(0) - 1 - tl.program_id(0)
    i_row = i_tile // SPLIT
    i_sub = i_tile % SPLIT
    i_b = (tl.program_id(2) // num_heads).to(tl.int64)
    i_h = (tl.program_id(2) % num_heads).to(tl.int64)
    i_kv = i_h // kv_group
    i_list = i_h // list_group

    query_slot, start, length, key_slot = span_row(p_table, i_b, query_slots, key_length, TABLE)
    i_batch = i_b * 0 if PACKED else i_b  # of q, k, v and the results
    if TABLE:
        first_row = start // BLOCK
        key_length = start + length

    o_t = tl.arange(0, TILE)
    o_d = tl.arange(0, PADDED_DIM)
    m_d = o_d < HEAD_DIM
    # Positions; those before the first query or after the last key belong to partial blocks.
    o_query = (first_row + i_row) * BLOCK + i_sub * TILE + o_t
    o_slot = o_query - start
    m_query = (o_slot >= 0) & (o_query < key_length)
    if TABLE:
        o_slot += query_slot
    p_q += i_batch * s_q_b + i_h * s_q_h
    # [TILE, D]
    b_q = tl.load(
        p_q + o_slot.to(tl.int64)[:, None] * s_q_t + o_d[None, :], mask=m_query[:, None] & m_d[None, :], other=0.0
    )
    if PAGE:
        p_pages += i_b * s_pages_b
        p_k += i_kv * s_k_h
        p_v += i_kv * s_v_h
    else:
        p_k += i_batch * s_k_b + i_kv * s_k_h
        p_v += i_batch * s_v_b + i_kv * s_v_h
        if TABLE:
            p_k += key_slot * s_k_t
            p_v += key_slot * s_v_t
    o_k = o_t.to(tl.int64)[:, None] * s_k_t + o_d[None, :]
    o_dv = tl.arange(0, V_DIM)
    m_dv, m_dw = o_dv < HEAD_DIM, V_DIM + o_dv < HEAD_DIM
    o_v = o_t.to(tl.int64)[:, None] * s_v_t + o_dv[None, :]
    p_w = p_v + V_DIM  # the second half of v, and below b_w and b_out_w

    count = tl.load(p_counts + i_b * s_counts_b + i_list * s_counts_h + i_row.to(tl.int64) * s_counts_r)
    p_list = p_indices + i_b * s_indices_b + i_list * s_indices_h + i_row.to(tl.int64) * s_indices_r
    if TABLE:  # programs without a query have nothing to do, whatever the list says
        tile = (first_row + i_row) * BLOCK + i_sub * TILE
        count = tl.where((tile + TILE > start) & (tile < key_length) & (length > 0), count, 0)
    if IN_PARTS:
        i_part = tl.program_id(1)
        begin = count * i_part // tl.num_programs(1)
        count = count * (i_part + 1) // tl.num_programs(1) - begin
        p_list += begin
        i_part = i_part.to(tl.int64)
        p_out += i_part * s_out_p
        p_lse += i_part * (num_heads if PACKED else tl.num_programs(2)) * query_slots
    # Lists ascend, so the diagonal block, if listed, is the last entry. Everything before it is visible as a whole, and
    # so are the key tiles of the diagonal block that lie before this program's queries.
    last = tl.load(p_list + tl.maximum(count - 1, 0))
    has_diagonal = (count > 0) & (last == first_row + i_row)
    num_tiles = count * SPLIT
    if has_diagonal:
        num_tiles = (count - 1) * SPLIT + i_sub
    # A tile that lies wholly past the last key (TILE < BLOCK) stores nothing, and key tiles before it may be partial.
    if SPLIT > 1:
        num_tiles = tl.where((first_row + i_row) * BLOCK + i_sub * TILE < key_length, num_tiles, 0)

    b_max = tl.full([TILE], float("-inf"), tl.float32)
    b_sum = tl.zeros([TILE], tl.float32)
    b_out = tl.zeros([TILE, V_DIM], tl.float32)
    b_out_w = tl.zeros([TILE, V_DIM], tl.float32) if HALVES else 0.0
    # The next index is carried from iteration to iteration: only then can the loads of K and V be pipelined.
    i_key, i_page = tl.load(p_list), 0
    if PAGE:
        i_page = page_of(p_pages, i_key, count > 0, BLOCK, PAGE)
    for i in tl.range(0, num_tiles, num_stages=STAGES):
        o_key = (i_key * BLOCK + (i % SPLIT) * TILE).to(tl.int64)
        k_start, v_start = key_offset(o_key, i_page, s_k_b, s_k_t, PAGE), key_offset(o_key, i_page, s_v_b, s_v_t, PAGE)
        i_key = tl.load(p_list + tl.minimum((i + 1) // SPLIT, count - 1))
        if PAGE:
            i_page = page_of(p_pages, i_key, True, BLOCK, PAGE)
        # [TILE, D]
        if HEAD_DIM == PADDED_DIM:
            b_k = tl.load(p_k + k_start + o_k)
            b_v = tl.load(p_v + v_start + o_v)
            b_w = tl.load(p_w + v_start + o_v) if HALVES else 0.0
        else:
            b_k = tl.load(p_k + k_start + o_k, mask=m_d[None, :], other=0.0)
            b_v = tl.load(p_v + v_start + o_v, mask=m_dv[None, :], other=0.0)
            b_w = tl.load(p_w + v_start + o_v, mask=m_dw[None, :], other=0.0) if HALVES else 0.0
        # [TILE, TILE]
        b_scores = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        b_new_max = tl.maximum(b_max, tl.max(b_scores, 1) * scale_log2)
        b_p = tl.exp2(b_scores * scale_log2 - b_new_max[:, None])
        b_max, b_sum, b_out, b_out_w = _add_tile(
            b_p, b_v, b_w, b_max, b_new_max, b_sum, b_out, b_out_w, HALVES, PRECISION
        )

    if has_diagonal:
        o_key = (first_row + i_row) * BLOCK + i_sub * TILE + o_t
        m_key = o_key < key_length
        tile_start = (last * BLOCK + i_sub * TILE).to(tl.int64)
        if PAGE:
            i_page = page_of(p_pages, last, True, BLOCK, PAGE)
        k_start = key_offset(tile_start, i_page, s_k_b, s_k_t, PAGE)
        v_start = key_offset(tile_start, i_page, s_v_b, s_v_t, PAGE)
        # [TILE, D]
        b_k = tl.load(p_k + k_start + o_k, mask=m_key[:, None] & m_d[None, :], other=0.0)
        b_v = tl.load(p_v + v_start + o_v, mask=m_key[:, None] & m_dv[None, :], other=0.0)
        b_w = tl.load(p_w + v_start + o_v, mask=m_key[:, None] & m_dw[None, :], other=0.0) if HALVES else 0.0
        b_scores = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale_log2
        # Queries past the last key see every real key here; what they compute is never stored.
        b_scores = tl.where((o_query[:, None] >= o_key[None, :]) & m_key[None, :], b_scores, float("-inf"))
        # A tile that lies wholly past the last key (TILE < BLOCK) has no key at all: keep -inf - -inf out of exp2.
        b_new_max = tl.maximum(tl.maximum(b_max, tl.max(b_scores, 1)), -1e30)
        b_p = tl.exp2(b_scores - b_new_max[:, None])
        b_max, b_sum, b_out, b_out_w = _add_tile(
            b_p, b_v, b_w, b_max, b_new_max, b_sum, b_out, b_out_w, HALVES, PRECISION
        )

    # A row without keys has sum 0: output 0, lse -inf.
    m_seen = b_sum > 0
    b_seen = tl.where(m_seen, b_sum, 1.0)[:, None]
    p_out += i_batch * s_out_b + i_h * s_out_h
    p_out = p_out + o_slot.to(tl.int64)[:, None] * s_out_t + o_dv[None, :]
    tl.store(p_out, (b_out / b_seen).to(p_out.dtype.element_ty), mask=m_query[:, None] & m_dv[None, :])
    if HALVES:
        b_out_w = (b_out_w / b_seen).to(p_out.dtype.element_ty)
        tl.store(p_out + V_DIM, b_out_w, mask=m_query[:, None] & m_dw[None, :])
    if RETURN_LSE:
        b_lse = tl.where(m_seen, (b_max + tl.log2(tl.where(m_seen, b_sum, 1.0))) * LN2, float("-inf"))
        tl.store(p_lse + (i_batch * num_heads + i_h) * query_slots + o_slot, b_lse, mask=m_query)


def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, blocks: BlockIndices, scale: float, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Launch the kernel; arguments as checked by the interface.

    Returns:
        ``out`` in shape, dtype and memory order of q, and the natural-log ``lse``, float32, q's shape without the last
        dimension, or None.
    """
    head_dim, block_size = q.shape[3], blocks.block_size
    tile, num_warps, num_stages = _launch_shape(q.dtype, head_dim, block_size, dispatch.shared_memory(q.device))
    planned = plan(q, k, blocks, scale, return_lse, tile, PROGRAMS_PER_MULTIPROCESSOR)
    if planned is None:
        return empty_results(q, return_lse)
    launch(
        block_sparse_attention_fwd_kernel,
        (planned.programs, planned.parts, planned.batch * q.shape[1]),
        q,
        k,
        v,
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        *planned.arguments,
        HEAD_DIM=head_dim,
        PADDED_DIM=max(16, power_of_2(head_dim)),
        TILE=tile,
        HALVES=_in_halves(q, tile),
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        STAGES=num_stages,
        num_warps=num_warps,
        **planned.constants,
    )
    return planned.results()


def _in_halves(q: Tensor, tile: int) -> bool:
    """Whether products with v are to be two, of half of its channels each.

    Where products take their operands from registers (before Hopper, and on consumers' GPUs), Triton deals a product
    out to the warps by columns if it has more columns than rows, and the product of scores with it. Every warp then
    holds all the queries, probabilities travel through shared memory, and registers spill. Halves are as wide as high.
    """
    if q.dtype == torch.float32 or tile != 64 or not 64 < q.shape[3] <= 128:
        return False
    return dispatch.capability(q.device) not in (0, 9, 10)


@functools.cache
def _launch_shape(dtype: torch.dtype, head_dim: int, block_size: int, shared_memory: int) -> tuple[int, int, int]:
    """Tile size, warps and pipeline stages: fixed by head_dim and dtype, within the device's shared memory."""
    padded_dim = max(16, power_of_2(head_dim))
    if dtype == torch.float32:
        # IEEE float32 products run on the ordinary cores with operands in registers: small tiles spill least.
        tile, num_warps = (32, 8) if padded_dim <= 128 else (16, 4)
    else:
        tile = min(block_size, 64)
        num_warps = 8 if padded_dim > 128 and tile == 64 else 4
    tile_bytes = tile * padded_dim * dtype.itemsize
    # q, and k and v once a stage; 4 KiB for reductions.
    stages = (shared_memory - 4096 - tile_bytes) // (2 * tile_bytes)
    return tile, num_warps, max(1, min(3, stages))
