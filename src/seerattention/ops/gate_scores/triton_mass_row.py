"""Gate scores of ``reduce="mass"`` of one row of tiles in Triton: the last one of a prompt that does not fill it.

It is for the Hopper kernel (``hopper_mass.py``), as ``triton_row.py`` is for that of maxima: a product is of all query
heads of a KV head, while squares of tiles take 64 rows by places, twice (``triton_mass.py``).

A row has too few query sub-blocks to keep a GPU busy with heads alone, so its keys are shared out in *chunks*. Shares
are of sums over all of them, which no program knows: the first kernel makes the products, once, and writes logarithms
(to the base of 2) of sums of their powers, of each tile and of the chunk; the second one adds up those of chunks,
subtracts, and takes the largest share of the query sub-blocks. Powers are relative to the largest of a chunk: a tile
whose sum that makes smaller than ``LEAST_MASS`` has a share that is smaller still.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..indices import num_blocks
from ..triton_launch import launch
from ..triton_span import LOG2E
from .reference import Tiles
from .triton import LOWEST, limit_of
from .triton_mass import LEAST_MASS
from .triton_row import row_product

# Query sub-blocks of all heads of a program: a product of a warpgroup. More heads are other programs, as twice the rows
# would take twice the registers.
ROWS = 64
KEYS = 128  # key sub-blocks of a chunk
COLUMNS = 64  # tiles that a program of the second kernel writes
CHUNKS = 128  # that it reads at a time: those of 64K tokens in sub-blocks of 4
LEAST_LOG = tl.constexpr(math.log2(LEAST_MASS.value))


@triton.jit(do_not_specialize=["kv_heads", "num_q", "num_k", "row", "end", "chunks"])
def row_sums_kernel(
    p_q, p_k, p_tiles, p_chunks, scale, kv_heads, num_q, num_k, row, end, chunks, s_q_b, s_q_h, s_q_n, s_k_b, s_k_h,
    s_k_n, GROUP: tl.constexpr, BLOCK: tl.constexpr, Q_PITCH: tl.constexpr, K_PITCH: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Sums over the key sub-blocks of tiles and of chunks, ``[B, H, BLOCK // Q_PITCH, chunks * TILES]`` and ``[...,
    chunks]``; a row of a product is a sub-block of a query head."""
    PLACES: tl.constexpr = BLOCK // Q_PITCH
    HEADS: tl.constexpr = BLOCK_M // PLACES
    PARTS: tl.constexpr = (GROUP + HEADS - 1) // HEADS  # programs that share the query heads of a KV head
    TILES: tl.constexpr = BLOCK_N * K_PITCH // BLOCK
    i_c, i_bkv, i_part = tl.program_id(0), tl.program_id(1) // PARTS, tl.program_id(1) % PARTS
    i_b, i_kv = i_bkv // kv_heads, i_bkv % kv_heads
    o_m = tl.arange(0, BLOCK_M)
    o_head, o_place = i_part * HEADS + o_m // PLACES, o_m % PLACES
    o_k = i_c * BLOCK_N + tl.arange(0, BLOCK_N)
    b_x = row_product(
        p_q, p_k, i_b, i_kv, o_head, o_place, o_k, num_q, num_k, s_q_b, s_q_h, s_q_n, s_k_b, s_k_h, s_k_n, GROUP, WIDTH
    )  # fmt: skip
    b_x *= scale * LOG2E
    o_limit = limit_of(o_place, row * BLOCK + o_place * Q_PITCH, 0, end, num_q, num_k, Q_PITCH, K_PITCH)
    b_x = tl.where((o_k * K_PITCH)[None, :] < o_limit[:, None], b_x, float("-inf"))
    b_best = tl.maximum(tl.max(b_x, 1), LOWEST)
    b_sum = tl.sum(tl.reshape(tl.exp2(b_x - b_best[:, None]), [BLOCK_M, TILES, BLOCK // K_PITCH]), 2)
    o_row = (i_bkv.to(tl.int64) * GROUP + o_head) * PLACES + o_place
    p_own_tiles = p_tiles + (o_row * chunks + i_c)[:, None] * TILES + tl.arange(0, TILES)[None, :]
    m_head = o_head < GROUP
    # The largest product adds 1 to its chunk: one with a smaller sum has none, and stays LOWEST.
    tl.store(p_own_tiles, b_best[:, None] + tl.log2(tl.maximum(b_sum, LEAST_MASS)), mask=m_head[:, None])
    tl.store(p_chunks + o_row * chunks + i_c, b_best + tl.log2(tl.maximum(tl.sum(b_sum, 1), 1.0)), mask=m_head)


@triton.jit(do_not_specialize=["row", "chunks"])
def row_shares_kernel(
    p_tiles, p_chunks, p_out, row, chunks, s_out_h, padded, PLACES: tl.constexpr, TILES: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """``out [B, H, 1, padded]``, which is query block ``row``, of what the other kernel wrote; -inf behind the row."""
    i_n, i_bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_row = i_bh * PLACES + tl.arange(0, PLACES)
    b_best = tl.full([PLACES], LOWEST, tl.float32)
    b_sum = tl.zeros([PLACES], tl.float32)
    for first in tl.range(0, chunks, BLOCK_C):
        o_c = first + tl.arange(0, BLOCK_C)
        p_own_chunks = p_chunks + (o_row * chunks)[:, None] + o_c[None, :]
        b_x = tl.load(p_own_chunks, mask=(o_c < chunks)[None, :], other=LOWEST)
        b_new = tl.maximum(b_best, tl.max(b_x, 1))
        b_sum = b_sum * tl.exp2(b_best - b_new) + tl.sum(tl.exp2(b_x - b_new[:, None]), 1)
        b_best = b_new
    b_total = b_best + tl.log2(tl.maximum(b_sum, 1.0))  # the largest chunk adds 1
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n <= row
    p_own_tiles = p_tiles + (o_row * (chunks * TILES))[:, None] + o_n[None, :]
    b_x = tl.load(p_own_tiles, mask=m_n[None, :], other=LOWEST)
    b_x = tl.maximum(b_x - b_total[:, None], LEAST_LOG)
    b_x = tl.where((b_best > LOWEST)[:, None], b_x, float("-inf"))  # of query sub-blocks that see something
    b_out = tl.where(m_n, tl.max(b_x, 0) / LOG2E, float("-inf"))
    tl.store(p_out + i_bh * s_out_h + o_n, b_out, mask=o_n < padded)


def mass_row_scores(q: Tensor, k: Tensor, scores: Tensor, tiles: Tiles) -> None:
    """Writes the natural logarithms of shares of one row.

    Args:
        q: ``[B, Hq, Nq, W]``, the query sub-blocks of the row from its first one on, contiguous vectors 64 or 128 wide.
        k: ``[B, Hk, Nk, W]``, dtype of q, from position 0 on; Hq is a multiple of Hk.
        scores: float32 ``[B, Hq, 1, N]``, whose heads lie a stride apart and whose row is padded in memory
            (``interface.empty_scores``).
        tiles: nothing but its sizes, ``scale``, ``first_row`` and ``end`` counts. A tile has 1, 2, 4, ... or 64
            sub-blocks on each side.

    Allocates 4 bytes for each query head, place of queries and tile, and an eighth of that (of sub-blocks of 4 tokens):
    1.1 MiB for 32 heads and the 512 tiles of 32K tokens.
    """
    write_row_shares(*row_sums(q, k, tiles), scores, tiles)


def row_sums(q: Tensor, k: Tensor, tiles: Tiles) -> tuple[Tensor, Tensor]:
    """Of tiles and of chunks, to the base of 2: float32 ``[B, Hq, places, chunks * tiles of a chunk]`` and ``[B, Hq,
    places, chunks]``; the keys behind the row are not read."""
    (batch, heads), kv_heads = q.shape[:2], k.shape[1]
    group, places, tile_keys = heads // kv_heads, tiles.block_size // tiles.q_pitch, tiles.block_size // tiles.k_pitch
    chunks = num_blocks((tiles.first_row + 1) * tile_keys, KEYS)
    sums = [
        torch.empty(batch, heads, places, columns, dtype=torch.float32, device=q.device)
        for columns in (chunks * (KEYS // tile_keys), chunks)
    ]
    launch(
        row_sums_kernel,
        (chunks, batch * kv_heads * num_blocks(group, ROWS // places)),
        q,
        k,
        *sums,
        tiles.scale,
        kv_heads,
        q.shape[2],
        k.shape[2],
        tiles.first_row,
        tiles.end,
        chunks,
        *q.stride()[:3],
        *k.stride()[:3],
        GROUP=group,
        BLOCK=tiles.block_size,
        Q_PITCH=tiles.q_pitch,
        K_PITCH=tiles.k_pitch,
        WIDTH=q.shape[3],
        BLOCK_M=ROWS,
        BLOCK_N=KEYS,
        num_warps=4,
    )
    return sums[0], sums[1]


def write_row_shares(tile_sums: Tensor, chunk_sums: Tensor, scores: Tensor, tiles: Tiles) -> None:
    """The second of the two launches."""
    batch, heads, places, chunks = chunk_sums.shape
    padded = scores.stride(2)
    launch(
        row_shares_kernel,
        (num_blocks(padded, COLUMNS), batch * heads),
        tile_sums,
        chunk_sums,
        scores,
        tiles.first_row,
        chunks,
        scores.stride(1),
        padded,
        PLACES=places,
        TILES=tile_sums.shape[3] // chunks,
        BLOCK_N=COLUMNS,
        BLOCK_C=CHUNKS,
        num_warps=4,
    )
