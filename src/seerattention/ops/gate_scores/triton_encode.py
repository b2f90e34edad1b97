"""Encoding of pooled queries and keys in Triton: a projection on tensor cores, then the rotation.

Vectors are projected as two halves, so that a rotated channel and its partner lie with one thread.
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

# Not specialised, so that a prompt of another length does not compile the kernels again.
_SIZES = ["heads", "group", "num", "offset", "last"]


@triton.jit
def _columns(p_rows, o_column, m_rows, limit):
    """Columns ``o_column`` of the rows at ``p_rows``, 0 from ``limit`` on."""
    return tl.load(p_rows[:, None] + o_column[None, :], mask=m_rows[:, None] & (o_column < limit)[None, :], other=0.0)


@triton.jit
def _rotary(p_table, o_row, o_channel, begin, m_rows, half, s_t, s_d, other, SECOND: tl.constexpr, PAIRS: tl.constexpr):
    """Entries of a rotary table in float32, ``other`` where a channel is not rotated. SECOND: channels o_channel are
    every second entry from entry ``begin`` on; those are read whole, as loads of two bytes each take far longer."""
    p_rows = p_table + o_row.to(tl.int64)[:, None] * s_t
    if SECOND:
        o_entry = tl.arange(0, 2 * PAIRS)
        m_entry = m_rows[:, None] & (o_entry < 2 * half)[None, :]
        b_both = tl.load(p_rows + (begin + o_entry)[None, :], mask=m_entry, other=other)
        b_table, _ = tl.split(tl.reshape(b_both, [b_both.shape[0], PAIRS, 2]))
    else:
        m_rotated = tl.arange(0, PAIRS) < half
        b_table = tl.load(p_rows + (o_channel * s_d)[None, :], mask=m_rows[:, None] & m_rotated[None, :], other=other)
    return b_table.to(tl.float32)


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
def rotate_store(
    b_first, b_second, i_b, i_bh, o_n, m_n, o_pair, o_first, o_second, end_first, p_cos, p_sin, p_out, num, width, half,
    middle, pitch, offset, last, s_cos_b, s_cos_t, s_cos_d, s_sin_b, s_sin_t, s_sin_d, ROTATE: tl.constexpr,
    SECOND: tl.constexpr,
):  # fmt: skip
    """Rotate the two channels of each pair of vectors ``o_n``, and write them."""
    if ROTATE:
        # Each block is rotated at the position of its first token that is there. [BLOCK_N, BLOCK_W]
        o_t = tl.minimum(tl.maximum(o_n * pitch - offset, 0), last)
        p_own_cos, p_own_sin = p_cos + i_b * s_cos_b, p_sin + i_b * s_sin_b
        b_cos = _rotary(p_own_cos, o_t, o_first, 0, m_n, half, s_cos_t, s_cos_d, 1.0, SECOND, o_pair.shape[0])
        b_sin = _rotary(p_own_sin, o_t, o_first, 0, m_n, half, s_sin_t, s_sin_d, 0.0, SECOND, o_pair.shape[0])
        b_turned = b_first * b_cos - b_second * b_sin
        b_cos = _rotary(p_own_cos, o_t, o_second, 2 * middle, m_n, half, s_cos_t, s_cos_d, 1.0, SECOND, o_pair.shape[0])
        b_sin = _rotary(p_own_sin, o_t, o_second, 2 * middle, m_n, half, s_sin_t, s_sin_d, 0.0, SECOND, o_pair.shape[0])
        b_second = b_second * b_cos + b_first * b_sin
        b_first = b_turned
    p_own_out = (p_out + (i_bh.to(tl.int64) * num + o_n) * width)[:, None]
    m_first, m_second = (o_pair < middle) & (o_first < end_first), (o_pair < middle) & (o_second < width)
    tl.store(p_own_out + o_first[None, :], b_first.to(p_out.dtype.element_ty), mask=m_n[:, None] & m_first[None, :])
    tl.store(p_own_out + o_second[None, :], b_second.to(p_out.dtype.element_ty), mask=m_n[:, None] & m_second[None, :])


@triton.jit
def _project_rotate(
    i_n, i_bh, p_x, p_linear, p_cos, p_sin, p_out, heads, group, num, channels, width, half, middle, pitch,
    offset, last, s_x_b, s_x_h, s_x_n, s_cos_b, s_cos_t, s_cos_d, s_sin_b, s_sin_t, s_sin_d,
    PROJECT: tl.constexpr, ROTATE: tl.constexpr, SECOND: tl.constexpr, PLAIN: tl.constexpr, PRECISION: tl.constexpr,
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
            b_linear = _columns(p_own_linear + o_c * width, o_first, m_c, end_first)  # [BLOCK_C, BLOCK_W]
            b_first = tl.dot(b_x, b_linear, b_first, input_precision=PRECISION)
            b_linear = _columns(p_own_linear + o_c * width, o_second, m_c, width)
            b_second = tl.dot(b_x, b_linear, b_second, input_precision=PRECISION)
    else:
        # [BLOCK_N, BLOCK_W]
        b_first = _columns(p_own_x, o_first, m_n, end_first).to(tl.float32)
        b_second = _columns(p_own_x, o_second, m_n, width).to(tl.float32)
    rotate_store(
        b_first, b_second, i_b, i_bh, o_n, m_n, o_pair, o_first, o_second, end_first, p_cos, p_sin, p_out, num, width,
        half, middle, pitch, offset, last, s_cos_b, s_cos_t, s_cos_d, s_sin_b, s_sin_t, s_sin_d, ROTATE, SECOND,
    )  # fmt: skip


@triton.jit(do_not_specialize=_SIZES)
def project_rotate_kernel(
    p_x, p_linear, p_cos, p_sin, p_out, heads, group, num, channels, width, half, middle, pitch, offset, last,
    s_x_b, s_x_h, s_x_n, s_cos_b, s_cos_t, s_cos_d, s_sin_b, s_sin_t, s_sin_d,
    PROJECT: tl.constexpr, ROTATE: tl.constexpr, SECOND: tl.constexpr, PLAIN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """See ``_project_rotate``."""
    _project_rotate(
        tl.program_id(0), tl.program_id(1), p_x, p_linear, p_cos, p_sin, p_out, heads, group, num, channels, width,
        half, middle, pitch, offset, last, s_x_b, s_x_h, s_x_n, s_cos_b, s_cos_t, s_cos_d, s_sin_b, s_sin_t, s_sin_d,
        PROJECT, ROTATE, SECOND, PLAIN, PRECISION, BLOCK_N, BLOCK_C, BLOCK_W,
    )  # fmt: skip


@triton.jit(do_not_specialize=["programs", "q_heads", "q_num", "k_heads", "k_group", "k_num", "last"])
def encode_both_kernel(
    p_q, p_k, p_q_linear, p_k_linear, p_cos, p_sin, p_q_out, p_k_out, programs, q_heads, q_num, q_channels, q_pitch,
    k_heads, k_group, k_num, k_channels, k_pitch, width, half, middle, last,
    s_q_b, s_q_h, s_q_n, s_k_b, s_k_h, s_k_n, s_cos_b, s_cos_t, s_cos_d, s_sin_b, s_sin_t, s_sin_d,
    PROJECT_Q: tl.constexpr, ROTATE: tl.constexpr, SECOND: tl.constexpr, PLAIN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """The first ``programs`` of the second dimension encode queries, the others keys."""
    i_n, i_bh = tl.program_id(0), tl.program_id(1)
    if i_bh < programs:
        _project_rotate(
            i_n, i_bh, p_q, p_q_linear, p_cos, p_sin, p_q_out, q_heads, 1, q_num, q_channels, width, half, middle,
            q_pitch, 0, last, s_q_b, s_q_h, s_q_n, s_cos_b, s_cos_t, s_cos_d, s_sin_b, s_sin_t, s_sin_d,
            PROJECT_Q, ROTATE, SECOND, PLAIN, PRECISION, BLOCK_N, BLOCK_C, BLOCK_W,
        )  # fmt: skip
    else:
        _project_rotate(
            i_n, i_bh - programs, p_k, p_k_linear, p_cos, p_sin, p_k_out, k_heads, k_group, k_num, k_channels, width,
            half, middle, k_pitch, 0, last, s_k_b, s_k_h, s_k_n, s_cos_b, s_cos_t, s_cos_d, s_sin_b, s_sin_t, s_sin_d,
            True, ROTATE, SECOND, PLAIN, PRECISION, BLOCK_N, BLOCK_C, BLOCK_W,
        )  # fmt: skip


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
    half, middle, constants = _encoding(x, cos, sin, width)
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


def _encoding(x: Tensor, cos: Tensor | None, sin: Tensor | None, width: int) -> tuple[int, int, dict[str, Any]]:
    """Pairs of channels that are rotated, all pairs, and the shape of a program."""
    half, middle = pairs_of(cos, width)
    single, block_w = x.dtype == torch.float32, max(16, power_of_2(middle))
    return (
        half,
        middle,
        {
            "ROTATE": cos is not None,
            "SECOND": second_entries(cos, sin, width),
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
    half, middle, constants = _encoding(k, cos, sin, width)
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


def second_entries(cos: Tensor | None, sin: Tensor | None, width: int) -> bool:
    """Whether all channels are rotated, by every second entry of the rows of the tables: gates of half the width."""
    return (
        cos is not None
        and sin is not None
        and all(table.shape[-1] == 2 * width and width % 2 == 0 and table.stride(-1) == 1 for table in (cos, sin))
    )
