"""The inverse rotation in Triton: one read and one write of x. What bounds it is memory."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import power_of_2
from ..triton_launch import launch

TOKENS = 32


@triton.jit(do_not_specialize=["heads", "length"])  # another length must not compile it again
def inverse_rope_kernel(
    p_x, p_cos, p_sin, p_out, heads, length, s_x_b, s_x_h, s_x_t, s_out_b, s_out_h, s_out_t,
    s_cos_b, s_cos_t, s_sin_b, s_sin_t,
    HALF: tl.constexpr, REST: tl.constexpr, PADDED_HALF: tl.constexpr, PADDED_REST: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """TOKENS tokens of one head. Channels o_d and o_d + HALF turn together; the REST behind them do not."""
    i_bh = tl.program_id(1).to(tl.int64)
    i_b, i_h = i_bh // heads, i_bh % heads
    o_t = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    o_d = tl.arange(0, PADDED_HALF)
    m_t = o_t < length
    m_x = m_t[:, None] & (o_d < HALF)[None, :]
    p_row = p_x + i_b * s_x_b + i_h * s_x_h + o_t[:, None] * s_x_t
    p_to = p_out + i_b * s_out_b + i_h * s_out_h + o_t[:, None] * s_out_t
    # [TOKENS, HALF]; the table repeats its halves
    b_cos = tl.load(p_cos + i_b * s_cos_b + o_t[:, None] * s_cos_t + o_d[None, :], mask=m_x, other=1.0).to(tl.float32)
    b_sin = tl.load(p_sin + i_b * s_sin_b + o_t[:, None] * s_sin_t + o_d[None, :], mask=m_x, other=0.0).to(tl.float32)
    b_low = tl.load(p_row + o_d[None, :], mask=m_x, other=0.0).to(tl.float32)
    b_high = tl.load(p_row + HALF + o_d[None, :], mask=m_x, other=0.0).to(tl.float32)
    b_norm = 1.0 / (b_cos * b_cos + b_sin * b_sin)
    tl.store(p_to + o_d[None, :], ((b_low * b_cos + b_high * b_sin) * b_norm).to(p_out.dtype.element_ty), mask=m_x)
    tl.store(
        p_to + HALF + o_d[None, :],
        ((b_high * b_cos - b_low * b_sin) * b_norm).to(p_out.dtype.element_ty),
        mask=m_x,
    )
    if REST > 0:
        o_r = tl.arange(0, PADDED_REST)
        m_r = m_t[:, None] & (o_r < REST)[None, :]
        tl.store(p_to + 2 * HALF + o_r[None, :], tl.load(p_row + 2 * HALF + o_r[None, :], mask=m_r), mask=m_r)


def inverse_rope(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
    batch, heads, length, head_dim = x.shape
    if x.numel() == 0:
        return
    x, cos, sin = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (x, cos, sin))
    width = cos.shape[-1]
    launch(
        inverse_rope_kernel,
        (triton.cdiv(length, TOKENS), batch * heads),
        x,
        cos,
        sin,
        out,
        heads,
        length,
        *x.stride()[:3],
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
        num_warps=4,
    )
