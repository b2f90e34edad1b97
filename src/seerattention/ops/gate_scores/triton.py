"""Gate scores in Triton: queries and keys are projected and rotated in one kernel, multiplied in another.

Both products run on tensor cores. The vectors are projected as two halves, so that a rotated channel and its partner
lie with one thread. Scores are written once; only tiles that touch the causal half are computed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Not specialised, so that a prompt of another length does not compile the kernels again.
_SIZES = ["heads", "group", "num"]


@triton.jit
def _columns(p_rows, o_column, m_rows, limit):
    """Columns ``o_column`` of the rows at ``p_rows``, 0 from ``limit`` on."""
    return tl.load(p_rows[:, None] + o_column[None, :], mask=m_rows[:, None] & (o_column < limit)[None, :], other=0.0)


@triton.jit
def _rotary(table, o_row, o_channel, m_rows, m_channels, stride_t, stride_d, other):
    """Entries of a rotary table in float32, ``other`` where a channel is not rotated."""
    p_table = table + o_row[:, None] * stride_t + (o_channel * stride_d)[None, :]
    return tl.load(p_table, mask=m_rows[:, None] & m_channels[None, :], other=other).to(tl.float32)


@triton.jit(do_not_specialize=_SIZES)
def project_rotate_kernel(
    x, weight, cos, sin, out, heads, group, num, channels, width, half, middle, block_size, stride_xb, stride_xh,
    stride_xn, stride_cos_b, stride_cos_t, stride_cos_d, stride_sin_b, stride_sin_t, stride_sin_d,
    PROJECT: tl.constexpr, ROTATE: tl.constexpr, PLAIN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """``out [B, H, N, W]`` = the rotated ``x [B, H / group, N, C] @ weight [H, C, W]``, or the rotated x itself.

    ``half`` pairs of channels are rotated, ``middle`` is the number of all pairs; PLAIN: all are rotated, or none.
    """
    i_n, i_bh = tl.program_id(0), tl.program_id(1)
    i_b, i_h = (i_bh // heads).to(tl.int64), (i_bh % heads).to(tl.int64)
    o_n = (i_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    m_n = o_n < num
    # Channels that are not rotated follow those that are; they are paired, too.
    o_pair = tl.arange(0, BLOCK_W)
    o_first, o_second = o_pair, middle + o_pair
    if not PLAIN:
        o_first = tl.where(o_pair < half, o_pair, half + o_pair)
        o_second = tl.where(o_pair < half, half + o_pair, middle + o_pair)
    # The end of the first halves: where they are the lower channels, the second ones begin there.
    end_first = middle if PLAIN else width
    p_x = x + i_b * stride_xb + (i_h // group) * stride_xh + o_n * stride_xn
    if PROJECT:
        p_weight = weight + i_h * channels * width
        b_first = tl.zeros([BLOCK_N, BLOCK_W], tl.float32)
        b_second = tl.zeros([BLOCK_N, BLOCK_W], tl.float32)
        for start in range(0, channels, BLOCK_C):
            o_c = start + tl.arange(0, BLOCK_C)
            m_c = o_c < channels
            b_x = _columns(p_x, o_c, m_n, channels)
            b_weight = _columns(p_weight + o_c * width, o_first, m_c, end_first)
            b_first = tl.dot(b_x, b_weight, b_first, input_precision=PRECISION)
            b_weight = _columns(p_weight + o_c * width, o_second, m_c, width)
            b_second = tl.dot(b_x, b_weight, b_second, input_precision=PRECISION)
    else:
        b_first = _columns(p_x, o_first, m_n, end_first).to(tl.float32)
        b_second = _columns(p_x, o_second, m_n, width).to(tl.float32)
    if ROTATE:
        # Each block is rotated at the position of its first token.
        o_t, m_rotated = o_n * block_size, o_pair < half
        p_cos, p_sin = cos + i_b * stride_cos_b, sin + i_b * stride_sin_b
        b_cos = _rotary(p_cos, o_t, o_first, m_n, m_rotated, stride_cos_t, stride_cos_d, 1.0)
        b_sin = _rotary(p_sin, o_t, o_first, m_n, m_rotated, stride_sin_t, stride_sin_d, 0.0)
        b_turned = b_first * b_cos - b_second * b_sin
        b_cos = _rotary(p_cos, o_t, o_second, m_n, m_rotated, stride_cos_t, stride_cos_d, 1.0)
        b_sin = _rotary(p_sin, o_t, o_second, m_n, m_rotated, stride_sin_t, stride_sin_d, 0.0)
        b_second = b_second * b_cos + b_first * b_sin
        b_first = b_turned
    p_out = (out + (i_bh.to(tl.int64) * num + o_n) * width)[:, None]
    m_first, m_second = (o_pair < middle) & (o_first < end_first), (o_pair < middle) & (o_second < width)
    tl.store(p_out + o_first[None, :], b_first.to(out.dtype.element_ty), mask=m_n[:, None] & m_first[None, :])
    tl.store(p_out + o_second[None, :], b_second.to(out.dtype.element_ty), mask=m_n[:, None] & m_second[None, :])


@triton.jit(do_not_specialize=_SIZES)
def gate_scores_kernel(
    q, k, out, scale, heads, group, num, pitch, width,
    stride_qb, stride_qh, stride_qn,
    MASKED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """``out [B, H, N, pitch]`` = q [B, H, N, W] times k [B, H / group, N, W], tile by tile, -inf above the diagonal."""
    i_n, i_m, i_bh = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_b, i_h = (i_bh // heads).to(tl.int64), (i_bh % heads).to(tl.int64)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    p_out = out + (i_bh.to(tl.int64) * num + o_m)[:, None] * pitch + o_n[None, :]
    # The padding of rows is written, too: a mask of their ends alone would make the stores scalar.
    m_out = (o_m < num)[:, None] & (o_n < pitch)[None, :]
    if i_n * BLOCK_N < (i_m + 1) * BLOCK_M:
        b_out = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        p_q = q + i_b * stride_qb + i_h * stride_qh + o_m.to(tl.int64)[:, None] * stride_qn
        p_k = k + ((i_b * heads + i_h) // group * num + o_n)[None, :] * width
        for start in range(0, width, BLOCK_W):
            o_w = start + tl.arange(0, BLOCK_W)
            m_w = o_w < width
            b_q = tl.load(p_q + o_w[None, :], mask=(o_m < num)[:, None] & m_w[None, :], other=0.0)
            b_k = tl.load(p_k + o_w[:, None], mask=m_w[:, None] & (o_n < num)[None, :], other=0.0)
            b_out = tl.dot(b_q, b_k, b_out, input_precision=PRECISION)
        b_out = tl.where(o_n[None, :] <= o_m[:, None], b_out * scale, float("-inf"))
        tl.store(p_out, b_out, mask=m_out)
    elif MASKED:
        tl.store(p_out, tl.full([BLOCK_M, BLOCK_N], float("-inf"), tl.float32), mask=m_out)


def gate_scores(
    pooled_q: Tensor,
    pooled_k: Tensor,
    k_linear: Tensor,
    q_linear: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    scores: Tensor,
    *,
    block_size: int,
    scale: float,
    masked: bool,
) -> None:
    """Writes ``scores [B, Hq, N, N]``, whose rows are padded in memory (``interface.empty_scores``)."""
    width = k_linear.shape[-1]
    if scores.numel() == 0:
        return
    keys = _project_rotate(pooled_k, k_linear, cos, sin, width, block_size)
    queries = pooled_q
    if q_linear is not None or cos is not None:
        queries = _project_rotate(pooled_q, q_linear, cos, sin, width, block_size)
    _multiply(queries, keys, scores, scale, masked)


def _multiply(queries: Tensor, keys: Tensor, scores: Tensor, scale: float, masked: bool) -> None:
    """``queries [B, H, N, W]`` times contiguous ``keys [B, H / group, N, W]``."""
    if queries.stride(-1) != 1:
        queries = queries.contiguous()
    batch, heads, num, width = queries.shape
    single = queries.dtype == torch.float32
    # float32 products are unrolled multiply-adds, which take long to compile and many registers in large tiles.
    # Two programs of this shape fit a multiprocessor: one loads and multiplies while the other stores.
    block_m, block_n, part = (32, 32, 32) if single else (64, 128, 64)
    part = min(part, max(16, triton.next_power_of_2(width)))
    with torch.cuda.device_of(scores):
        gate_scores_kernel[(triton.cdiv(num, block_n), triton.cdiv(num, block_m), batch * heads)](
            queries,
            keys,
            scores,
            scale,
            heads,
            heads // keys.shape[1],
            num,
            scores.stride(2),
            width,
            *queries.stride()[:3],
            MASKED=masked,
            PRECISION="ieee" if single else "tf32",  # means nothing to 16-bit products
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            BLOCK_W=part,
            num_warps=4 if single else 8,
            num_stages=2,
        )


def _project_rotate(
    x: Tensor, weight: Tensor | None, cos: Tensor | None, sin: Tensor | None, width: int, block_size: int
) -> Tensor:
    """``[B, H, N, W]`` out of ``x [B, H / group, N, C]``, contiguous, dtype of x."""
    if x.stride(-1) != 1:
        x = x.contiguous()
    batch, x_heads, num, channels = x.shape
    heads = x_heads if weight is None else weight.shape[0]
    out = torch.empty(batch, heads, num, width, dtype=x.dtype, device=x.device)
    rotary = 0 if cos is None else min(cos.shape[-1], width)
    half, middle = rotary // 2, (width + 1) // 2
    single = x.dtype == torch.float32
    block_w = max(16, triton.next_power_of_2(middle))
    block_n = 32 if single else 64
    with torch.cuda.device_of(x):
        project_rotate_kernel[(triton.cdiv(num, block_n), batch * heads)](
            x,
            None if weight is None else weight.contiguous(),
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
            block_size,
            *x.stride()[:3],
            *_table_strides(cos, width),
            *_table_strides(sin, width),
            PROJECT=weight is not None,
            ROTATE=cos is not None,
            PLAIN=half in (0, middle),
            PRECISION="ieee" if single else "tf32",
            BLOCK_N=block_n,
            BLOCK_C=16 if single else 64,
            BLOCK_W=block_w,
            num_warps=8 if block_w > 64 else 4,
            num_stages=2,
        )
    return out


def _table_strides(table: Tensor | None, width: int) -> tuple[int, int, int]:
    """Strides of a rotary table, which all batch rows may share, and which may be read at every s-th channel."""
    if table is None:
        return 0, 0, 0
    step = max(1, table.shape[-1] // width)
    return (table.stride(0) if table.shape[0] > 1 else 0), table.stride(1), step * table.stride(2)
