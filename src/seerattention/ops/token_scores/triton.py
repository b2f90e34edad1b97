"""Scores of query tokens in Triton. A step of decoding is short: what counts is how many kernels it launches.

A token is projected, normalised and rotated in one program for each of its vectors, by multiply-adds: there is too
little of it for tensor cores. Scores are products on tensor cores, of rows that are the query heads of a group or the
tokens of a window, padded to 16; keys of one place in their blocks are multiplied at a time, so the largest product of
a block is found in registers. The shares of a window need a sum over its whole row first: a second, small kernel.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import power_of_2
from ..gate_scores.interface import empty_scores
from ..gate_scores.triton_encode import channel_pairs, pairs_of, table_strides
from ..indices import num_blocks
from ..triton_launch import launch
from .reference import Row

# Key blocks a program.
BLOCK_N = 64
# Blocks that the program of a window's row reads at a time.
BLOCK_ROW = 256

# Not specialised, so that a step further on does not compile the kernels again.
_SIZES = ["tokens", "num", "columns", "padded"]


@triton.jit
def _rotary(p_table, o_channel, m_channel, s_d, other):
    """Entries of a rotary table in float32, ``other`` where a channel is not rotated."""
    return tl.load(p_table + o_channel * s_d, mask=m_channel, other=other).to(tl.float32)


@triton.jit(do_not_specialize=["tokens"])
def encode_tokens_kernel(
    p_x, p_linear, p_norm, p_cos, p_sin, p_out, eps, heads, tokens, channels, head_dim, width, half, middle,
    s_x_b, s_x_h, s_x_t, s_cos_b, s_cos_t, s_cos_d, s_sin_b, s_sin_t, s_sin_d,
    NORM: tl.constexpr, ROTATE: tl.constexpr, PLAIN: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """One vector of a token. ``half`` pairs of channels are rotated, ``middle`` is the number of all pairs; PLAIN: all
    are rotated, or none."""
    i_t = tl.program_id(0)
    i_b, i_h = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    o_pair = tl.arange(0, BLOCK_W)
    o_first, o_second, end_first = channel_pairs(o_pair, half, middle, width, PLAIN)
    m_first, m_second = (o_pair < middle) & (o_first < end_first), (o_pair < middle) & (o_second < width)
    p_x += i_b * s_x_b + i_t.to(tl.int64) * s_x_t + i_h * (channels // head_dim) * s_x_h
    p_linear += i_h * channels * width
    b_first = tl.zeros([BLOCK_W], tl.float32)
    b_second = tl.zeros([BLOCK_W], tl.float32)
    for start in range(0, channels, BLOCK_C):
        o_c = start + tl.arange(0, BLOCK_C)
        m_c = o_c < channels
        b_x = tl.load(p_x + (o_c // head_dim) * s_x_h + o_c % head_dim, mask=m_c, other=0.0)
        b_x = b_x.to(p_linear.dtype.element_ty).to(tl.float32)[:, None]
        p_rows = p_linear + o_c[:, None] * width
        # [BLOCK_C, BLOCK_W]
        b_linear = tl.load(p_rows + o_first[None, :], mask=m_c[:, None] & m_first[None, :], other=0.0)
        b_first += tl.sum(b_x * b_linear.to(tl.float32), 0)
        b_linear = tl.load(p_rows + o_second[None, :], mask=m_c[:, None] & m_second[None, :], other=0.0)
        b_second += tl.sum(b_x * b_linear.to(tl.float32), 0)
    if NORM:
        square = (tl.sum(b_first * b_first, 0) + tl.sum(b_second * b_second, 0)) / width
        factor = 1.0 / tl.sqrt(square + eps)
        b_first *= factor * tl.load(p_norm + o_first, mask=m_first, other=0.0).to(tl.float32)
        b_second *= factor * tl.load(p_norm + o_second, mask=m_second, other=0.0).to(tl.float32)
    if ROTATE:
        m_rotated = o_pair < half
        p_cos += i_b * s_cos_b + i_t * s_cos_t
        p_sin += i_b * s_sin_b + i_t * s_sin_t
        b_cos, b_sin = (
            _rotary(p_cos, o_first, m_rotated, s_cos_d, 1.0),
            _rotary(p_sin, o_first, m_rotated, s_sin_d, 0.0),
        )
        b_turned = b_first * b_cos - b_second * b_sin
        b_cos = _rotary(p_cos, o_second, m_rotated, s_cos_d, 1.0)
        b_sin = _rotary(p_sin, o_second, m_rotated, s_sin_d, 0.0)
        b_second = b_second * b_cos + b_first * b_sin
        b_first = b_turned
    p_out += (tl.program_id(1).to(tl.int64) * tokens + i_t) * width
    tl.store(p_out + o_first, b_first.to(p_out.dtype.element_ty), mask=m_first)
    tl.store(p_out + o_second, b_second.to(p_out.dtype.element_ty), mask=m_second)


@triton.jit
def _products(p_q, p_k, o_row, o_n, rows, num, width, s_q_row, s_k_n, PARTS: tl.constexpr, PRECISION: tl.constexpr,
              BLOCK_M: tl.constexpr, BLOCK: tl.constexpr, BLOCK_W: tl.constexpr):  # fmt: skip
    """``[BLOCK_M, BLOCK]``: for each row and block the largest product; -inf in rows that are none."""
    b_best = tl.full([BLOCK_M, BLOCK], float("-inf"), tl.float32)
    m_row, m_n = o_row < rows, o_n < num
    for i_part in tl.range(0, PARTS):
        p_keys = p_k + (o_n * PARTS + i_part).to(tl.int64)[None, :] * s_k_n
        b_x = tl.zeros([BLOCK_M, BLOCK], tl.float32)
        for i_w in range(0, width, BLOCK_W):
            o_w = i_w + tl.arange(0, BLOCK_W)
            m_w = o_w < width
            b_q = tl.load(p_q + o_row[:, None] * s_q_row + o_w[None, :], mask=m_row[:, None] & m_w[None, :], other=0.0)
            b_k = tl.load(p_keys + o_w[:, None], mask=m_w[:, None] & m_n[None, :], other=0.0)
            b_x = tl.dot(b_q, b_k, b_x, input_precision=PRECISION)
        b_best = tl.maximum(b_best, b_x)
    return tl.where(m_row[:, None], b_best, float("-inf"))


@triton.jit(do_not_specialize=_SIZES)
def token_scores_kernel(
    p_q, p_k, p_out, scale, heads, num, columns, padded, width, tokens, s_q_b, s_q_h, s_q_t, s_k_b, s_k_h, s_k_n,
    GROUP: tl.constexpr, PARTS: tl.constexpr, TOGETHER: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Scores of BLOCK key blocks for one KV head: of one token, whose rows are the GROUP of query vectors; or of each
    token of a window (TOGETHER), ``out [B, Hkv, tokens, padded]``."""
    i_bh = tl.program_id(1)
    i_b, i_h = (i_bh // heads).to(tl.int64), (i_bh % heads).to(tl.int64)
    o_n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    o_row = tl.arange(0, BLOCK_M)
    p_q += i_b * s_q_b + i_h * GROUP * s_q_h
    p_k += i_b * s_k_b + i_h * s_k_h
    if TOGETHER:
        b_x = tl.full([BLOCK_M, BLOCK], float("-inf"), tl.float32)
        for i_g in range(GROUP):
            b_x = tl.maximum(b_x, _products(
                p_q + i_g * s_q_h, p_k, o_row, o_n, tokens, num, width, s_q_t, s_k_n, PARTS, PRECISION, BLOCK_M, BLOCK,
                BLOCK_W,
            ))  # fmt: skip
        p_rows = p_out + (i_bh.to(tl.int64) * tokens + o_row)[:, None] * padded + o_n[None, :]
        b_x = tl.where((o_n < num)[None, :], b_x * scale, float("-inf"))
        tl.store(p_rows, b_x, mask=(o_row < tokens)[:, None] & (o_n < columns)[None, :])
    else:
        b_x = _products(
            p_q, p_k, o_row, o_n, GROUP, num, width, s_q_h, s_k_n, PARTS, PRECISION, BLOCK_M, BLOCK, BLOCK_W
        )
        b_best = tl.where(o_n < num, tl.max(b_x, 0) * scale, float("-inf"))
        tl.store(p_out + i_bh.to(tl.int64) * padded + o_n, b_best, mask=o_n < columns)


@triton.jit(do_not_specialize=_SIZES)
def largest_share_kernel(
    p_x, p_out, tokens, num, columns, padded, out_padded, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """A row of scores of a window: the largest log-probability that any of its tokens gives each block."""
    o_row = tl.arange(0, BLOCK_M)
    m_row = o_row < tokens
    p_rows = p_x + (tl.program_id(0).to(tl.int64) * tokens + o_row)[:, None] * padded
    b_max = tl.full([BLOCK_M], -1.0e30, tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, num, BLOCK):
        o_n = start + tl.arange(0, BLOCK)
        b_x = tl.load(p_rows + o_n[None, :], mask=m_row[:, None] & (o_n < num)[None, :], other=float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_x, 1))
        b_sum = b_sum * tl.exp(b_max - b_new) + tl.sum(tl.exp(b_x - b_new[:, None]), 1)
        b_max = b_new
    b_total = b_max + tl.log(tl.where(b_sum > 0.0, b_sum, 1.0))
    p_out += tl.program_id(0).to(tl.int64) * out_padded
    for start in range(0, columns, BLOCK):
        o_n = start + tl.arange(0, BLOCK)
        b_x = tl.load(p_rows + o_n[None, :], mask=m_row[:, None] & (o_n < num)[None, :], other=float("-inf"))
        tl.store(p_out + o_n, tl.max(b_x - b_total[:, None], 0), mask=o_n < columns)


def encode_tokens(
    q: Tensor, linear: Tensor, norm: Tensor | None, cos: Tensor | None, sin: Tensor | None, eps: float
) -> Tensor:
    """``[B, H, T, W]``, contiguous, dtype of ``linear``."""
    q = q if q.stride(-1) == 1 else q.contiguous()
    batch, _, tokens, head_dim = q.shape
    heads, channels, width = linear.shape
    out = torch.empty(batch, heads, tokens, width, dtype=linear.dtype, device=q.device)
    if out.numel() == 0:
        return out
    half, middle = pairs_of(cos, width)
    block_w = max(16, power_of_2(middle))
    launch(
        encode_tokens_kernel,
        (tokens, batch * heads),
        q,
        linear.contiguous(),
        norm,
        cos,
        sin,
        out,
        eps,
        heads,
        tokens,
        channels,
        head_dim,
        width,
        half,
        middle,
        *q.stride()[:3],
        *table_strides(cos, width),
        *table_strides(sin, width),
        NORM=norm is not None,
        ROTATE=cos is not None,
        PLAIN=half in (0, middle),
        BLOCK_C=max(16, 4096 // block_w),
        BLOCK_W=block_w,
        num_warps=4,
    )
    return out


def token_scores(queries: Tensor, keys: Tensor, row: Row) -> Tensor:
    """``[B, Hkv, 1, columns]``, whose rows are padded in memory."""
    out = empty_scores(keys, 1, row.columns)
    if out.numel() == 0:
        return out
    if not row.together:
        multiply(queries, keys, row, out)
        return out
    products = empty_scores(keys, queries.shape[2], row.columns)
    multiply(queries, keys, row, products)
    largest_share(products, keys.shape[2] // row.parts, out)
    return out


def multiply(queries: Tensor, keys: Tensor, row: Row, out: Tensor) -> None:
    """Writes the scores of each query, ``out [B, Hkv, R, columns]``, whose rows are padded in memory."""
    queries, keys = (x if x.stride(-1) == 1 else x.contiguous() for x in (queries, keys))
    batch, kv_heads, count, width = keys.shape
    tokens, group = queries.shape[2], queries.shape[1] // kv_heads
    single = keys.dtype == torch.float32  # whose products are unrolled multiply-adds: in smaller parts
    launch(
        token_scores_kernel,
        (num_blocks(row.columns, BLOCK_N), batch * kv_heads),
        queries,
        keys,
        out,
        row.scale,
        kv_heads,
        count // row.parts,
        row.columns,
        out.stride(2),
        width,
        tokens,
        *queries.stride()[:3],
        *keys.stride()[:3],
        GROUP=group,
        PARTS=row.parts,
        TOGETHER=row.together,
        PRECISION="ieee" if single else "tf32",  # means nothing to 16-bit products
        BLOCK_M=max(16, power_of_2(tokens if row.together else group)),
        BLOCK=BLOCK_N,
        BLOCK_W=min(max(16, power_of_2(width)), 32 if single else 128),
        num_warps=4,
    )


def largest_share(products: Tensor, num: int, out: Tensor) -> None:
    """Writes the largest log-probability of each of ``num`` blocks, ``out [B, Hkv, 1, columns]``."""
    batch, kv_heads, tokens, columns = products.shape
    launch(
        largest_share_kernel,
        (batch * kv_heads,),
        products,
        out,
        tokens,
        num,
        columns,
        products.stride(2),
        out.stride(1),
        BLOCK_M=power_of_2(tokens),
        BLOCK=BLOCK_ROW if tokens <= 16 else BLOCK_N,
        num_warps=4,
    )
