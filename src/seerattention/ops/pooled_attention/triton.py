"""Pooled attention in Triton: one program per (query block, head) goes over its keys twice.

The first pass finds the log-sum-exp of each query. The second computes the same scores again and reduces them tile by
tile: the maximum of exp(s - lse) over a tile is exp(max(s - lse)), so ``max`` takes one exponential per tile. Nothing
between the passes leaves the chip, and V is never read.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..indices import num_blocks
from .reference import finish

# A strip of keys takes at most this much shared memory per pipeline stage. float32 products are unrolled multiply-adds,
# not tensor core instructions: with larger strips they take minutes to compile.
MAX_STRIP_BYTES = {torch.float16: 32768, torch.bfloat16: 32768, torch.float32: 8192}


@triton.jit
def _scores(b_q, p_k, start, key_length, head_dim, stride_kt, o_n, o_d, scale_log2):
    """Logits in units of log 2 of one query block against the keys at start + o_n."""
    o_keys = start + o_n
    m_k = (o_keys < key_length)[:, None] & (o_d < head_dim)[None, :]
    b_k = tl.load(p_k + o_keys.to(tl.int64)[:, None] * stride_kt + o_d[None, :], mask=m_k, other=0.0)
    return tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale_log2


@triton.jit
def _accumulate(b_s, b_max, b_sum):
    """One step of the running log-sum-exp of each query."""
    b_new = tl.maximum(b_max, tl.max(b_s, 1))
    b_sum = b_sum * tl.exp2(b_max - b_new) + tl.sum(tl.exp2(b_s - b_new[:, None]), 1)
    return b_new, b_sum


@triton.jit
def _reduce_step(b_s, b_lse, b_tile, SUM: tl.constexpr):
    """Fold a strip of scores into the value of its tile, still one per query."""
    if SUM:
        return b_tile + tl.sum(tl.exp2(b_s - b_lse[:, None]), 1)
    return tl.maximum(b_tile, tl.max(b_s, 1))


@triton.jit
def _reduce_tile(b_tile, b_lse, m_valid, SUM: tl.constexpr):
    """From one value per query to one value for the tile."""
    if SUM:
        return tl.sum(tl.where(m_valid, b_tile, 0.0), 0)
    return tl.exp2(tl.max(tl.where(m_valid, b_tile - b_lse, float("-inf")), 0))


# Lengths are not specialised: a prompt of another length must not compile the kernel again.
@triton.jit(do_not_specialize=["heads", "group", "query_length", "key_length", "num_keys"])
def pooled_attention_fwd_kernel(
    q,
    k,
    rows,
    lengths,
    out,
    scale_log2,
    heads,
    group,
    query_length,
    key_length,
    head_dim,
    num_keys,
    stride_qb,
    stride_qh,
    stride_qt,
    stride_kb,
    stride_kh,
    stride_kt,
    HAS_LENGTHS: tl.constexpr,
    SUM: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # The longest rows come last in the usual ascending order; they start first.
    i_slot = tl.num_programs(0) - 1 - tl.program_id(0)
    i_bh = tl.program_id(1)
    i_b, i_h = (i_bh // heads).to(tl.int64), (i_bh % heads).to(tl.int64)
    i_row = tl.load(rows + i_slot).to(tl.int32)
    diagonal = i_row * BLOCK

    o_m = diagonal + tl.arange(0, BLOCK)
    o_n = tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)
    offset = key_length - query_length
    end = key_length
    if HAS_LENGTHS:
        end = tl.minimum(tl.load(lengths + i_b), key_length).to(tl.int32)
    m_valid = (o_m >= offset) & (o_m < end)
    if diagonal < end:
        p_q = q + i_b * stride_qb + i_h * stride_qh
        p_k = k + i_b * stride_kb + (i_h // group) * stride_kh
        m_q = m_valid[:, None] & (o_d < head_dim)[None, :]
        b_q = tl.load(p_q + (o_m - offset).to(tl.int64)[:, None] * stride_qt + o_d[None, :], mask=m_q, other=0.0)

        b_max = tl.full([BLOCK], float("-inf"), tl.float32)
        b_sum = tl.zeros([BLOCK], tl.float32)
        for start in range(0, diagonal, BLOCK_N):
            b_s = _scores(b_q, p_k, start, key_length, head_dim, stride_kt, o_n, o_d, scale_log2)
            b_max, b_sum = _accumulate(b_s, b_max, b_sum)
        # Every query sees the first key of its own block, so b_max is finite from the first strip on.
        for start in range(diagonal, diagonal + BLOCK, BLOCK_N):
            b_s = _scores(b_q, p_k, start, key_length, head_dim, stride_kt, o_n, o_d, scale_log2)
            b_s = tl.where((start + o_n)[None, :] <= o_m[:, None], b_s, float("-inf"))
            b_max, b_sum = _accumulate(b_s, b_max, b_sum)
        b_lse = b_max + tl.log2(b_sum)

        p_out = out + (i_bh.to(tl.int64) * tl.num_programs(0) + i_slot) * num_keys
        initial = 0.0 if SUM else float("-inf")
        for i_key in range(0, i_row):
            b_tile = tl.full([BLOCK], initial, tl.float32)
            if BLOCK_N == BLOCK:  # no inner loop, so that the outer one is pipelined
                b_s = _scores(b_q, p_k, i_key * BLOCK, key_length, head_dim, stride_kt, o_n, o_d, scale_log2)
                b_tile = _reduce_step(b_s, b_lse, b_tile, SUM)
            else:
                for start in range(i_key * BLOCK, i_key * BLOCK + BLOCK, BLOCK_N):
                    b_s = _scores(b_q, p_k, start, key_length, head_dim, stride_kt, o_n, o_d, scale_log2)
                    b_tile = _reduce_step(b_s, b_lse, b_tile, SUM)
            tl.store(p_out + i_key, _reduce_tile(b_tile, b_lse, m_valid, SUM))
        b_tile = tl.full([BLOCK], initial, tl.float32)
        for start in range(diagonal, diagonal + BLOCK, BLOCK_N):
            b_s = _scores(b_q, p_k, start, key_length, head_dim, stride_kt, o_n, o_d, scale_log2)
            b_s = tl.where((start + o_n)[None, :] <= o_m[:, None], b_s, float("-inf"))
            b_tile = _reduce_step(b_s, b_lse, b_tile, SUM)
        tl.store(p_out + i_row, _reduce_tile(b_tile, b_lse, m_valid, SUM))


def pooled_attention(
    q: Tensor,
    k: Tensor,
    rows: Tensor,
    *,
    block_size: int,
    scale: float,
    lengths: Tensor | None,
    reduce: str,
    normalize: bool,
) -> Tensor:
    batch, heads, query_length, head_dim = q.shape
    kv_heads, key_length = k.shape[1:3]
    num_keys = num_blocks(key_length, block_size)
    out = torch.zeros(batch, heads, rows.numel(), num_keys, device=q.device)
    if out.numel() == 0:
        return out
    block_d = max(16, triton.next_power_of_2(head_dim))
    block_n = block_size
    while block_n > 16 and block_n * block_d * q.element_size() > MAX_STRIP_BYTES[q.dtype]:
        block_n //= 2
    rows = rows.contiguous()
    with torch.cuda.device_of(q):
        pooled_attention_fwd_kernel[(rows.numel(), batch * heads)](
            q,
            k,
            rows,
            lengths,
            out,
            scale * math.log2(math.e),
            heads,
            heads // kv_heads,
            query_length,
            key_length,
            head_dim,
            num_keys,
            *q.stride()[:3],
            *k.stride()[:3],
            HAS_LENGTHS=lengths is not None,
            SUM=reduce == "sum",
            BLOCK=block_size,
            BLOCK_N=block_n,
            BLOCK_D=block_d,
            num_warps=8 if block_size == 128 else 4,
            num_stages=1 if q.dtype == torch.float32 else 3,
        )
    return finish(out, rows, block_size, key_length, query_length, lengths, reduce, normalize)
