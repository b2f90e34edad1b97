"""Sub-blocks of whole prompts in Triton: pooled, projected and rotated in one kernel.

Pooled sub-blocks of 8 tokens in three ways are three eighths of the queries, of 4 tokens three quarters: written and
read again they would cost as much as reading the queries. Here they stay in registers. A program takes several tiles of
sub-blocks of one head, token by token: its projection is read once and kept in shared memory, and tokens of the next
tile are on their way there while those of this one are multiplied.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import dispatch
from ..block_pooling.triton import kind_slots
from ..dispatch import power_of_2
from ..indices import num_blocks
from ..triton_launch import launch
from .triton_encode import channel_pairs, pairs_of, rotate_store, second_entries, table_strides

# A prompt whose heads have more tiles than programs fit a GPU at a time gives each program up to so many.
MOST_TILES = 4

_SIZES = ["q_programs", "q_heads", "q_num", "k_heads", "k_num", "length", "last", "tiles"]


class Shape(NamedTuple):
    """Of a program: sub-blocks of a tile, warps, and tokens of a sub-block that are on their way at a time."""

    block_n: int
    num_warps: int
    stages: int


@triton.jit
def _load_kind(p_linear, width, o_c, m_c, o_w, m_w, SLOT: tl.constexpr, HEAD_DIM: tl.constexpr):
    """The rows of one kind of pooling of a projection, ``[BLOCK_C, 2 * BLOCK_W]``."""
    p_rows = p_linear + (SLOT * HEAD_DIM + o_c)[:, None] * width
    return tl.load(p_rows + o_w[None, :], mask=m_c[:, None] & m_w[None, :], other=0.0)


@triton.jit
def _pool_encode(
    i_bh, i_tiles, p_x, p_linear, p_cos, p_sin, p_out, heads, num, length, width, half, middle, last, tiles, s_x_b,
    s_x_h, s_x_t, s_cos_b, s_cos_t, s_cos_d, s_sin_b, s_sin_t, s_sin_d,
    MAX_SLOT: tl.constexpr, MIN_SLOT: tl.constexpr, AVG_SLOT: tl.constexpr, NUM_KINDS: tl.constexpr,
    PITCH: tl.constexpr, HEAD_DIM: tl.constexpr, ROTATE: tl.constexpr, SECOND: tl.constexpr, PLAIN: tl.constexpr,
    FULL: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_W: tl.constexpr,
):  # fmt: skip
    """``tiles`` tiles of BLOCK_N sub-blocks of one head. *_SLOT is the place of a kind of pooling among the rows of the
    projection, -1 where it is not asked for; FULL: its columns are 2 * BLOCK_W in their order. The others as in
    ``triton_encode``."""
    i_b, i_h = (i_bh // heads).to(tl.int64), (i_bh % heads).to(tl.int64)
    o_pair = tl.arange(0, BLOCK_W)
    o_first, o_second, end_first = channel_pairs(o_pair, half, middle, width, PLAIN)
    # Columns of the projection: the first channels of all pairs, then the second ones.
    o_w = tl.arange(0, 2 * BLOCK_W)
    m_w = o_w >= 0
    if not FULL:
        o_lower, o_upper, end_lower = channel_pairs(o_w % BLOCK_W, half, middle, width, PLAIN)
        m_w = tl.where(o_w < BLOCK_W, o_lower < end_lower, o_upper < width)
        o_w = tl.where(o_w < BLOCK_W, o_lower, o_upper)
    o_c = tl.arange(0, BLOCK_C)
    m_c = o_c < HEAD_DIM
    p_own = p_x + i_b * s_x_b + i_h * s_x_h
    p_own_linear = p_linear + i_h * NUM_KINDS * HEAD_DIM * width
    if MAX_SLOT >= 0:
        b_max_linear = _load_kind(p_own_linear, width, o_c, m_c, o_w, m_w, MAX_SLOT, HEAD_DIM)
    if MIN_SLOT >= 0:
        b_min_linear = _load_kind(p_own_linear, width, o_c, m_c, o_w, m_w, MIN_SLOT, HEAD_DIM)
    if AVG_SLOT >= 0:
        b_avg_linear = _load_kind(p_own_linear, width, o_c, m_c, o_w, m_w, AVG_SLOT, HEAD_DIM)
    b_max = tl.full([BLOCK_N, BLOCK_C], float("-inf"), tl.float32)
    b_min = tl.full([BLOCK_N, BLOCK_C], float("inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    own_tiles = tl.minimum(tiles, tl.cdiv(num, BLOCK_N) - i_tiles * tiles)
    for i in tl.range(0, own_tiles * PITCH, num_stages=STAGES):
        i_t = i % PITCH
        o_n = (i_tiles * tiles + i // PITCH) * BLOCK_N + tl.arange(0, BLOCK_N)
        o_t = o_n * PITCH + i_t
        # Behind the last token it is read again, which changes no maximum, and counts nothing in the sum.
        p_x_t = p_own + tl.minimum(o_t, length - 1).to(tl.int64)[:, None] * s_x_t + o_c[None, :]
        if HEAD_DIM == BLOCK_C:
            b_x = tl.load(p_x_t).to(tl.float32)
        else:
            b_x = tl.load(p_x_t, mask=m_c[None, :], other=0.0).to(tl.float32)
        if MAX_SLOT >= 0:
            b_max = tl.maximum(b_max, b_x)
        if MIN_SLOT >= 0:
            b_min = tl.minimum(b_min, b_x)
        if AVG_SLOT >= 0:
            b_sum += b_x * tl.where(o_t < length, 1.0, 0.0)[:, None]
        if i_t == PITCH - 1:
            b_out = tl.zeros([BLOCK_N, 2 * BLOCK_W], tl.float32)
            if MAX_SLOT >= 0:
                b_out = tl.dot(b_max.to(p_linear.dtype.element_ty), b_max_linear, b_out, input_precision=PRECISION)
            if MIN_SLOT >= 0:
                b_out = tl.dot(b_min.to(p_linear.dtype.element_ty), b_min_linear, b_out, input_precision=PRECISION)
            if AVG_SLOT >= 0:
                b_count = tl.minimum(tl.maximum(length - o_n * PITCH, 1), PITCH).to(tl.float32)
                b_avg = (b_sum / b_count[:, None]).to(p_linear.dtype.element_ty)
                b_out = tl.dot(b_avg, b_avg_linear, b_out, input_precision=PRECISION)
            b_first, b_second = tl.split(tl.permute(tl.reshape(b_out, [BLOCK_N, 2, BLOCK_W]), (0, 2, 1)))
            rotate_store(
                b_first, b_second, i_b, i_bh, o_n.to(tl.int64), o_n < num, o_pair, o_first, o_second, end_first, p_cos,
                p_sin, p_out, num, width, half, middle, PITCH, 0, last, s_cos_b, s_cos_t, s_cos_d, s_sin_b, s_sin_t,
                s_sin_d, ROTATE, SECOND,
            )  # fmt: skip
            b_max = tl.full([BLOCK_N, BLOCK_C], float("-inf"), tl.float32)
            b_min = tl.full([BLOCK_N, BLOCK_C], float("inf"), tl.float32)
            b_sum = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)


@triton.jit(do_not_specialize=_SIZES)  # another length must not compile it again
def pool_encode_kernel(
    p_q, p_k, p_q_linear, p_k_linear, p_cos, p_sin, p_q_out, p_k_out, q_programs, q_heads, q_num, k_heads, k_num,
    length, width, half, middle, last, tiles, s_q_b, s_q_h, s_q_t, s_k_b, s_k_h, s_k_t,
    s_cos_b, s_cos_t, s_cos_d, s_sin_b, s_sin_t, s_sin_d,
    Q_MAX: tl.constexpr, Q_MIN: tl.constexpr, Q_AVG: tl.constexpr, Q_KINDS: tl.constexpr, Q_PITCH: tl.constexpr,
    K_MAX: tl.constexpr, K_MIN: tl.constexpr, K_AVG: tl.constexpr, K_KINDS: tl.constexpr, K_PITCH: tl.constexpr,
    HEAD_DIM: tl.constexpr, ROTATE: tl.constexpr, SECOND: tl.constexpr, PLAIN: tl.constexpr, FULL: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """The first ``q_programs`` of the first dimension are of queries, the others of keys. Programs that run at one time
    are the heads of the same tokens, which lie side by side in memory."""
    i_bh, i_tiles = tl.program_id(0), tl.program_id(1)
    if i_bh < q_programs:
        if i_tiles * tiles * BLOCK_N < q_num:
            _pool_encode(
                i_bh, i_tiles, p_q, p_q_linear, p_cos, p_sin, p_q_out, q_heads, q_num, length, width, half, middle,
                last, tiles, s_q_b, s_q_h, s_q_t, s_cos_b, s_cos_t, s_cos_d, s_sin_b, s_sin_t, s_sin_d,
                Q_MAX, Q_MIN, Q_AVG, Q_KINDS, Q_PITCH, HEAD_DIM, ROTATE, SECOND, PLAIN, FULL, PRECISION, STAGES,
                BLOCK_N, BLOCK_C, BLOCK_W,
            )  # fmt: skip
    elif i_tiles * tiles * BLOCK_N < k_num:
        _pool_encode(
            i_bh - q_programs, i_tiles, p_k, p_k_linear, p_cos, p_sin, p_k_out, k_heads, k_num, length, width,
            half, middle, last, tiles, s_k_b, s_k_h, s_k_t, s_cos_b, s_cos_t, s_cos_d, s_sin_b, s_sin_t, s_sin_d,
            K_MAX, K_MIN, K_AVG, K_KINDS, K_PITCH, HEAD_DIM, ROTATE, SECOND, PLAIN, FULL, PRECISION, STAGES,
            BLOCK_N, BLOCK_C, BLOCK_W,
        )  # fmt: skip


def shape_of(x: Tensor, width: int, num_kinds: int) -> Shape | None:
    """Of programs that encode heads like those of ``x`` in ``width`` channels; None: this kernel is not for them.

    Projections of up to 64 channels leave room for two programs a multiprocessor, which do their loads and products by
    turns; wider ones are for larger tiles. In float32 products are unrolled multiply-adds, which take long to compile.
    """
    block_c, block_w = _padded(x.shape[3], width)
    if x.shape[3] > 128 or (x.dtype == torch.float32 and x.is_cuda):
        return None
    hopper = dispatch.capability(x.device) == 9
    shape = Shape(32, 4, 6 if hopper else 3) if block_w <= 32 else Shape(64, 8, 4)
    # The projection, tokens on their way, and a tile that changes its layout.
    channels = num_kinds * 2 * block_w + (shape.stages + 1) * shape.block_n
    return shape if channels * block_c * x.element_size() <= dispatch.shared_memory(x.device) else None


def _padded(head_dim: int, width: int) -> tuple[int, int]:
    """Channels of a head, and pairs of channels, as tiles hold them."""
    return max(16, power_of_2(head_dim)), max(16, power_of_2((width + 1) // 2))


def pool_encode(
    q: Tensor,
    k: Tensor,
    linears: tuple[Tensor, Tensor],
    tables: tuple[Tensor | None, Tensor | None],
    kinds: tuple[tuple[str, ...], tuple[str, ...]],
    pitches: tuple[int, int],
    shape: Shape,
) -> tuple[Tensor, Tensor]:
    """Encoded sub-blocks of queries and keys: ``[B, Hq, Nq, W]`` and ``[B, Hkv, Nk, W]``, contiguous. A projection for
    each head of either; channels of q and k are contiguous."""
    (cos, sin), width = tables, linears[1].shape[2]
    half, middle = pairs_of(cos, width)
    block_c, block_w = _padded(q.shape[3], width)
    outs: list[Tensor] = []
    constants: dict[str, Any] = {}
    for name, x, linear, mine, pitch in zip("QK", (q, k), linears, kinds, pitches, strict=True):
        num = num_blocks(x.shape[2], pitch)
        outs.append(torch.empty(x.shape[0], linear.shape[0], num, width, dtype=x.dtype, device=x.device))
        constants |= {f"{name}_{kind}": slot for kind, slot in kind_slots(mine).items()}
        constants |= {f"{name}_KINDS": len(mine), f"{name}_PITCH": pitch}
    q_programs = q.shape[0] * q.shape[1]
    programs = q_programs + k.shape[0] * k.shape[1]
    most = num_blocks(max(out.shape[2] for out in outs), shape.block_n)
    tiles = min(MOST_TILES, max(1, programs * most // (2 * dispatch.multiprocessors(q.device))))
    plain = half in (0, middle)
    launch(
        pool_encode_kernel,
        (programs, num_blocks(most, tiles)),
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
        tiles,
        *q.stride()[:3],
        *k.stride()[:3],
        *table_strides(cos, width),
        *table_strides(sin, width),
        **constants,
        HEAD_DIM=q.shape[3],
        ROTATE=cos is not None,
        SECOND=second_entries(cos, sin, width),
        PLAIN=plain,
        FULL=plain and width == 2 * block_w,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",  # means nothing to 16-bit products
        STAGES=shape.stages,
        BLOCK_N=shape.block_n,
        BLOCK_C=block_c,
        BLOCK_W=block_w,
        num_warps=shape.num_warps,
        num_stages=1,
    )
    return outs[0], outs[1]
