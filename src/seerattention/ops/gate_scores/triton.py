"""Gate scores in Triton: encoded queries and keys multiplied on tensor cores, and reduced to tiles.

Scores are written once; only tiles that touch the causal half are computed. Where tiles have several products, those of
one place in their tiles are multiplied at a time: the reduction is then between values that one thread holds, and no
product leaves its registers.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import dispatch
from ..dispatch import power_of_2
from ..indices import num_blocks
from ..triton_launch import launch
from ..triton_span import LOG2E
from .reference import Tiles

# Below every product; not -inf, whose difference with itself is no number.
LOWEST = tl.constexpr(-1.0e30)

# Tiles of 128 columns load half of the queries for a product. On an H200 that is 1.2 times as fast from 128K tokens on
# (vectors of 128 channels), and no faster at 32K, where more of the tiles lie on the diagonal.
MANY_COLUMNS = 2048

# Not specialised, so that a prompt of another length does not compile the kernels again.
_COUNTS = ["heads", "group", "num_q", "num_k", "num_rows", "first_row", "start", "end"]


@triton.jit
def store_scores(p_out, b_out, o_r, o_n, num_rows, padded):
    """The padding of rows is written, too: a mask of their ends alone would make the stores scalar."""
    p_own_out = p_out + o_r.to(tl.int64)[:, None] * padded + o_n[None, :]
    tl.store(p_own_out, b_out, mask=(o_r < num_rows)[:, None] & (o_n < padded)[None, :])


@triton.jit
def limit_of(o_q, o_begin, start, end, num_q, num_k, Q_PITCH: tl.constexpr, K_PITCH: tl.constexpr):
    """Behind the last token that query sub-blocks may see, which begin at ``o_begin``; 0 where they hold no query.

    Key sub-blocks count that begin before the end of the query sub-block, and of the tokens.
    """
    m_holds = (o_q < num_q) & (o_begin < end) & (o_begin + Q_PITCH > start)
    return tl.where(m_holds, tl.minimum(tl.minimum(o_begin + Q_PITCH, end), num_k * K_PITCH), 0)


@triton.jit
def _reduce_products(
    b_best, b_sum, p_q, p_k, o_r, o_m, o_n, start, end, num_q, num_k, scale, width, s_q_n, s_k_n,
    EDGE: tl.constexpr, MAX: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr, Q_PITCH: tl.constexpr,
    K_PITCH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Every product of the tiles of rows o_m and columns o_n; EDGE: not all of them count."""
    for i_k in tl.range(0, BLOCK // K_PITCH, num_stages=1, disable_licm=EDGE):
        o_k = o_n * (BLOCK // K_PITCH) + i_k
        p_k_rows = p_k + o_k.to(tl.int64)[None, :] * s_k_n
        m_k = (o_k < num_k)[None, :] if EDGE else True
        if WHOLE:
            o_w = tl.arange(0, BLOCK_W)
            # [BLOCK_W, BLOCK_N]
            b_k = tl.load(p_k_rows + o_w[:, None], mask=m_k & (o_w < width)[:, None], other=0.0)
        for i_q in tl.range(0, BLOCK // Q_PITCH, num_stages=1 if EDGE else 3, disable_licm=EDGE):
            o_q = o_r * (BLOCK // Q_PITCH) + i_q
            p_q_rows = p_q + o_q.to(tl.int64)[:, None] * s_q_n
            m_q = (o_q < num_q)[:, None] if EDGE else True
            b_x = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            if WHOLE:
                b_q = tl.load(
                    p_q_rows + o_w[None, :], mask=m_q & (o_w < width)[None, :], other=0.0
                )  # [BLOCK_M, BLOCK_W]
                b_x = tl.dot(b_q, b_k, b_x, input_precision=PRECISION)
            else:
                for i_w in range(0, width, BLOCK_W):
                    o_part = i_w + tl.arange(0, BLOCK_W)
                    m_w = o_part < width
                    b_q = tl.load(p_q_rows + o_part[None, :], mask=m_q & m_w[None, :], other=0.0)  # [BLOCK_M, BLOCK_W]
                    b_part = tl.load(
                        p_k_rows + o_part[:, None], mask=m_k & m_w[:, None], other=0.0
                    )  # [BLOCK_W, BLOCK_N]
                    b_x = tl.dot(b_q, b_part, b_x, input_precision=PRECISION)
            if not MAX:
                b_x *= scale * LOG2E
            if EDGE:
                o_limit = limit_of(o_q, o_m * BLOCK + i_q * Q_PITCH, start, end, num_q, num_k, Q_PITCH, K_PITCH)
                b_x = tl.where((o_n * BLOCK)[None, :] < (o_limit - i_k * K_PITCH)[:, None], b_x, float("-inf"))
            if MAX:
                b_best = tl.maximum(b_best, b_x)
            else:
                b_power = tl.exp2(-tl.abs(b_x - b_best))  # one of the two summands is 1
                b_sum = tl.where(b_x > b_best, b_sum * b_power + 1.0, b_sum + b_power)
                b_best = tl.maximum(b_best, b_x)
    return b_best, b_sum


@triton.jit(do_not_specialize=_COUNTS)
def gate_scores_kernel(
    p_q, p_k, p_rows, p_table, p_out, scale, heads, group, num_q, num_k, num_rows, first_row, start, end, s_out_h,
    padded, width, s_q_b, s_q_h, s_q_n, s_k_b, s_k_h, s_k_n, s_r_b,
    HAS_ROWS: tl.constexpr, HAS_TABLE: tl.constexpr, SINGLE: tl.constexpr, MAX: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK: tl.constexpr, Q_PITCH: tl.constexpr, K_PITCH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """``out [B, H, R, padded]`` = q [B, H, Nq, W] times k [B, H / group, Nk, W], reduced tile by tile, -inf above the
    diagonal. SINGLE: one product a tile, all of which count. WHOLE: vectors are multiplied in one part."""
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
    if HAS_ROWS:
        o_m = tl.load(p_rows + i_b * s_r_b + o_r, mask=o_r < num_rows, other=0).to(tl.int32)  # [BLOCK_M]
        low, high = tl.min(o_m), tl.max(o_m)
    else:
        o_m = first_row + o_r
        low = first_row + i_m * BLOCK_M
        high = low + BLOCK_M - 1
    if i_n * BLOCK_N <= high:
        p_own_q = p_q + i_b * s_q_b + i_h * s_q_h
        p_own_k = p_k + i_b * s_k_b + i_h // group * s_k_h
        if SINGLE:
            b_out = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            p_own_q += o_r.to(tl.int64)[:, None] * s_q_n
            p_own_k += o_n.to(tl.int64)[None, :] * s_k_n
            for i_w in range(0, width, BLOCK_W):
                o_w = i_w + tl.arange(0, BLOCK_W)
                m_w = o_w < width
                b_q = tl.load(
                    p_own_q + o_w[None, :], mask=(o_r < num_q)[:, None] & m_w[None, :], other=0.0
                )  # [BLOCK_M, BLOCK_W]
                b_k = tl.load(
                    p_own_k + o_w[:, None], mask=m_w[:, None] & (o_n < num_k)[None, :], other=0.0
                )  # [BLOCK_W, BLOCK_N]
                b_out = tl.dot(b_q, b_k, b_out, input_precision=PRECISION)
            b_out *= scale
        else:
            b_best = tl.full([BLOCK_M, BLOCK_N], float("-inf") if MAX else LOWEST, tl.float32)
            b_sum = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            # Away from the diagonal and the ends of what is given every product counts.
            inner = ((i_n + 1) * BLOCK_N <= low) & ((i_n + 1) * BLOCK_N * (BLOCK // K_PITCH) <= num_k)
            inner = inner & ((i_m + 1) * BLOCK_M * (BLOCK // Q_PITCH) <= num_q)
            inner = inner & (low * BLOCK + Q_PITCH > start) & ((high + 1) * BLOCK - Q_PITCH < end)
            if inner:
                b_best, b_sum = _reduce_products(
                    b_best, b_sum, p_own_q, p_own_k, o_r, o_m, o_n, start, end, num_q, num_k, scale, width, s_q_n,
                    s_k_n, False, MAX, PRECISION, BLOCK, Q_PITCH, K_PITCH, BLOCK_M, BLOCK_N, BLOCK_W, WHOLE,
                )  # fmt: skip
            else:
                b_best, b_sum = _reduce_products(
                    b_best, b_sum, p_own_q, p_own_k, o_r, o_m, o_n, start, end, num_q, num_k, scale, width, s_q_n,
                    s_k_n, True, MAX, PRECISION, BLOCK, Q_PITCH, K_PITCH, BLOCK_M, BLOCK_N, BLOCK_W, WHOLE,
                )  # fmt: skip
            if MAX:
                b_out = b_best * scale
            else:
                # The largest product adds 1: a sum below that is one of none.
                b_out = tl.where(b_sum > 0.0, (b_best + tl.log2(tl.maximum(b_sum, 1.0))) / LOG2E, float("-inf"))
        b_out = tl.where(o_n[None, :] <= o_m[:, None], b_out, float("-inf"))
        store_scores(p_out + i_bh.to(tl.int64) * s_out_h, b_out, o_r, o_n, num_rows, padded)
    elif MASKED:
        b_out = tl.full([BLOCK_M, BLOCK_N], float("-inf"), tl.float32)
        store_scores(p_out + i_bh.to(tl.int64) * s_out_h, b_out, o_r, o_n, num_rows, padded)


def gate_scores(q: Tensor, k: Tensor, scores: Tensor, tiles: Tiles) -> None:
    """Writes ``scores [B, Hq, R, N]``, whose rows are padded in memory: all rows of ``interface.empty_scores``, or its
    last ones."""
    if scores.numel() == 0:
        return
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    batch, heads, num_rows, columns = scores.shape
    single = q.dtype == torch.float32
    # float32 products are unrolled multiply-adds, which take long to compile and many registers in large tiles.
    # Several programs of these shapes fit a multiprocessor: some load and multiply while others store or reduce.
    if single:
        block_m, block_n, part, num_warps = 32, 32, 32, 4
    elif tiles.single:
        block_m, block_n, part, num_warps = 64, 128, 64, 8
    else:  # a block of keys meets many of queries, so it is loaded whole where that fits
        block_m, block_n, part, num_warps = 64, 64, part_of(q.shape[-1]), warps_of(q)
        if num_warps == 4 and columns >= MANY_COLUMNS and tiles.reduce == "max":  # timed on Hopper alone
            block_n = 128
    launch(
        gate_scores_kernel,
        (num_blocks(columns, block_n), num_blocks(num_rows, block_m), batch * heads),
        q,
        k,
        *score_arguments(q, k, scores, tiles),
        SINGLE=tiles.single,
        MAX=tiles.reduce == "max",
        MASKED=tiles.masked,
        num_warps=num_warps,
        **score_constants(q, tiles, block_m, block_n, part),
    )


def warps_of(q: Tensor) -> int:
    """Of programs that hold the products of 64 by 64 vectors: one warpgroup is 1.2 times as fast as two where there are
    some; elsewhere, and in float32, what four warps hold does not fit their registers."""
    return 4 if dispatch.capability(q.device) == 9 and q.dtype != torch.float32 else 8


def part_of(width: int) -> int:
    """Channels that are multiplied at a time where vectors are loaded whole if that fits."""
    return 128 if width <= 128 else 64


def score_arguments(q: Tensor, k: Tensor, scores: Tensor, tiles: Tiles) -> tuple[Any, ...]:
    """What kernels that write scores take behind the pointers of encoded vectors."""
    return (
        tiles.rows,
        tiles.table,
        scores,
        tiles.scale,
        q.shape[1],
        q.shape[1] // k.shape[1],
        q.shape[2],
        k.shape[2],
        scores.shape[2],
        tiles.first_row,
        tiles.start,
        tiles.end,
        scores.stride(1),
        scores.stride(2),
        q.shape[3],
        *score_strides(q, k, tiles),
    )


def score_strides(q: Tensor, k: Tensor, tiles: Tiles) -> tuple[int, ...]:
    """Of encoded vectors, and of the numbers of rows, which all batch rows may share."""
    rows = tiles.rows
    return (*q.stride()[:3], *k.stride()[:3], rows.stride(0) if rows is not None and rows.shape[0] > 1 else 0)


def score_constants(q: Tensor, tiles: Tiles, block_m: int, block_n: int, part: int) -> dict[str, Any]:
    """What kernels that multiply encoded vectors are compiled for; ``part``: at most so many channels at a time."""
    width = q.shape[3]
    part = min(part, max(16, power_of_2(width)))
    return {
        "HAS_ROWS": tiles.rows is not None,
        "HAS_TABLE": tiles.table is not None,
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",  # means nothing to 16-bit products
        "BLOCK": tiles.block_size,
        "Q_PITCH": tiles.q_pitch,
        "K_PITCH": tiles.k_pitch,
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_W": part,
        "WHOLE": width <= part,
        "num_stages": 2,
    }
