"""Gate scores of ``reduce="mass"`` in Triton: the log-sum-exp of each query sub-block, then its share of each tile.

Two kernels that make the same products, as of all products of a row nothing can be kept. The first goes along a row,
128 query sub-blocks at a time; the second is shaped as that of the other reductions: products of one place in their
tiles at a time, so that what is added up, and compared, lies with one thread.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..indices import num_blocks
from ..triton_launch import launch
from ..triton_span import LOG2E
from . import reference
from .reference import Tiles
from .triton import (
    LOWEST,
    limit_of,
    part_of,
    score_arguments,
    score_constants,
    score_strides,
    store_scores,
    warps_of,
)

LEAST_MASS = tl.constexpr(reference.LEAST_MASS)

# Not specialised, so that a prompt of another length does not compile the kernels again.
_COUNTS = ["heads", "group", "num_q", "num_k", "num_rows", "first_row", "start", "end"]


@triton.jit
def _product(b_q, p_q_rows, p_k_rows, m_q, m_k, width, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
             BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr, WHOLE: tl.constexpr):  # fmt: skip
    """``[BLOCK_M, BLOCK_N]``; WHOLE: of b_q, else of what lies at ``p_q_rows``, in parts."""
    b_x = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if WHOLE:
        o_w = tl.arange(0, BLOCK_W)
        b_k = tl.load(p_k_rows + o_w[:, None], mask=m_k[None, :] & (o_w < width)[:, None], other=0.0)
        b_x = tl.dot(b_q, b_k, b_x, input_precision=PRECISION)
    else:
        for i_w in range(0, width, BLOCK_W):
            o_w = i_w + tl.arange(0, BLOCK_W)
            m_w = o_w < width
            b_part = tl.load(p_q_rows + o_w[None, :], mask=m_q[:, None] & m_w[None, :], other=0.0)
            b_k = tl.load(p_k_rows + o_w[:, None], mask=m_k[None, :] & m_w[:, None], other=0.0)
            b_x = tl.dot(b_part, b_k, b_x, input_precision=PRECISION)
    return b_x


@triton.jit
def _queries(p_q_rows, m_q, width, BLOCK_W: tl.constexpr):
    """The first ``BLOCK_W`` channels ``[BLOCK_M, BLOCK_W]``, which are all where vectors are multiplied whole."""
    o_w = tl.arange(0, BLOCK_W)
    return tl.load(p_q_rows + o_w[None, :], mask=m_q[:, None] & (o_w < width)[None, :], other=0.0)


@triton.jit(do_not_specialize=_COUNTS)
def query_lse_kernel(
    p_q, p_k, p_rows, p_table, p_lse, scale, heads, group, num_q, num_k, first_row, start, end, width,
    s_q_b, s_q_h, s_q_n, s_k_b, s_k_h, s_k_n, s_r_b,
    HAS_ROWS: tl.constexpr, HAS_TABLE: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr,
    Q_PITCH: tl.constexpr, K_PITCH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """``lse [B, H, Nq]``: log2 of the sum of the powers of 2 of a query sub-block's products; 0 where it holds none."""
    i_m, i_bh = tl.program_id(0), tl.program_id(1)
    i_b, i_h = (i_bh // heads).to(tl.int64), (i_bh % heads).to(tl.int64)
    if HAS_TABLE:
        start = tl.load(p_table + i_b * 4 + 1)
        length = tl.load(p_table + i_b * 4 + 2)
        end = tl.where(length > 0, start + length, 0)  # without a query no block holds one
        first_row = start // BLOCK
    o_q = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    m_q = o_q < num_q
    o_m = first_row + o_q // (BLOCK // Q_PITCH)  # query blocks
    if HAS_ROWS:
        o_m = tl.load(p_rows + i_b * s_r_b + o_q // (BLOCK // Q_PITCH), mask=m_q, other=0).to(tl.int32)
    o_begin = o_m * BLOCK + o_q % (BLOCK // Q_PITCH) * Q_PITCH
    o_limit = limit_of(o_q, o_begin, start, end, num_q, num_k, Q_PITCH, K_PITCH)
    p_q_rows = p_q + i_b * s_q_b + i_h * s_q_h + o_q.to(tl.int64)[:, None] * s_q_n
    p_own_k = p_k + i_b * s_k_b + i_h // group * s_k_h
    b_q = _queries(p_q_rows, m_q, width, BLOCK_W)
    b_best = tl.full([BLOCK_M], LOWEST, tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    for first in tl.range(0, tl.cdiv(tl.max(o_limit), K_PITCH), BLOCK_N):
        o_k = first + tl.arange(0, BLOCK_N)
        p_k_rows = p_own_k + o_k.to(tl.int64)[None, :] * s_k_n
        b_x = _product(
            b_q, p_q_rows, p_k_rows, m_q, o_k < num_k, width, PRECISION, BLOCK_M, BLOCK_N, BLOCK_W, WHOLE
        ) * (scale * LOG2E)  # fmt: skip
        b_x = tl.where((o_k * K_PITCH)[None, :] < o_limit[:, None], b_x, float("-inf"))
        b_new = tl.maximum(b_best, tl.max(b_x, 1))
        b_sum = b_sum * tl.exp2(b_best - b_new) + tl.sum(tl.exp2(b_x - b_new[:, None]), 1)
        b_best = b_new
    b_lse = tl.where(b_sum > 0.0, b_best + tl.log2(tl.maximum(b_sum, 1.0)), 0.0)  # the largest product adds 1
    tl.store(p_lse + i_bh.to(tl.int64) * num_q + o_q, b_lse, mask=m_q)


@triton.jit
def _shares(
    b_best, p_q, p_k, p_lse, o_r, o_m, o_n, start, end, num_q, num_k, scale, width, s_q_n, s_k_n,
    EDGE: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr, Q_PITCH: tl.constexpr, K_PITCH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """The largest share that a query sub-block of rows o_m gives to columns o_n; EDGE: not all products count."""
    for i_q in tl.range(0, BLOCK // Q_PITCH, num_stages=1):
        o_q = o_r * (BLOCK // Q_PITCH) + i_q
        m_q = o_q < num_q
        p_q_rows = p_q + o_q.to(tl.int64)[:, None] * s_q_n
        b_q = _queries(p_q_rows, m_q, width, BLOCK_W)
        b_lse = tl.load(p_lse + o_q, mask=m_q, other=0.0)
        o_limit = limit_of(o_q, o_m * BLOCK + i_q * Q_PITCH, start, end, num_q, num_k, Q_PITCH, K_PITCH)
        b_sum = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for i_k in tl.range(0, BLOCK // K_PITCH, num_stages=1 if EDGE else 3, disable_licm=EDGE):
            o_k = o_n * (BLOCK // K_PITCH) + i_k
            p_k_rows = p_k + o_k.to(tl.int64)[None, :] * s_k_n
            b_x = _product(
                b_q, p_q_rows, p_k_rows, m_q, o_k < num_k, width, PRECISION, BLOCK_M, BLOCK_N, BLOCK_W, WHOLE
            ) * (scale * LOG2E) - b_lse[:, None]  # fmt: skip
            if EDGE:
                b_x = tl.where((o_n * BLOCK)[None, :] < (o_limit - i_k * K_PITCH)[:, None], b_x, float("-inf"))
            b_sum += tl.exp2(b_x)
        if EDGE:
            b_sum = tl.where((o_limit > 0)[:, None], b_sum, -1.0)
        b_best = tl.maximum(b_best, b_sum)
    return b_best


@triton.jit(do_not_specialize=_COUNTS)
def mass_scores_kernel(
    p_q, p_k, p_lse, p_rows, p_table, p_out, scale, heads, group, num_q, num_k, num_rows, first_row, start, end,
    s_out_h, padded, width, s_q_b, s_q_h, s_q_n, s_k_b, s_k_h, s_k_n, s_r_b,
    HAS_ROWS: tl.constexpr, HAS_TABLE: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, Q_PITCH: tl.constexpr, K_PITCH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """``out [B, H, R, padded]``, -inf above the diagonal and in rows that hold no query."""
    i_n, i_m, i_bh = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_b, i_h = (i_bh // heads).to(tl.int64), (i_bh % heads).to(tl.int64)
    o_r = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    if HAS_TABLE:
        start = tl.load(p_table + i_b * 4 + 1)
        length = tl.load(p_table + i_b * 4 + 2)
        end = tl.where(length > 0, start + length, 0)  # without a query no block holds one
        first_row = start // BLOCK
    # Query blocks of the rows, the first and the last of them.
    o_m, low = first_row + o_r, first_row + i_m * BLOCK_M
    high = low + BLOCK_M - 1
    if HAS_ROWS:
        o_m = tl.load(p_rows + i_b * s_r_b + o_r, mask=o_r < num_rows, other=0).to(tl.int32)  # [BLOCK_M]
        low, high = tl.min(o_m), tl.max(o_m)
    p_own_out = p_out + i_bh.to(tl.int64) * s_out_h
    if i_n * BLOCK_N <= high:
        p_own_q = p_q + i_b * s_q_b + i_h * s_q_h
        p_own_k = p_k + i_b * s_k_b + i_h // group * s_k_h
        p_own_lse = p_lse + i_bh.to(tl.int64) * num_q
        b_best = tl.full([BLOCK_M, BLOCK_N], -1.0, tl.float32)
        # Away from the diagonal and the ends of what is given every product counts.
        inner = ((i_n + 1) * BLOCK_N <= low) & ((i_n + 1) * BLOCK_N * (BLOCK // K_PITCH) <= num_k)
        inner = inner & ((i_m + 1) * BLOCK_M * (BLOCK // Q_PITCH) <= num_q)
        inner = inner & (low * BLOCK + Q_PITCH > start) & ((high + 1) * BLOCK - Q_PITCH < end)
        if inner:
            b_best = _shares(
                b_best, p_own_q, p_own_k, p_own_lse, o_r, o_m, o_n, start, end, num_q, num_k, scale, width, s_q_n,
                s_k_n, False, PRECISION, BLOCK, Q_PITCH, K_PITCH, BLOCK_M, BLOCK_N, BLOCK_W, WHOLE,
            )  # fmt: skip
        else:
            b_best = _shares(
                b_best, p_own_q, p_own_k, p_own_lse, o_r, o_m, o_n, start, end, num_q, num_k, scale, width, s_q_n,
                s_k_n, True, PRECISION, BLOCK, Q_PITCH, K_PITCH, BLOCK_M, BLOCK_N, BLOCK_W, WHOLE,
            )  # fmt: skip
        b_out = tl.where(b_best >= 0.0, tl.log2(tl.maximum(b_best, LEAST_MASS)) / LOG2E, float("-inf"))
        b_out = tl.where(o_n[None, :] <= o_m[:, None], b_out, float("-inf"))
        store_scores(p_own_out, b_out, o_r, o_n, num_rows, padded)
    elif MASKED:
        b_out = tl.full([BLOCK_M, BLOCK_N], float("-inf"), tl.float32)
        store_scores(p_own_out, b_out, o_r, o_n, num_rows, padded)


def mass_scores(q: Tensor, k: Tensor, scores: Tensor, tiles: Tiles) -> None:
    """Writes ``scores [B, Hq, R, N]``, whose rows are padded in memory (``interface.empty_scores``)."""
    if scores.numel():
        q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
        write_shares(q, k, query_lse(q, k, tiles), scores, tiles)


def query_lse(q: Tensor, k: Tensor, tiles: Tiles) -> Tensor:
    """Of all scaled products of each query sub-block, to the base of 2: ``[B, Hq, Nq]``."""
    batch, heads, num_q, width = q.shape
    lse = torch.empty(batch, heads, num_q, dtype=torch.float32, device=q.device)
    constants = {**_constants(q, tiles, 128), "num_stages": 3}
    launch(
        query_lse_kernel,
        (num_blocks(num_q, constants["BLOCK_M"]), batch * heads),
        q,
        k,
        tiles.rows,
        tiles.table,
        lse,
        tiles.scale,
        heads,
        heads // k.shape[1],
        num_q,
        k.shape[2],
        tiles.first_row,
        tiles.start,
        tiles.end,
        width,
        *score_strides(q, k, tiles),
        num_warps=4,
        **constants,
    )
    return lse


def write_shares(q: Tensor, k: Tensor, lse: Tensor, scores: Tensor, tiles: Tiles) -> None:
    """The second of the two launches."""
    batch, heads, num_rows, columns = scores.shape
    constants = _constants(q, tiles, 64)
    block = constants["BLOCK_M"]
    grid = num_blocks(columns, block), num_blocks(num_rows, block), batch * heads
    arguments = score_arguments(q, k, scores, tiles)
    launch(mass_scores_kernel, grid, q, k, lse, *arguments, MASKED=tiles.masked, num_warps=warps_of(q), **constants)


def _constants(q: Tensor, tiles: Tiles, rows: int) -> dict[str, Any]:
    """What both kernels are compiled for; ``rows``: at most so many at a time."""
    # float32 products are unrolled multiply-adds, which take long to compile and many registers in large tiles.
    single, width = q.dtype == torch.float32, q.shape[3]
    rows = min(rows, 32) if single else min(rows, 64) if width > 128 else rows
    return score_constants(q, tiles, rows, 32 if single else 64, 32 if single else part_of(width))
