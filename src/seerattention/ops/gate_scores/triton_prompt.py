"""Sub-blocks of whole prompts in Triton: pooled, projected and rotated in one kernel.

Pooled sub-blocks of 8 tokens in three ways are three eighths of the queries, of 4 tokens three quarters: written and
read again they would cost as much as reading the queries. Here they stay in registers. Each thread pools the channels
of its sub-blocks token by token, some channels of all at a time; those are a part of the product with the projection.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import dispatch
from ..block_pooling.triton import kind_slots
from ..dispatch import power_of_2
from ..indices import num_blocks
from ..triton_launch import launch
from .triton_encode import add_product, channel_pairs, pairs_of, rotate_store, table_strides

# Sub-blocks of a program, channels that it pools at a time, warps. Larger tiles read less of the projection; those of
# Hopper GPUs fill the registers there, and do not fit those of others.
SHAPE_HOPPER, SHAPE, SHAPE_FLOAT32 = (64, 64, 4), (32, 64, 4), (32, 16, 4)

_SIZES = ["q_programs", "q_heads", "q_num", "k_heads", "k_num", "length", "last"]


@triton.jit
def _take(p_x, m_x, b_max, b_min, b_sum):
    """One more token of each sub-block; where ``m_x`` (None: everywhere) holds."""
    if m_x is None:
        b_x = tl.load(p_x).to(tl.float32)
        b_max, b_min = tl.maximum(b_max, b_x), tl.minimum(b_min, b_x)
    else:
        b_x = tl.load(p_x, mask=m_x, other=0.0).to(tl.float32)
        b_max = tl.maximum(b_max, tl.where(m_x, b_x, float("-inf")))
        b_min = tl.minimum(b_min, tl.where(m_x, b_x, float("inf")))
    return b_max, b_min, b_sum + b_x


@triton.jit
def _add_kind(
    b_pooled, p_linear, o_c, m_c, o_first, o_second, end_first, width, b_first, b_second, PRECISION: tl.constexpr,
    SLOT: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Add the product of one kind of pooling ``[BLOCK_N, BLOCK_C]``, if it is asked for, with its rows of the
    projection."""
    if SLOT >= 0:
        b_first, b_second = add_product(
            b_pooled.to(p_linear.dtype.element_ty), p_linear + SLOT * HEAD_DIM * width, o_c, m_c, o_first, o_second,
            end_first, width, b_first, b_second, PRECISION,
        )  # fmt: skip
    return b_first, b_second


@triton.jit
def _pool_encode(
    i_bh, i_n, p_x, p_linear, p_cos, p_sin, p_out, heads, num, length, width, half, middle, last, s_x_b, s_x_h,
    s_x_t, s_cos_b, s_cos_t, s_cos_d, s_sin_b, s_sin_t, s_sin_d,
    MAX_SLOT: tl.constexpr, MIN_SLOT: tl.constexpr, AVG_SLOT: tl.constexpr, NUM_KINDS: tl.constexpr,
    PITCH: tl.constexpr, HEAD_DIM: tl.constexpr, ROTATE: tl.constexpr, PLAIN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """BLOCK_N sub-blocks of one head. *_SLOT is the place of a kind of pooling among the rows of the projection, -1
    where it is not asked for. The others as in ``triton_encode``."""
    i_b, i_h = (i_bh // heads).to(tl.int64), (i_bh % heads).to(tl.int64)
    o_n = (i_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    o_begin = o_n * PITCH
    o_pair = tl.arange(0, BLOCK_W)
    o_first, o_second, end_first = channel_pairs(o_pair, half, middle, width, PLAIN)
    p_rows = p_x + i_b * s_x_b + i_h * s_x_h + o_begin[:, None] * s_x_t
    p_own_linear = p_linear + i_h * NUM_KINDS * HEAD_DIM * width
    b_count = tl.minimum(length - o_begin, PITCH)
    whole = (i_n + 1) * BLOCK_N * PITCH <= length
    b_first = tl.zeros([BLOCK_N, BLOCK_W], tl.float32)
    b_second = tl.zeros([BLOCK_N, BLOCK_W], tl.float32)
    for i_c in tl.range(0, HEAD_DIM, BLOCK_C, num_stages=1):
        o_c = i_c + tl.arange(0, BLOCK_C)
        m_c = o_c < HEAD_DIM
        b_max = tl.full([BLOCK_N, BLOCK_C], float("-inf"), tl.float32)
        b_min = tl.full([BLOCK_N, BLOCK_C], float("inf"), tl.float32)
        b_sum = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
        p_token = p_rows + o_c[None, :]
        if whole & (HEAD_DIM % BLOCK_C == 0):
            for i_t in tl.static_range(PITCH):
                b_max, b_min, b_sum = _take(p_token + i_t * s_x_t, None, b_max, b_min, b_sum)
        else:
            for i_t in tl.range(0, PITCH, num_stages=1):  # seldom, so the shorter code
                m_x = (i_t < b_count)[:, None] & m_c[None, :]
                b_max, b_min, b_sum = _take(p_token + i_t * s_x_t, m_x, b_max, b_min, b_sum)
            m_any = (b_count > 0)[:, None] & m_c[None, :]  # infinities of nothing would make the product one
            b_max, b_min = tl.where(m_any, b_max, 0.0), tl.where(m_any, b_min, 0.0)
        b_avg = b_sum / tl.maximum(b_count, 1).to(tl.float32)[:, None]
        b_first, b_second = _add_kind(
            b_max, p_own_linear, o_c, m_c, o_first, o_second, end_first, width, b_first, b_second, PRECISION,
            MAX_SLOT, HEAD_DIM,
        )  # fmt: skip
        b_first, b_second = _add_kind(
            b_min, p_own_linear, o_c, m_c, o_first, o_second, end_first, width, b_first, b_second, PRECISION,
            MIN_SLOT, HEAD_DIM,
        )  # fmt: skip
        b_first, b_second = _add_kind(
            b_avg, p_own_linear, o_c, m_c, o_first, o_second, end_first, width, b_first, b_second, PRECISION,
            AVG_SLOT, HEAD_DIM,
        )  # fmt: skip
    rotate_store(
        b_first, b_second, i_b, i_bh, o_n, o_n < num, o_pair, o_first, o_second, end_first, p_cos, p_sin, p_out, num,
        width, half, middle, PITCH, 0, last, s_cos_b, s_cos_t, s_cos_d, s_sin_b, s_sin_t, s_sin_d, ROTATE,
    )  # fmt: skip


@triton.jit(do_not_specialize=_SIZES)  # another length must not compile it again
def pool_encode_kernel(
    p_q, p_k, p_q_linear, p_k_linear, p_cos, p_sin, p_q_out, p_k_out, q_programs, q_heads, q_num, k_heads,
    k_num, length, width, half, middle, last, s_q_b, s_q_h, s_q_t, s_k_b, s_k_h, s_k_t,
    s_cos_b, s_cos_t, s_cos_d, s_sin_b, s_sin_t, s_sin_d,
    Q_MAX: tl.constexpr, Q_MIN: tl.constexpr, Q_AVG: tl.constexpr, Q_KINDS: tl.constexpr, Q_PITCH: tl.constexpr,
    K_MAX: tl.constexpr, K_MIN: tl.constexpr, K_AVG: tl.constexpr, K_KINDS: tl.constexpr, K_PITCH: tl.constexpr,
    HEAD_DIM: tl.constexpr, ROTATE: tl.constexpr, PLAIN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """The first ``q_programs`` of the first dimension are of queries, the others of keys. Programs that run at one time
    are the heads of the same tokens, which lie side by side in memory."""
    i_bh, i_n = tl.program_id(0), tl.program_id(1)
    if i_bh < q_programs:
        if i_n * BLOCK_N < q_num:
            _pool_encode(
                i_bh, i_n, p_q, p_q_linear, p_cos, p_sin, p_q_out, q_heads, q_num, length, width, half, middle,
                last, s_q_b, s_q_h, s_q_t, s_cos_b, s_cos_t, s_cos_d, s_sin_b, s_sin_t, s_sin_d,
                Q_MAX, Q_MIN, Q_AVG, Q_KINDS, Q_PITCH, HEAD_DIM, ROTATE, PLAIN, PRECISION, BLOCK_N, BLOCK_C, BLOCK_W,
            )  # fmt: skip
    elif i_n * BLOCK_N < k_num:
        _pool_encode(
            i_bh - q_programs, i_n, p_k, p_k_linear, p_cos, p_sin, p_k_out, k_heads, k_num, length, width,
            half, middle, last, s_k_b, s_k_h, s_k_t, s_cos_b, s_cos_t, s_cos_d, s_sin_b, s_sin_t, s_sin_d,
            K_MAX, K_MIN, K_AVG, K_KINDS, K_PITCH, HEAD_DIM, ROTATE, PLAIN, PRECISION, BLOCK_N, BLOCK_C, BLOCK_W,
        )  # fmt: skip


def pool_encode(
    q: Tensor,
    k: Tensor,
    linears: tuple[Tensor, Tensor],
    tables: tuple[Tensor | None, Tensor | None],
    kinds: tuple[tuple[str, ...], tuple[str, ...]],
    pitches: tuple[int, int],
) -> tuple[Tensor, Tensor]:
    """Encoded sub-blocks of queries and keys: ``[B, Hq, Nq, W]`` and ``[B, Hkv, Nk, W]``, contiguous. A projection for
    each head of either; channels of q and k are contiguous."""
    (cos, sin), width = tables, linears[1].shape[2]
    half, middle = pairs_of(cos, width)
    single = q.dtype == torch.float32
    # float32 products are unrolled multiply-adds, which take long to compile and many registers in large tiles.
    shape = SHAPE_FLOAT32 if single else SHAPE_HOPPER if dispatch.capability(q.device) == 9 else SHAPE
    block_n, block_c, num_warps = shape
    outs: list[Tensor] = []
    constants: dict[str, Any] = {}
    for name, x, linear, mine, pitch in zip("QK", (q, k), linears, kinds, pitches, strict=True):
        num = num_blocks(x.shape[2], pitch)
        outs.append(torch.empty(x.shape[0], linear.shape[0], num, width, dtype=x.dtype, device=x.device))
        constants |= {f"{name}_{kind}": slot for kind, slot in kind_slots(mine).items()}
        constants |= {f"{name}_KINDS": len(mine), f"{name}_PITCH": pitch}
    q_programs = q.shape[0] * q.shape[1]
    programs = q_programs + k.shape[0] * k.shape[1]
    launch(
        pool_encode_kernel,
        (programs, num_blocks(max(out.shape[2] for out in outs), block_n)),
        q,
        k,
        linears[0].contiguous(),
        linears[1].contiguous(),
        cos,
        sin,
        *outs,
        q_programs,
        q.shape[1],
        outs[0].shape[2],
        k.shape[1],
        outs[1].shape[2],
        q.shape[2],
        width,
        half,
        middle,
        0 if cos is None else cos.shape[1] - 1,
        *q.stride()[:3],
        *k.stride()[:3],
        *table_strides(cos, width),
        *table_strides(sin, width),
        **constants,
        HEAD_DIM=q.shape[3],
        ROTATE=cos is not None,
        PLAIN=half in (0, middle),
        PRECISION="ieee" if single else "tf32",  # means nothing to 16-bit products
        BLOCK_N=block_n,
        BLOCK_C=min(block_c, max(16, power_of_2(q.shape[3]))),
        BLOCK_W=max(16, power_of_2(middle)),
        num_warps=num_warps,
        num_stages=1,
    )
    return outs[0], outs[1]
