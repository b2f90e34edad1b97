"""Block pooling in Triton: one read of x for all kinds, by threads that need nothing of each other.

A program takes one block of several heads, side by side as models have them in memory. Each thread reads 16 bytes of
every token, a few tokens at a time, and keeps their maximum, minimum and sum itself: no step of the reduction goes
through shared memory, and what bounds the kernel is how fast x can be read.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..indices import num_blocks

# Tokens that a thread reads at a time, and bytes of each.
STEP, VECTOR_BYTES = 16, 16
MAX_WARPS = 4


@triton.jit
def _pool_step(p_x, o_t, m_x, b_max, b_min, b_sum, stride_xt):
    """Take in the tokens ``o_t`` of the columns at ``p_x``, where ``m_x`` holds (None: everywhere)."""
    p_step = p_x[None, :] + o_t.to(tl.int64)[:, None] * stride_xt
    if m_x is None:
        b_x = tl.load(p_step).to(tl.float32)
        b_max = tl.maximum(b_max, tl.max(b_x, 0))
        b_min = tl.minimum(b_min, tl.min(b_x, 0))
    else:
        b_x = tl.load(p_step, mask=m_x, other=0.0).to(tl.float32)
        b_max = tl.maximum(b_max, tl.max(tl.where(m_x, b_x, float("-inf")), 0))
        b_min = tl.minimum(b_min, tl.min(tl.where(m_x, b_x, float("inf")), 0))
    return b_max, b_min, b_sum + tl.sum(b_x, 0)


@triton.jit(do_not_specialize=["heads", "length", "num"])  # another length must not compile it again
def block_pooling_fwd_kernel(
    x,
    lengths,
    out,
    heads,
    length,
    num,
    stride_xb,
    stride_xh,
    stride_xt,
    HAS_LENGTHS: tl.constexpr,
    MAX_SLOT: tl.constexpr,
    MIN_SLOT: tl.constexpr,
    AVG_SLOT: tl.constexpr,
    NUM_KINDS: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
):
    """*_SLOT is the place of a kind among the concatenated results, -1 where it is not asked for."""
    parts = (heads + HEADS - 1) // HEADS
    i_block = tl.program_id(0) // parts % num
    i_b = (tl.program_id(0) // parts // num).to(tl.int64)
    end = length
    if HAS_LENGTHS:
        end = tl.minimum(tl.load(lengths + i_b), length).to(tl.int32)
    count = tl.minimum(end - i_block * BLOCK, BLOCK)

    # The columns are the channels of one head after the other.
    o_column = tl.arange(0, HEADS * PADDED_DIM)
    o_h = tl.program_id(0) % parts * HEADS + o_column // PADDED_DIM
    o_d = o_column % PADDED_DIM
    m_column = (o_h < heads) & (o_d < HEAD_DIM)
    p_x = x + i_b * stride_xb + o_h.to(tl.int64) * stride_xh + o_d
    o_step = tl.arange(0, STEP)
    b_max = tl.full([HEADS * PADDED_DIM], float("-inf"), tl.float32)
    b_min = tl.full([HEADS * PADDED_DIM], float("inf"), tl.float32)
    b_sum = tl.zeros([HEADS * PADDED_DIM], tl.float32)
    if (count == BLOCK) & (tl.program_id(0) % parts * HEADS + HEADS <= heads) & (HEAD_DIM == PADDED_DIM):
        for start in range(0, BLOCK, STEP):
            o_t = i_block * BLOCK + start + o_step
            b_max, b_min, b_sum = _pool_step(p_x, o_t, None, b_max, b_min, b_sum, stride_xt)
    else:
        for start in range(0, count, STEP):
            o_t = i_block * BLOCK + start + o_step
            m_x = (o_t < end)[:, None] & m_column[None, :]
            b_max, b_min, b_sum = _pool_step(p_x, o_t, m_x, b_max, b_min, b_sum, stride_xt)

    p_out = out + ((i_b * heads + o_h) * num + i_block) * NUM_KINDS * HEAD_DIM + o_d
    if MAX_SLOT >= 0:
        b_max = tl.where(count > 0, b_max, 0.0)
        tl.store(p_out + MAX_SLOT * HEAD_DIM, b_max.to(out.dtype.element_ty), mask=m_column)
    if MIN_SLOT >= 0:
        b_min = tl.where(count > 0, b_min, 0.0)
        tl.store(p_out + MIN_SLOT * HEAD_DIM, b_min.to(out.dtype.element_ty), mask=m_column)
    if AVG_SLOT >= 0:
        b_avg = b_sum / tl.maximum(count, 1).to(tl.float32)
        tl.store(p_out + AVG_SLOT * HEAD_DIM, b_avg.to(out.dtype.element_ty), mask=m_column)


def block_pooling(x: Tensor, kinds: Sequence[str], *, block_size: int, lengths: Tensor | None) -> Tensor:
    batch, heads, length, head_dim = x.shape
    num = num_blocks(length, block_size)
    out = torch.empty(batch, heads, num, len(kinds) * head_dim, dtype=x.dtype, device=x.device)
    slots = {kind: index for index, kind in enumerate(kinds)}
    padded_dim = triton.next_power_of_2(head_dim)
    # As many heads as give every thread one vector.
    columns = 32 * MAX_WARPS * VECTOR_BYTES // x.itemsize
    heads_at_once = max(1, min(columns // padded_dim, triton.next_power_of_2(heads)))
    with torch.cuda.device_of(x):
        block_pooling_fwd_kernel[(batch * num * triton.cdiv(heads, heads_at_once),)](
            x,
            lengths,
            out,
            heads,
            length,
            num,
            *x.stride()[:3],
            HAS_LENGTHS=lengths is not None,
            MAX_SLOT=slots.get("max", -1),
            MIN_SLOT=slots.get("min", -1),
            AVG_SLOT=slots.get("avg", -1),
            NUM_KINDS=len(kinds),
            BLOCK=block_size,
            STEP=STEP,
            HEADS=heads_at_once,
            HEAD_DIM=head_dim,
            PADDED_DIM=padded_dim,
            num_warps=max(1, heads_at_once * padded_dim * MAX_WARPS // columns),
        )
    return out
