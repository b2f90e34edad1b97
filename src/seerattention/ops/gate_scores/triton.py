"""Gate scores in Triton: vectors are projected and rotated in one kernel, multiplied and reduced to tiles in another.

Both products run on tensor cores. The vectors are projected as two halves, so that a rotated channel and its partner
lie with one thread. Scores are written once; only tiles that touch the causal half are computed. Where tiles have
several products, those of one place in their tiles are multiplied at a time: the reduction is then between values that
one thread holds, and no product leaves its registers.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import power_of_2
from ..indices import num_blocks
from ..triton_launch import launch
from ..triton_span import LOG2E
from .reference import Tiles

# Below every product; not -inf, whose difference with itself is no number.
LOWEST = tl.constexpr(-1.0e30)

# Not specialised, so that a prompt of another length does not compile the kernels again.
_SIZES = ["heads", "group", "num", "offset", "last"]
_COUNTS = ["heads", "group", "num_q", "num_k", "num_rows", "first_row", "start", "end"]


@triton.jit
def _columns(p_rows, o_column, m_rows, limit):
    """Columns ``o_column`` of the rows at ``p_rows``, 0 from ``limit`` on."""
    return tl.load(p_rows[:, None] + o_column[None, :], mask=m_rows[:, None] & (o_column < limit)[None, :], other=0.0)


@triton.jit
def _rotary(p_table, o_row, o_channel, m_rows, m_channels, s_t, s_d, other):
    """Entries of a rotary table in float32, ``other`` where a channel is not rotated."""
    p_own_table = p_table + o_row[:, None] * s_t + (o_channel * s_d)[None, :]
    return tl.load(p_own_table, mask=m_rows[:, None] & m_channels[None, :], other=other).to(tl.float32)


@triton.jit
def channel_pairs(o_pair, half, middle, width, PLAIN: tl.constexpr):
    """First and second channel of each pair, and the end of the first ones: where they are the lower channels, the
    second ones begin there. ``half`` pairs are rotated; channels that are not follow those, and are paired, too."""
    o_first, o_second = o_pair, middle + o_pair
    end_first = middle
    if not PLAIN:
        o_first = tl.where(o_pair < half, o_pair, half + o_pair)
        o_second = tl.where(o_pair < half, half + o_pair, middle + o_pair)
        end_first = width
    return o_first, o_second, end_first


@triton.jit
def _project_rotate(
    i_n, i_bh, p_x, p_linear, p_cos, p_sin, p_out, heads, group, num, channels, width, half, middle, pitch,
    offset, last, s_x_b, s_x_h, s_x_n, s_cos_b, s_cos_t, s_cos_d, s_sin_b, s_sin_t, s_sin_d,
    PROJECT: tl.constexpr, ROTATE: tl.constexpr, PLAIN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """``out [B, H, N, W]`` = the rotated ``x [B, H / group, N, C] @ linear [H, C, W]``, or the rotated x itself.

    ``half`` pairs of channels are rotated, ``middle`` is the number of all pairs; PLAIN: all are rotated, or none. The
    first block begins ``offset`` entries before those of the table, of which ``last`` is the last one.
    """
    i_b, i_h = (i_bh // heads).to(tl.int64), (i_bh % heads).to(tl.int64)
    o_n = (i_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    m_n = o_n < num
    o_pair = tl.arange(0, BLOCK_W)
    o_first, o_second, end_first = channel_pairs(o_pair, half, middle, width, PLAIN)
    p_own_x = p_x + i_b * s_x_b + (i_h // group) * s_x_h + o_n * s_x_n
    if PROJECT:
        p_own_linear = p_linear + i_h * channels * width
        b_first = tl.zeros([BLOCK_N, BLOCK_W], tl.float32)
        b_second = tl.zeros([BLOCK_N, BLOCK_W], tl.float32)
        for start in range(0, channels, BLOCK_C):
            o_c = start + tl.arange(0, BLOCK_C)
            m_c = o_c < channels
            b_x = _columns(p_own_x, o_c, m_n, channels)  # [BLOCK_N, BLOCK_C]
            # [BLOCK_C, BLOCK_W]
            b_linear = _columns(p_own_linear + o_c * width, o_first, m_c, end_first)
            b_first = tl.dot(b_x, b_linear, b_first, input_precision=PRECISION)
            b_linear = _columns(p_own_linear + o_c * width, o_second, m_c, width)
            b_second = tl.dot(b_x, b_linear, b_second, input_precision=PRECISION)
    else:
        # [BLOCK_N, BLOCK_W]
        b_first = _columns(p_own_x, o_first, m_n, end_first).to(tl.float32)
        b_second = _columns(p_own_x, o_second, m_n, width).to(tl.float32)
    if ROTATE:
        # Each block is rotated at the position of its first token that is there. [BLOCK_N, BLOCK_W]
        o_t, m_rotated = tl.minimum(tl.maximum(o_n * pitch - offset, 0), last), o_pair < half
        p_own_cos, p_own_sin = p_cos + i_b * s_cos_b, p_sin + i_b * s_sin_b
        b_cos = _rotary(p_own_cos, o_t, o_first, m_n, m_rotated, s_cos_t, s_cos_d, 1.0)
        b_sin = _rotary(p_own_sin, o_t, o_first, m_n, m_rotated, s_sin_t, s_sin_d, 0.0)
        b_turned = b_first * b_cos - b_second * b_sin
        b_cos = _rotary(p_own_cos, o_t, o_second, m_n, m_rotated, s_cos_t, s_cos_d, 1.0)
        b_sin = _rotary(p_own_sin, o_t, o_second, m_n, m_rotated, s_sin_t, s_sin_d, 0.0)
        b_second = b_second * b_cos + b_first * b_sin
        b_first = b_turned
    p_own_out = (p_out + (i_bh.to(tl.int64) * num + o_n) * width)[:, None]
    m_first, m_second = (o_pair < middle) & (o_first < end_first), (o_pair < middle) & (o_second < width)
    tl.store(p_own_out + o_first[None, :], b_first.to(p_out.dtype.element_ty), mask=m_n[:, None] & m_first[None, :])
    tl.store(p_own_out + o_second[None, :], b_second.to(p_out.dtype.element_ty), mask=m_n[:, None] & m_second[None, :])


@triton.jit(do_not_specialize=_SIZES)
def project_rotate_kernel(
    p_x, p_linear, p_cos, p_sin, p_out, heads, group, num, channels, width, half, middle, pitch, offset, last,
    s_x_b, s_x_h, s_x_n, s_cos_b, s_cos_t, s_cos_d, s_sin_b, s_sin_t, s_sin_d,
    PROJECT: tl.constexpr, ROTATE: tl.constexpr, PLAIN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """See ``_project_rotate``."""
    _project_rotate(
        tl.program_id(0), tl.program_id(1), p_x, p_linear, p_cos, p_sin, p_out, heads, group, num, channels, width,
        half, middle, pitch, offset, last, s_x_b, s_x_h, s_x_n, s_cos_b, s_cos_t, s_cos_d, s_sin_b, s_sin_t, s_sin_d,
        PROJECT, ROTATE, PLAIN, PRECISION, BLOCK_N, BLOCK_C, BLOCK_W,
    )  # fmt: skip


@triton.jit(do_not_specialize=["programs", "q_heads", "q_num", "k_heads", "k_group", "k_num", "last"])
def encode_both_kernel(
    p_q, p_k, p_q_linear, p_k_linear, p_cos, p_sin, p_q_out, p_k_out, programs, q_heads, q_num, q_channels, q_pitch,
    k_heads, k_group, k_num, k_channels, k_pitch, width, half, middle, last,
    s_q_b, s_q_h, s_q_n, s_k_b, s_k_h, s_k_n, s_cos_b, s_cos_t, s_cos_d, s_sin_b, s_sin_t, s_sin_d,
    PROJECT_Q: tl.constexpr, ROTATE: tl.constexpr, PLAIN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """The first ``programs`` of the second dimension encode queries, the others keys."""
    i_n, i_bh = tl.program_id(0), tl.program_id(1)
    if i_bh < programs:
        _project_rotate(
            i_n, i_bh, p_q, p_q_linear, p_cos, p_sin, p_q_out, q_heads, 1, q_num, q_channels, width, half, middle,
            q_pitch, 0, last, s_q_b, s_q_h, s_q_n, s_cos_b, s_cos_t, s_cos_d, s_sin_b, s_sin_t, s_sin_d,
            PROJECT_Q, ROTATE, PLAIN, PRECISION, BLOCK_N, BLOCK_C, BLOCK_W,
        )  # fmt: skip
    else:
        _project_rotate(
            i_n, i_bh - programs, p_k, p_k_linear, p_cos, p_sin, p_k_out, k_heads, k_group, k_num, k_channels, width,
            half, middle, k_pitch, 0, last, s_k_b, s_k_h, s_k_n, s_cos_b, s_cos_t, s_cos_d, s_sin_b, s_sin_t, s_sin_d,
            True, ROTATE, PLAIN, PRECISION, BLOCK_N, BLOCK_C, BLOCK_W,
        )  # fmt: skip


@triton.jit
def store_scores(p_out, b_out, o_r, o_n, num_rows, padded):
    """The padding of rows is written, too: a mask of their ends alone would make the stores scalar."""
    p_own_out = p_out + o_r.to(tl.int64)[:, None] * padded + o_n[None, :]
    tl.store(p_own_out, b_out, mask=(o_r < num_rows)[:, None] & (o_n < padded)[None, :])


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
                # Key sub-blocks count that begin before the end of the query sub-block, and of the tokens.
                o_begin = o_m * BLOCK + i_q * Q_PITCH
                m_holds = (o_q < num_q) & (o_begin < end) & (o_begin + Q_PITCH > start)
                o_limit = tl.where(m_holds, tl.minimum(tl.minimum(o_begin + Q_PITCH, end), num_k * K_PITCH), 0)
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
    p_q, p_k, p_rows, p_table, p_out, scale, heads, group, num_q, num_k, num_rows, first_row, start, end, padded, width,
    s_q_b, s_q_h, s_q_n, s_k_b, s_k_h, s_k_n, s_r_b,
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
        store_scores(p_out + i_bh.to(tl.int64) * num_rows * padded, b_out, o_r, o_n, num_rows, padded)
    elif MASKED:
        b_out = tl.full([BLOCK_M, BLOCK_N], float("-inf"), tl.float32)
        store_scores(p_out + i_bh.to(tl.int64) * num_rows * padded, b_out, o_r, o_n, num_rows, padded)


def gate_scores(q: Tensor, k: Tensor, scores: Tensor, tiles: Tiles) -> None:
    """Writes ``scores [B, Hq, R, N]``, whose rows are padded in memory (``interface.empty_scores``)."""
    if scores.numel() == 0:
        return
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    batch, heads, num_rows, columns = scores.shape
    single = q.dtype == torch.float32
    # float32 products are unrolled multiply-adds, which take long to compile and many registers in large tiles.
    # Two programs of these shapes fit a multiprocessor: one loads and multiplies while the other stores or reduces.
    if single:
        block_m, block_n, part = 32, 32, 32
    elif tiles.single:
        block_m, block_n, part = 64, 128, 64
    else:  # a block of keys meets many of queries, so it is loaded whole where that fits
        block_m, block_n, part = 64, 64, part_of(q.shape[-1])
    launch(
        gate_scores_kernel,
        (num_blocks(columns, block_n), num_blocks(num_rows, block_m), batch * heads),
        q,
        k,
        *score_arguments(q, k, scores, tiles),
        SINGLE=tiles.single,
        MAX=tiles.reduce == "max",
        MASKED=tiles.masked,
        num_warps=4 if single else 8,
        **score_constants(q, tiles, block_m, block_n, part),
    )


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


def encode_blocks(
    pooled: Tensor, linear: Tensor | None, cos: Tensor | None, sin: Tensor | None, pitch: int, offset: int = 0
) -> Tensor:
    """``[B, H, N, W]``, contiguous, dtype of pooled."""
    x = pooled if pooled.stride(-1) == 1 else pooled.contiguous()
    batch, x_heads, num, channels = x.shape
    heads, width = (x_heads, channels) if linear is None else (linear.shape[0], linear.shape[2])
    out = torch.empty(batch, heads, num, width, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    half, middle, constants = _encoding(x, cos, width)
    launch(
        project_rotate_kernel,
        (num_blocks(num, constants["BLOCK_N"]), batch * heads),
        x,
        None if linear is None else linear.contiguous(),
        cos,
        sin,
        out,
        heads,
        heads // x_heads,
        num,
        channels,
        width,
        half,
        middle,
        pitch,
        offset,
        0 if cos is None else cos.shape[1] - 1,
        *x.stride()[:3],
        *table_strides(cos, width),
        *table_strides(sin, width),
        PROJECT=linear is not None,
        **constants,
    )
    return out


def _encoding(x: Tensor, cos: Tensor | None, width: int) -> tuple[int, int, dict[str, Any]]:
    """Pairs of channels that are rotated, all pairs, and the shape of a program."""
    half, middle = pairs_of(cos, width)
    single, block_w = x.dtype == torch.float32, max(16, power_of_2(middle))
    return (
        half,
        middle,
        {
            "ROTATE": cos is not None,
            "PLAIN": half in (0, middle),
            "PRECISION": "ieee" if single else "tf32",
            "BLOCK_N": 32 if single else 64,
            "BLOCK_C": 16 if single else 64,
            "BLOCK_W": block_w,
            "num_warps": 8 if block_w > 64 else 4,
            "num_stages": 2,
        },
    )


def encode_both(
    pooled: tuple[Tensor, Tensor],
    linears: tuple[Tensor | None, Tensor],
    tables: tuple[Tensor | None, Tensor | None],
    pitches: tuple[int, int],
) -> tuple[Tensor, Tensor]:
    """:func:`encode_blocks` of queries and keys, with as many query projections as query heads, in one launch, bit for
    bit."""
    (q, k), (q_linear, k_linear), (cos, sin) = pooled, linears, tables
    batch, heads, width = q.shape[0], k_linear.shape[0], k_linear.shape[2]
    outs = [
        torch.empty(batch, mine, x.shape[2], width, dtype=x.dtype, device=x.device)
        for x, mine in ((q, q.shape[1]), (k, heads))
    ]
    half, middle, constants = _encoding(k, cos, width)
    launch(
        encode_both_kernel,
        (num_blocks(max(q.shape[2], k.shape[2]), constants["BLOCK_N"]), batch * (q.shape[1] + heads)),
        q,
        k,
        None if q_linear is None else q_linear.contiguous(),
        k_linear.contiguous(),
        cos,
        sin,
        *outs,
        batch * q.shape[1],
        q.shape[1],
        q.shape[2],
        q.shape[3],
        pitches[0],
        heads,
        heads // k.shape[1],
        k.shape[2],
        k.shape[3],
        pitches[1],
        width,
        half,
        middle,
        0 if cos is None else cos.shape[1] - 1,
        *q.stride()[:3],
        *k.stride()[:3],
        *table_strides(cos, width),
        *table_strides(sin, width),
        PROJECT_Q=q_linear is not None,
        **constants,
    )
    return outs[0], outs[1]


def pairs_of(cos: Tensor | None, width: int) -> tuple[int, int]:
    """Pairs of channels that are rotated, and all pairs."""
    return 0 if cos is None else min(cos.shape[-1], width) // 2, (width + 1) // 2


def table_strides(table: Tensor | None, width: int) -> tuple[int, int, int]:
    """Strides of a rotary table, which all batch rows may share, and which may be read at every s-th channel."""
    if table is None:
        return 0, 0, 0
    step = max(1, table.shape[-1] // width)
    return (table.stride(0) if table.shape[0] > 1 else 0), table.stride(1), step * table.stride(2)
