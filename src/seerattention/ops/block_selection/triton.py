"""Block selection in Triton: one program per row, which it holds in registers; no sort, no mask in memory.

Top-k and top-p look for their boundary score bit by bit, in the integer view of float32 that is ordered like the
floats: 32 counts (or sums) over the row. What lies above the boundary is taken, then as many equal scores as still fit,
lowest index first. A prefix sum over the row gives each taken block its slot. The results equal the reference bit for
bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..indices import BlockIndices
from .reference import PROBABILITY_UNITS, topp_target

UNITS = tl.constexpr(float(PROBABILITY_UNITS))
# Sorts below every float: for blocks that are not candidates.
LOWEST = tl.constexpr(-(1 << 31))
# Not specialised, so that a prompt of another length does not compile the kernels again.
SIZES = ["heads", "num_rows", "num_keys", "stride_b", "stride_h", "stride_r", "capacity", "last", "block_size"]


@triton.jit
def _ordered(b_x):
    """int32 in the order of the floats; -0 and 0 are equal."""
    b_bits = tl.where(b_x == 0.0, 0.0, b_x).to(tl.int32, bitcast=True)
    return b_bits ^ ((b_bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _boundary(b_key, b_weight, target):
    """The largest key such that the weights of keys at or above it sum to at least target; LOWEST where none is."""
    boundary = tl.where(tl.sum(tl.where(b_key >= 0, b_weight, 0), 0) >= target, 0, LOWEST).to(tl.int32)
    for i_bit in range(31):
        candidate = boundary + (1 << (30 - i_bit))
        reached = tl.sum(tl.where(b_key >= candidate, b_weight, 0), 0) >= target
        boundary = tl.where(reached, candidate, boundary)
    return boundary


@triton.jit
def _row(num_rows, num_keys):
    """Absolute query block, and offset of the row in a contiguous [B, H, Nq]."""
    i_row = tl.program_id(0)
    return num_keys - num_rows + i_row, tl.program_id(1).to(tl.int64) * num_rows + i_row


@triton.jit
def _load(x, i_query, num_rows, num_keys, heads, stride_b, stride_h, stride_r, o_key):
    """The causal scores of the row in float32, -inf elsewhere."""
    i_bh = tl.program_id(1)
    p_x = x + (i_bh // heads).to(tl.int64) * stride_b + (i_bh % heads).to(tl.int64) * stride_h
    p_x += tl.program_id(0).to(tl.int64) * stride_r
    return tl.load(p_x + o_key, mask=o_key <= i_query, other=float("-inf")).to(tl.float32)


@triton.jit
def _pack(
    m_take, i_query, o_row, o_key, lengths, heads, num_keys, indices, counts, capacity, last, block_size,
    HAS_LENGTHS: tl.constexpr,
):  # fmt: skip
    """Add the diagonal and the dense last rows, drop padded rows, and write the list."""
    end = num_keys
    if HAS_LENGTHS:
        end = ((tl.load(lengths + tl.program_id(1) // heads) + block_size - 1) // block_size).to(tl.int32)
    m_take = m_take | (o_key == i_query) | (i_query >= end - last)
    m_take = m_take & (o_key <= i_query) & (i_query < end)
    b_slot = tl.cumsum(m_take.to(tl.int32), 0) - 1
    tl.store(indices + o_row * capacity + b_slot, o_key, mask=m_take)
    tl.store(counts + o_row, tl.sum(m_take.to(tl.int32), 0))


@triton.jit(do_not_specialize=SIZES)
def select_threshold_kernel(
    x, lengths, indices, counts, threshold, heads, num_rows, num_keys, stride_b, stride_h, stride_r, capacity, last,
    block_size, HAS_LENGTHS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i_query, o_row = _row(num_rows, num_keys)
    o_key = tl.arange(0, BLOCK)
    b_x = _load(x, i_query, num_rows, num_keys, heads, stride_b, stride_h, stride_r, o_key)
    _pack(
        b_x > threshold, i_query, o_row, o_key, lengths, heads, num_keys, indices, counts, capacity, last, block_size,
        HAS_LENGTHS,
    )  # fmt: skip


@triton.jit(do_not_specialize=[*SIZES, "stride_keep"])
def select_topk_kernel(
    x, keep, lengths, indices, counts, heads, num_rows, num_keys, stride_b, stride_h, stride_r, stride_keep, capacity,
    last, block_size, DIAGONAL_EXTRA: tl.constexpr, HAS_LENGTHS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i_query, o_row = _row(num_rows, num_keys)
    o_key = tl.arange(0, BLOCK)
    b_x = _load(x, i_query, num_rows, num_keys, heads, stride_b, stride_h, stride_r, o_key)
    wanted = tl.load(keep + (tl.program_id(1) // heads) * stride_keep + tl.program_id(0)).to(tl.int32)
    if DIAGONAL_EXTRA:
        m_candidate = o_key <= i_query
        wanted = tl.minimum(wanted, i_query + 1)
    else:
        m_candidate = o_key < i_query
        wanted = tl.minimum(wanted - 1, i_query)
    b_key = tl.where(m_candidate, _ordered(tl.where(b_x == b_x, b_x, float("-inf"))), LOWEST)
    boundary = _boundary(b_key, tl.full([BLOCK], 1, tl.int32), wanted)
    m_above = b_key > boundary
    m_equal = (b_key == boundary) & m_candidate
    left = wanted - tl.sum(m_above.to(tl.int32), 0)
    m_take = m_above | (m_equal & (tl.cumsum(m_equal.to(tl.int32), 0) <= left))
    _pack(
        m_take, i_query, o_row, o_key, lengths, heads, num_keys, indices, counts, capacity, last, block_size,
        HAS_LENGTHS,
    )  # fmt: skip


@triton.jit(do_not_specialize=[*SIZES, "target"])
def select_topp_kernel(
    x, lengths, indices, counts, target, heads, num_rows, num_keys, stride_b, stride_h, stride_r, capacity, last,
    block_size, HAS_LENGTHS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i_query, o_row = _row(num_rows, num_keys)
    o_key = tl.arange(0, BLOCK)
    b_x = _load(x, i_query, num_rows, num_keys, heads, stride_b, stride_h, stride_r, o_key)
    b_x = tl.where(b_x > 0.0, tl.minimum(b_x, 1.0), 0.0)
    b_units = (b_x * UNITS).to(tl.int64)
    # The diagonal is taken first and its mass counts; the blocks below it make up the rest.
    diagonal = tl.sum(tl.where(o_key == i_query, b_units, 0), 0)
    m_candidate = o_key < i_query
    b_key = tl.where(m_candidate, _ordered(b_x), LOWEST)
    boundary = _boundary(b_key, b_units, target - diagonal)
    m_above = b_key > boundary
    m_equal = (b_key == boundary) & m_candidate
    mass = diagonal + tl.sum(tl.where(m_above, b_units, 0), 0)
    b_before = mass + (tl.cumsum(m_equal.to(tl.int64), 0) - 1) * b_units
    _pack(
        m_above | (m_equal & (b_before < target)), i_query, o_row, o_key, lengths, heads, num_keys, indices, counts,
        capacity, last, block_size, HAS_LENGTHS,
    )  # fmt: skip


def select_threshold(
    probabilities: Tensor, threshold: float, *, block_size: int, lengths: Tensor | None, last_blocks_dense: int
) -> BlockIndices:
    return _launch(
        select_threshold_kernel, probabilities, block_size, lengths, last_blocks_dense, threshold=float(threshold)
    )


def select_topk(
    scores: Tensor,
    keep: Tensor,
    *,
    block_size: int,
    lengths: Tensor | None,
    last_blocks_dense: int,
    diagonal_extra: bool,
    capacity: int,
) -> BlockIndices:
    keep = keep.contiguous()
    return _launch(
        select_topk_kernel,
        scores,
        block_size,
        lengths,
        last_blocks_dense,
        capacity=capacity,
        keep=keep,
        stride_keep=keep.shape[1] if keep.shape[0] > 1 else 0,
        DIAGONAL_EXTRA=diagonal_extra,
    )


def select_topp(
    probabilities: Tensor, p: float, *, block_size: int, lengths: Tensor | None, last_blocks_dense: int
) -> BlockIndices:
    return _launch(select_topp_kernel, probabilities, block_size, lengths, last_blocks_dense, target=topp_target(p))


def _launch(
    kernel, x: Tensor, block_size: int, lengths: Tensor | None, last: int, *, capacity: int | None = None, **arguments
) -> BlockIndices:
    batch, heads, num_rows, num_keys = x.shape
    capacity = num_keys if capacity is None else capacity
    indices = torch.empty(batch, heads, num_rows, capacity, dtype=torch.int32, device=x.device)
    counts = torch.empty(batch, heads, num_rows, dtype=torch.int32, device=x.device)
    block = max(16, triton.next_power_of_2(num_keys))
    if counts.numel():
        with torch.cuda.device_of(x):
            kernel[(num_rows, batch * heads)](
                x,
                lengths=lengths,
                indices=indices,
                counts=counts,
                heads=heads,
                num_rows=num_rows,
                num_keys=num_keys,
                stride_b=x.stride(0),
                stride_h=x.stride(1),
                stride_r=x.stride(2),
                capacity=capacity,
                last=last,
                block_size=block_size,
                HAS_LENGTHS=lengths is not None,
                BLOCK=block,
                # 8 blocks a thread, so that short rows take one warp and need no synchronisation.
                num_warps=min(16, max(1, block // 256)),
                **arguments,
            )
    return BlockIndices(indices, counts, num_keys, block_size)
