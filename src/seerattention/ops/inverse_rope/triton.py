"""The inverse rotation in Triton: one read and one write of x, or of its pooled blocks. What bounds it is memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..block_pooling.triton import kind_slots
from ..dispatch import power_of_2
from ..indices import num_blocks
from ..triton_launch import launch

TOKENS = 32
# Tokens of a program that pools, where blocks are not longer; and numbers of x that a warp of one holds.
POOLED_TOKENS, NUMBERS_PER_WARP = 64, 1024


@triton.jit
def _load(p_row, p_last, o_d, m_t, m_old, m_d, whole, RECENT: tl.constexpr):
    """Channels ``o_d`` of tokens, [TOKENS, channels], 0 of those that are not there; old ones lie at ``p_row``, others
    at ``p_last``. ``whole``: all are old, as nearly always."""
    if RECENT:
        if whole:
            b_x = tl.load(p_row + o_d[None, :], mask=m_t[:, None] & m_d[None, :], other=0.0)
        else:
            b_x = tl.load(p_row + o_d[None, :], mask=m_old[:, None] & m_d[None, :], other=0.0)
            b_last = tl.load(p_last + o_d[None, :], mask=(m_t & ~m_old)[:, None] & m_d[None, :], other=0.0)
            b_x = tl.where(m_old[:, None], b_x, b_last)
    else:
        b_x = tl.load(p_row + o_d[None, :], mask=m_t[:, None] & m_d[None, :], other=0.0)
    return b_x


@triton.jit
def _turned_back(
    p_row, p_last, p_cos, p_sin, o_d, m_t, m_old, whole, HALF: tl.constexpr, RECENT: tl.constexpr
):  # fmt: skip
    """The two halves of the channels that turn together, [TOKENS, HALF] in the dtype of x, 0 of tokens that are not
    there; as they are of those that are not old. The table repeats its halves."""
    m_d = o_d < HALF
    m_turned = m_old[:, None] & m_d[None, :]
    b_cos = tl.load(p_cos + o_d[None, :], mask=m_turned, other=1.0).to(tl.float32)
    b_sin = tl.load(p_sin + o_d[None, :], mask=m_turned, other=0.0).to(tl.float32)
    b_low_x = _load(p_row, p_last, o_d, m_t, m_old, m_d, whole, RECENT)
    b_high_x = _load(p_row + HALF, p_last + HALF, o_d, m_t, m_old, m_d, whole, RECENT)
    b_low, b_high = b_low_x.to(tl.float32), b_high_x.to(tl.float32)
    b_norm = 1.0 / (b_cos * b_cos + b_sin * b_sin)
    b_back = ((b_low * b_cos + b_high * b_sin) * b_norm).to(b_low_x.dtype)
    b_low_x = tl.where(m_old[:, None], b_back, b_low_x)
    b_back = ((b_high * b_cos - b_low * b_sin) * b_norm).to(b_high_x.dtype)
    return b_low_x, tl.where(m_old[:, None], b_back, b_high_x)


@triton.jit
def _places(
    p_x, p_cos, p_sin, p_recent, rows, heads, length, old, s_x_b, s_x_h, s_x_t, s_recent_b, s_recent_h, s_recent_t,
    s_cos_b, s_cos_t, s_sin_b, s_sin_t, TOKENS: tl.constexpr, RECENT: tl.constexpr,
):  # fmt: skip
    """Row and head of a program, its tokens, which of them are there and which are to be turned back; and where these
    and their rows of the table lie.

    Programs that run at one time are neighbours: those of the same tokens in all ``rows``, so that what they read of
    the table comes from memory once.
    """
    i_bh = tl.program_id(0).to(tl.int64) % rows
    i_b, i_h = i_bh // heads, i_bh % heads
    o_t = tl.program_id(0).to(tl.int64) // rows * TOKENS + tl.arange(0, TOKENS)
    m_t = o_t < length
    m_old = m_t & (o_t < old)
    p_row = p_x + i_b * s_x_b + i_h * s_x_h + o_t[:, None] * s_x_t
    p_last = p_row
    if RECENT:
        p_last = p_recent + i_b * s_recent_b + i_h * s_recent_h + (o_t - old)[:, None] * s_recent_t
    p_cos_rows = p_cos + i_b * s_cos_b + o_t[:, None] * s_cos_t
    p_sin_rows = p_sin + i_b * s_sin_b + o_t[:, None] * s_sin_t
    return i_b, i_h, o_t, m_t, m_old, p_row, p_last, p_cos_rows, p_sin_rows


_SIZES = ["rows", "heads", "length", "old", "num"]  # another length must not compile it again


@triton.jit(do_not_specialize=_SIZES[:-1])
def inverse_rope_kernel(
    p_x, p_cos, p_sin, p_recent, p_out, rows, heads, length, old, s_x_b, s_x_h, s_x_t, s_recent_b, s_recent_h,
    s_recent_t, s_cos_b, s_cos_t, s_sin_b, s_sin_t, s_out_b, s_out_h, s_out_t,
    HALF: tl.constexpr, REST: tl.constexpr, PADDED_HALF: tl.constexpr, PADDED_REST: tl.constexpr,
    TOKENS: tl.constexpr, RECENT: tl.constexpr,
):  # fmt: skip
    """TOKENS tokens of one head. Channels o_d and o_d + HALF turn together; the REST behind them do not. RECENT: tokens
    from ``old`` on are taken as they are."""
    i_b, i_h, o_t, m_t, m_old, p_row, p_last, p_own_cos, p_own_sin = _places(
        p_x, p_cos, p_sin, p_recent, rows, heads, length, old, s_x_b, s_x_h, s_x_t, s_recent_b, s_recent_h, s_recent_t,
        s_cos_b, s_cos_t, s_sin_b, s_sin_t, TOKENS, RECENT,
    )  # fmt: skip
    o_d = tl.arange(0, PADDED_HALF)
    m_x = m_t[:, None] & (o_d < HALF)[None, :]
    whole = (tl.program_id(0) // rows + 1) * TOKENS <= old
    b_low, b_high = _turned_back(
        p_row, p_last, p_own_cos, p_own_sin, o_d, m_t, m_old, whole, HALF, RECENT
    )  # fmt: skip
    p_to = p_out + i_b * s_out_b + i_h * s_out_h + o_t[:, None] * s_out_t
    tl.store(p_to + o_d[None, :], b_low, mask=m_x)
    tl.store(p_to + HALF + o_d[None, :], b_high, mask=m_x)
    if REST > 0:
        o_r = tl.arange(0, PADDED_REST)
        b_rest = _load(p_row + 2 * HALF, p_last + 2 * HALF, o_r, m_t, m_old, o_r < REST, whole, RECENT)
        tl.store(p_to + 2 * HALF + o_r[None, :], b_rest, mask=m_t[:, None] & (o_r < REST)[None, :])


@triton.jit
def _pool(
    b_x, p_to, o_d, m_d, m_t, o_n, m_n, length, HEAD_DIM: tl.constexpr, MAX_SLOT: tl.constexpr, MIN_SLOT: tl.constexpr,
    AVG_SLOT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Reduce and store each block of ``b_x [TOKENS, channels]``; tokens that are not there are 0."""
    blocks: tl.constexpr = b_x.shape[0] // BLOCK
    shape: tl.constexpr = (blocks, BLOCK, b_x.shape[1])
    b_x = b_x.to(tl.float32)
    p_own = p_to[:, None] + o_d[None, :]
    m_out = m_n[:, None] & m_d[None, :]
    if MAX_SLOT >= 0:
        b_best = tl.max(tl.reshape(tl.where(m_t[:, None], b_x, float("-inf")), shape), 1)
        tl.store(p_own + MAX_SLOT * HEAD_DIM, b_best.to(p_to.dtype.element_ty), mask=m_out)
    if MIN_SLOT >= 0:
        b_best = tl.min(tl.reshape(tl.where(m_t[:, None], b_x, float("inf")), shape), 1)
        tl.store(p_own + MIN_SLOT * HEAD_DIM, b_best.to(p_to.dtype.element_ty), mask=m_out)
    if AVG_SLOT >= 0:
        b_count = tl.maximum(tl.minimum(length - o_n * BLOCK, BLOCK), 1).to(tl.float32)
        b_mean = tl.sum(tl.reshape(b_x, shape), 1) / b_count[:, None]
        tl.store(p_own + AVG_SLOT * HEAD_DIM, b_mean.to(p_to.dtype.element_ty), mask=m_out)


@triton.jit(do_not_specialize=_SIZES)
def pooled_inverse_rope_kernel(
    p_x, p_cos, p_sin, p_recent, p_out, rows, heads, length, old, num, s_x_b, s_x_h, s_x_t, s_recent_b, s_recent_h,
    s_recent_t, s_cos_b, s_cos_t, s_sin_b, s_sin_t,
    HALF: tl.constexpr, REST: tl.constexpr, PADDED_HALF: tl.constexpr, PADDED_REST: tl.constexpr,
    TOKENS: tl.constexpr, RECENT: tl.constexpr, BLOCK: tl.constexpr, NUM_KINDS: tl.constexpr,
    MAX_SLOT: tl.constexpr, MIN_SLOT: tl.constexpr, AVG_SLOT: tl.constexpr,
):  # fmt: skip
    """The same tokens, pooled: ``out [B, H, num, NUM_KINDS * D]``. *_SLOT is the place of a kind, -1 where it is not
    asked for."""
    HEAD_DIM: tl.constexpr = 2 * HALF + REST
    i_b, i_h, _, m_t, m_old, p_row, p_last, p_own_cos, p_own_sin = _places(
        p_x, p_cos, p_sin, p_recent, rows, heads, length, old, s_x_b, s_x_h, s_x_t, s_recent_b, s_recent_h, s_recent_t,
        s_cos_b, s_cos_t, s_sin_b, s_sin_t, TOKENS, RECENT,
    )  # fmt: skip
    o_d = tl.arange(0, PADDED_HALF)
    m_d = o_d < HALF
    whole = (tl.program_id(0) // rows + 1) * TOKENS <= old
    b_low, b_high = _turned_back(
        p_row, p_last, p_own_cos, p_own_sin, o_d, m_t, m_old, whole, HALF, RECENT
    )  # fmt: skip
    o_n = tl.program_id(0) // rows * (TOKENS // BLOCK) + tl.arange(0, TOKENS // BLOCK)
    m_n = o_n < num
    p_to = p_out + ((i_b * heads + i_h) * num + o_n) * NUM_KINDS * HEAD_DIM
    _pool(b_low, p_to, o_d, m_d, m_t, o_n, m_n, length, HEAD_DIM, MAX_SLOT, MIN_SLOT, AVG_SLOT, BLOCK)
    _pool(b_high, p_to + HALF, o_d, m_d, m_t, o_n, m_n, length, HEAD_DIM, MAX_SLOT, MIN_SLOT, AVG_SLOT, BLOCK)
    if REST > 0:
        o_r = tl.arange(0, PADDED_REST)
        b_rest = _load(p_row + 2 * HALF, p_last + 2 * HALF, o_r, m_t, m_old, o_r < REST, whole, RECENT)
        p_to += 2 * HALF
        _pool(b_rest, p_to, o_r, o_r < REST, m_t, o_n, m_n, length, HEAD_DIM, MAX_SLOT, MIN_SLOT, AVG_SLOT, BLOCK)


def inverse_rope(x: Tensor, cos: Tensor, sin: Tensor, recent: Tensor | None, out: Tensor) -> None:
    if x.numel() == 0:
        return
    tensors, sizes, strides, constants = _given(x, cos, sin, recent)
    launch(
        inverse_rope_kernel,
        (triton.cdiv(x.shape[2], TOKENS) * sizes[0],),
        *tensors,
        out,
        *sizes,
        *strides,
        *out.stride()[:3],
        TOKENS=TOKENS,
        num_warps=4,
        **constants,
    )


def pooled_inverse_rope(
    x: Tensor, cos: Tensor, sin: Tensor, recent: Tensor | None, kinds: Sequence[str], block_size: int
) -> Tensor:
    """Pool blocks of a power of two tokens of what :func:`inverse_rope` gives, which is not written."""
    batch, heads, length, head_dim = x.shape
    num = num_blocks(length, block_size)
    out = torch.empty(batch, heads, num, len(kinds) * head_dim, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    tensors, sizes, strides, constants = _given(x, cos, sin, recent)
    tokens = max(POOLED_TOKENS, block_size)
    numbers = tokens * max(2 * constants["PADDED_HALF"], constants["PADDED_REST"])
    launch(
        pooled_inverse_rope_kernel,
        (triton.cdiv(length, tokens) * sizes[0],),
        *tensors,
        out,
        *sizes,
        num,
        *strides,
        TOKENS=tokens,
        BLOCK=block_size,
        NUM_KINDS=len(kinds),
        num_warps=max(1, min(8, numbers // NUMBERS_PER_WARP)),
        **{f"{kind}_SLOT": slot for kind, slot in kind_slots(kinds).items()},
        **constants,
    )
    return out


def _given(
    x: Tensor, cos: Tensor, sin: Tensor, recent: Tensor | None
) -> tuple[tuple[Tensor | None, ...], tuple[int, ...], tuple[int, ...], dict[str, Any]]:
    """What both kernels are given: tensors but the result, sizes, strides, constants."""
    batch, heads, length, head_dim = x.shape
    if recent is not None and recent.numel() == 0:
        recent = None
    x, cos, sin = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (x, cos, sin))
    if recent is not None and recent.stride(-1) != 1:
        recent = recent.contiguous()
    width = cos.shape[-1]
    strides = (
        *x.stride()[:3],
        *((0, 0, 0) if recent is None else recent.stride()[:3]),
        cos.stride(0) if cos.shape[0] > 1 else 0,
        cos.stride(1),
        sin.stride(0) if sin.shape[0] > 1 else 0,
        sin.stride(1),
    )
    constants = {
        "HALF": width // 2,
        "REST": head_dim - width,
        "PADDED_HALF": power_of_2(width // 2),
        "PADDED_REST": power_of_2(max(1, head_dim - width)),
        "RECENT": recent is not None,
    }
    old = length if recent is None else length - recent.shape[2]
    return (x, cos, sin, recent), (batch * heads, heads, length, old), strides, constants
