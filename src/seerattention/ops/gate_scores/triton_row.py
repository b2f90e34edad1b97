"""Gate scores of one row of tiles in Triton: the last one of a prompt that does not fill it, beside the Hopper kernel.

A program multiplies all sub-blocks of the row, of all query heads of one KV head, with some tiles' key sub-blocks as
they lie in memory, and takes the maxima between threads: for one row that is far less than a square of tiles, which
takes 64 rows by places.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import power_of_2
from ..indices import num_blocks
from ..triton_launch import launch
from .reference import Tiles
from .triton import limit_of

# A product of a warpgroup, so that it rounds as those of squares do.
LEAST_ROWS = 64
KEYS = 128  # key sub-blocks a program


@triton.jit
def row_product(
    p_q, p_k, i_b, i_kv, o_head, o_place, o_k, num_q, num_k, s_q_b, s_q_h, s_q_n, s_k_b, s_k_h, s_k_n,
    GROUP: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Products of the row's sub-blocks, of a KV head's query heads, and of some key sub-blocks; what is not there
    counts as zeros."""
    o_w = tl.arange(0, WIDTH)
    m_q = (o_head < GROUP) & (o_place < num_q)
    p_own_q = p_q + i_b.to(tl.int64) * s_q_b + i_kv.to(tl.int64) * GROUP * s_q_h
    p_own_k = p_k + i_b.to(tl.int64) * s_k_b + i_kv.to(tl.int64) * s_k_h
    p_rows = p_own_q + (o_head.to(tl.int64) * s_q_h + o_place.to(tl.int64) * s_q_n)[:, None]
    b_q = tl.load(p_rows + o_w[None, :], mask=m_q[:, None], other=0.0)
    b_k = tl.load(p_own_k + (o_k.to(tl.int64) * s_k_n)[None, :] + o_w[:, None], mask=(o_k < num_k)[None, :], other=0.0)
    return tl.dot(b_q, b_k)


@triton.jit(do_not_specialize=["kv_heads", "num_q", "num_k", "row", "end"])
def row_scores_kernel(
    p_q, p_k, p_out, scale, kv_heads, num_q, num_k, row, end, s_out_h, padded, s_q_b, s_q_h, s_q_n, s_k_b, s_k_h, s_k_n,
    GROUP: tl.constexpr, PLACES: tl.constexpr, PITCH: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """``out [B, H, 1, padded]`` of q [B, H, Nq, WIDTH] and k [B, kv_heads, Nk, WIDTH], which are query block ``row``
    and the keys from position 0 on; a row of a product is a sub-block of a query head."""
    i_n, i_b, i_kv = tl.program_id(0), tl.program_id(1) // kv_heads, tl.program_id(1) % kv_heads
    o_m = tl.arange(0, BLOCK_M)
    o_head, o_place = o_m // PLACES, o_m % PLACES
    o_k = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    b_x = row_product(
        p_q, p_k, i_b, i_kv, o_head, o_place, o_k, num_q, num_k, s_q_b, s_q_h, s_q_n, s_k_b, s_k_h, s_k_n, GROUP, WIDTH
    )  # fmt: skip
    o_limit = limit_of(o_place, (row * PLACES + o_place) * PITCH, 0, end, num_q, num_k, PITCH, PITCH)
    b_x = tl.where((o_k * PITCH)[None, :] < o_limit[:, None], b_x, float("-inf"))
    b_x = tl.reshape(b_x, [BLOCK_M // PLACES, PLACES, BLOCK_N // PLACES, PLACES])
    b_best = tl.max(tl.max(b_x, 3), 1) * scale  # [heads, tiles]
    o_h = tl.arange(0, BLOCK_M // PLACES)
    o_n = i_n * (BLOCK_N // PLACES) + tl.arange(0, BLOCK_N // PLACES)
    p_heads = p_out + ((i_b * kv_heads + i_kv).to(tl.int64) * GROUP + o_h) * s_out_h
    tl.store(p_heads[:, None] + o_n[None, :], b_best, mask=(o_h < GROUP)[:, None] & (o_n < padded)[None, :])


def row_scores(q: Tensor, k: Tensor, scores: Tensor, tiles: Tiles) -> None:
    """Writes ``scores [B, Hq, 1, N]``, whose heads lie a stride apart and whose row is padded in memory.

    For maxima of sub-blocks of equal pitches, at least 8 of them a tile, and vectors that are contiguous and 64 or 128
    wide; nothing of ``tiles`` but its sizes, ``scale``, ``first_row`` and ``end`` counts: the row has queries from its
    first sub-block on.
    """
    (batch, heads), padded = scores.shape[:2], scores.stride(2)
    group, places = heads // k.shape[1], tiles.block_size // tiles.q_pitch
    launch(
        row_scores_kernel,
        (num_blocks(padded * places, KEYS), batch * k.shape[1]),
        q,
        k,
        scores,
        tiles.scale,
        k.shape[1],
        q.shape[2],
        k.shape[2],
        tiles.first_row,
        tiles.end,
        scores.stride(1),
        padded,
        *q.stride()[:3],
        *k.stride()[:3],
        GROUP=group,
        PLACES=places,
        PITCH=tiles.q_pitch,
        WIDTH=q.shape[3],
        BLOCK_M=max(LEAST_ROWS, power_of_2(group) * places),
        BLOCK_N=KEYS,
        num_warps=4,
    )
