"""The inverse rotation in Triton: one read and one write of x. What bounds it is memory."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import power_of_2
from ..triton_launch import launch

TOKENS = 32


@triton.jit
def _tokens(p_old, p_recent, o_d, m_old, m_recent, m_d, RECENT: tl.constexpr):
    """Channels ``o_d`` of tokens from where they lie."""
    b_x = tl.load(p_old + o_d[None, :], mask=m_old[:, None] & m_d[None, :], other=0.0)
    if RECENT:
        b_recent = tl.load(p_recent + o_d[None, :], mask=m_recent[:, None] & m_d[None, :], other=0.0)
        b_x = tl.where(m_recent[:, None], b_recent, b_x)
    return b_x


@triton.jit(do_not_specialize=["rows", "heads", "length", "old"])  # another length must not compile it again
def inverse_rope_kernel(
    p_x, p_cos, p_sin, p_recent, p_out, rows, heads, length, old, s_x_b, s_x_h, s_x_t, s_recent_b, s_recent_h,
    s_recent_t, s_out_b, s_out_h, s_out_t, s_cos_b, s_cos_t, s_sin_b, s_sin_t,
    HALF: tl.constexpr, REST: tl.constexpr, PADDED_HALF: tl.constexpr, PADDED_REST: tl.constexpr,
    TOKENS: tl.constexpr, RECENT: tl.constexpr,
):  # fmt: skip
    """TOKENS tokens of one head. Channels o_d and o_d + HALF turn together; the REST behind them do not. RECENT: tokens
    from ``old`` on are taken as they are."""
    # Programs that run at one time are neighbours: those of the same tokens in all ``rows``, so that what they read of
    # the table comes from memory once.
    i_bh = tl.program_id(0).to(tl.int64) % rows
    i_b, i_h = i_bh // heads, i_bh % heads
    o_t = tl.program_id(0).to(tl.int64) // rows * TOKENS + tl.arange(0, TOKENS)
    o_d = tl.arange(0, PADDED_HALF)
    m_t, m_d = o_t < length, o_d < HALF
    m_old, m_recent = m_t & (o_t < old), m_t & (o_t >= old)
    m_turned, m_x = m_old[:, None] & m_d[None, :], m_t[:, None] & m_d[None, :]
    p_row = p_x + i_b * s_x_b + i_h * s_x_h + o_t[:, None] * s_x_t
    p_last = p_recent
    if RECENT:
        p_last = p_recent + i_b * s_recent_b + i_h * s_recent_h + (o_t - old)[:, None] * s_recent_t
    p_to = p_out + i_b * s_out_b + i_h * s_out_h + o_t[:, None] * s_out_t
    # [TOKENS, HALF]; the table repeats its halves
    b_cos = tl.load(p_cos + i_b * s_cos_b + o_t[:, None] * s_cos_t + o_d[None, :], mask=m_turned, other=1.0)
    b_sin = tl.load(p_sin + i_b * s_sin_b + o_t[:, None] * s_sin_t + o_d[None, :], mask=m_turned, other=0.0)
    b_cos, b_sin = b_cos.to(tl.float32), b_sin.to(tl.float32)
    b_low_x = _tokens(p_row, p_last, o_d, m_old, m_recent, m_d, RECENT)
    b_high_x = _tokens(p_row, p_last, HALF + o_d, m_old, m_recent, m_d, RECENT)
    b_low, b_high = b_low_x.to(tl.float32), b_high_x.to(tl.float32)
    b_norm = 1.0 / (b_cos * b_cos + b_sin * b_sin)
    b_back = ((b_low * b_cos + b_high * b_sin) * b_norm).to(p_out.dtype.element_ty)
    tl.store(p_to + o_d[None, :], tl.where(m_old[:, None], b_back, b_low_x), mask=m_x)
    b_back = ((b_high * b_cos - b_low * b_sin) * b_norm).to(p_out.dtype.element_ty)
    tl.store(p_to + HALF + o_d[None, :], tl.where(m_old[:, None], b_back, b_high_x), mask=m_x)
    if REST > 0:
        o_r = tl.arange(0, PADDED_REST)
        b_rest = _tokens(p_row, p_last, 2 * HALF + o_r, m_old, m_recent, o_r < REST, RECENT)
        tl.store(p_to + 2 * HALF + o_r[None, :], b_rest, mask=m_t[:, None] & (o_r < REST)[None, :])


def inverse_rope(x: Tensor, cos: Tensor, sin: Tensor, recent: Tensor | None, out: Tensor) -> None:
    batch, heads, length, head_dim = x.shape
    if x.numel() == 0:
        return
    if recent is not None and recent.numel() == 0:
        recent = None
    x, cos, sin = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (x, cos, sin))
    if recent is not None and recent.stride(-1) != 1:
        recent = recent.contiguous()
    width = cos.shape[-1]
    launch(
        inverse_rope_kernel,
        (triton.cdiv(length, TOKENS) * batch * heads,),
        x,
        cos,
        sin,
        recent,
        out,
        batch * heads,
        heads,
        length,
        length if recent is None else length - recent.shape[2],
        *x.stride()[:3],
        *((0, 0, 0) if recent is None else recent.stride()[:3]),
        *out.stride()[:3],
        cos.stride(0) if cos.shape[0] > 1 else 0,
        cos.stride(1),
        sin.stride(0) if sin.shape[0] > 1 else 0,
        sin.stride(1),
        HALF=width // 2,
        REST=head_dim - width,
        PADDED_HALF=power_of_2(width // 2),
        PADDED_REST=power_of_2(max(1, head_dim - width)),
        TOKENS=TOKENS,
        RECENT=recent is not None,
        num_warps=4,
    )
