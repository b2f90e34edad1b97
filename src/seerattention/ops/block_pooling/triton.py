"""Block pooling in Triton: one program per (block, head), one read of x for all kinds.

Programs of one block follow each other: models have the heads of a token side by side in memory, so what is read at a
time lies together.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..indices import num_blocks


@triton.jit(do_not_specialize=["heads", "length", "num"])  # another length must not compile it again
def block_pooling_fwd_kernel(
    x,
    lengths,
    out,
    heads,
    length,
    num,
    head_dim,
    stride_xb,
    stride_xh,
    stride_xt,
    HAS_LENGTHS: tl.constexpr,
    MAX_SLOT: tl.constexpr,
    MIN_SLOT: tl.constexpr,
    AVG_SLOT: tl.constexpr,
    NUM_KINDS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """*_SLOT is the place of a kind among the concatenated results, -1 where it is not asked for."""
    i_h = (tl.program_id(0) % heads).to(tl.int64)
    i_block = tl.program_id(0) // heads % num
    i_b = (tl.program_id(0) // heads // num).to(tl.int64)
    end = length
    if HAS_LENGTHS:
        end = tl.minimum(tl.load(lengths + i_b), length).to(tl.int32)
    o_t = i_block * BLOCK + tl.arange(0, BLOCK)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < head_dim
    m_x = (o_t < end)[:, None] & m_d[None, :]
    p_x = x + i_b * stride_xb + i_h * stride_xh + o_t.to(tl.int64)[:, None] * stride_xt + o_d[None, :]
    b_x = tl.load(p_x, mask=m_x, other=0.0).to(tl.float32)
    count = tl.minimum(end - i_block * BLOCK, BLOCK)
    p_out = out + ((i_b * heads + i_h) * num + i_block) * NUM_KINDS * head_dim + o_d
    if MAX_SLOT >= 0:
        b_max = tl.max(tl.where(m_x, b_x, float("-inf")), 0)
        b_max = tl.where(count > 0, b_max, 0.0)
        tl.store(p_out + MAX_SLOT * head_dim, b_max.to(out.dtype.element_ty), mask=m_d)
    if MIN_SLOT >= 0:
        b_min = tl.min(tl.where(m_x, b_x, float("inf")), 0)
        b_min = tl.where(count > 0, b_min, 0.0)
        tl.store(p_out + MIN_SLOT * head_dim, b_min.to(out.dtype.element_ty), mask=m_d)
    if AVG_SLOT >= 0:
        b_avg = tl.sum(b_x, 0) / tl.maximum(count, 1).to(tl.float32)
        tl.store(p_out + AVG_SLOT * head_dim, b_avg.to(out.dtype.element_ty), mask=m_d)


def block_pooling(x: Tensor, kinds: Sequence[str], *, block_size: int, lengths: Tensor | None) -> Tensor:
    batch, heads, length, head_dim = x.shape
    num = num_blocks(length, block_size)
    out = torch.empty(batch, heads, num, len(kinds) * head_dim, dtype=x.dtype, device=x.device)
    slots = {kind: index for index, kind in enumerate(kinds)}
    block_d = triton.next_power_of_2(head_dim)
    with torch.cuda.device_of(x):
        block_pooling_fwd_kernel[(batch * heads * num,)](
            x,
            lengths,
            out,
            heads,
            length,
            num,
            head_dim,
            *x.stride()[:3],
            HAS_LENGTHS=lengths is not None,
            MAX_SLOT=slots.get("max", -1),
            MIN_SLOT=slots.get("min", -1),
            AVG_SLOT=slots.get("avg", -1),
            NUM_KINDS=len(kinds),
            BLOCK=block_size,
            BLOCK_D=block_d,
            num_warps=8 if block_size * block_d >= 16384 else 4,
        )
    return out
