"""1-D pooled attention in Triton: Q K^T, reduced to one value for each query token and block of keys.

As in ``triton.py``, the maximum of exp(s - lse) is exp(max(s - lse)), and nothing but the result is stored. A program
holds some query tokens, neighbours in ``rows``, with all query heads of one KV head, so that a strip of keys is read
once for all of them. Where no log-sum-exp is given, the program goes through its keys twice and finds it first.

Among 16 rows of a product, which lie with one warp, the heads of a token are as far apart as they can be: rows eight
apart lie with the same thread, which takes the maximum of two heads by itself, that of more of them in few steps with
other threads, and up to 16 heads take no shared memory.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import power_of_2
from ..triton_span import LOG2E
from .arguments import Wanted
from .triton import (
    accumulate,
    locate,
    order,
    queries,
    query_rows,
    scores,
    sizes,
    small_memory,
    strides,
    strip_shape,
)

# Lengths and head counts are not specialised: a prompt of another length must not compile the kernel again.
_RUNTIME_SCALARS = ["num_rows", "heads", "group", "query_slots", "key_length", "num_keys"]


@triton.jit
def _token_of(o_m, HEADS: tl.constexpr):
    """Which of the program's tokens a row holds. HEADS is a power of two; APART tokens are interleaved."""
    APART: tl.constexpr = 16 // HEADS if HEADS < 16 else 1
    return o_m // (HEADS * APART) * APART + o_m % APART


@triton.jit
def _head_of(o_m, HEADS: tl.constexpr):
    """Which query head of the group a row holds."""
    APART: tl.constexpr = 16 // HEADS if HEADS < 16 else 1
    return o_m // APART % HEADS


@triton.jit
def _fold(b_x, axis: tl.constexpr, SUM: tl.constexpr):
    return tl.sum(b_x, axis) if SUM else tl.max(b_x, axis)


@triton.jit
def _reduce(b_s, b_lse, scale_log2, REDUCE: tl.constexpr, HEADS: tl.constexpr, PARTS: tl.constexpr):
    """A strip of raw scores ``[M, N]`` to one value for each token and each of the PARTS blocks of the strip: the
    logarithm of the largest probability (to base 2), or the mass; for ``row_sum`` to the mass of each head of each
    token. Rows that are not valid have lse +inf and count for nothing."""
    M: tl.constexpr = b_s.shape[0]
    WIDTH: tl.constexpr = b_s.shape[1] // PARTS
    APART: tl.constexpr = 16 // HEADS if HEADS < 16 else 1
    SUM: tl.constexpr = REDUCE != "max"
    if SUM:
        b_s = tl.exp2(b_s * scale_log2 - b_lse[:, None])
    # A thread holds pairs of neighbouring columns, eight apart: it reduces what it has, and only the last steps are
    # between threads.
    b_x = _fold(_fold(tl.reshape(b_s, [M, PARTS, WIDTH // 8, 4, 2]), 4, SUM), 2, SUM)
    if REDUCE == "row_sum":
        b_value = tl.sum(b_x, 2)
    else:
        if not SUM:
            b_x = b_x * scale_log2 - b_lse[:, None, None]
        b_x = _fold(tl.reshape(b_x, [M // (HEADS * APART), HEADS, APART, PARTS, 4]), 1, SUM)
        b_value = tl.reshape(_fold(b_x, 3, SUM), [M // HEADS, PARTS])
    return b_value


@triton.jit
def _value(b_block, weight, REDUCE: tl.constexpr, HEADS: tl.constexpr):
    """What is stored of blocks, ``[TOKENS, PARTS]``, once all their strips are in."""
    if REDUCE == "max":
        b_block = tl.exp2(b_block)
    elif REDUCE == "sum":
        b_block = b_block * weight
    else:
        M: tl.constexpr = b_block.shape[0]
        PARTS: tl.constexpr = b_block.shape[1]
        APART: tl.constexpr = 16 // HEADS if HEADS < 16 else 1
        b_x = tl.max(tl.reshape(b_block, [M // (HEADS * APART), HEADS, APART, PARTS]), 1)
        b_block = tl.reshape(b_x, [M // HEADS, PARTS])
    return b_block


@triton.jit(do_not_specialize=_RUNTIME_SCALARS)
def pooled_attention_decode_fwd_kernel(
    p_q, p_k, p_lse, p_rows, p_table, p_out, scale_log2, weight, num_rows,
    heads, group, query_slots, key_length, head_dim, num_keys,
    s_q_b, s_q_h, s_q_t, s_k_b, s_k_h, s_k_t,
    HAS_LSE: tl.constexpr, TABLE: tl.constexpr, PACKED: tl.constexpr, REDUCE: tl.constexpr, DIVIDE: tl.constexpr,
    HEADS: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    MASK_DIM: tl.constexpr, BLOCK_OUT: tl.constexpr,
):  # fmt: skip
    """Rows of TOKENS query tokens for one KV head: every element of them is written."""
    # A step is whole strips and whole blocks of keys.
    STEP: tl.constexpr = BLOCK if BLOCK > BLOCK_N else BLOCK_N
    PARTS: tl.constexpr = STEP // BLOCK
    M: tl.constexpr = TOKENS * HEADS
    i_tokens, i_bkv = order()
    i_b, i_memory, i_kv, p_own_q, p_own_k, slot, start, end = locate(
        i_bkv, p_q, p_k, p_table, heads, group, query_slots, key_length,
        s_q_b, s_q_t, s_k_b, s_k_h, s_k_t, TABLE, PACKED,
    )  # fmt: skip
    kv_heads = heads // group

    o_m = tl.arange(0, M)
    o_n, o_d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    o_slot = i_tokens * TOKENS + _token_of(o_m, HEADS)
    o_row = tl.load(p_rows + o_slot, mask=o_slot < num_rows, other=-1).to(tl.int32)
    o_q = o_row + start
    m_token = (o_row >= 0) & (o_q < end)
    m_valid = m_token & (_head_of(o_m, HEADS) < group)
    o_head = i_kv * group + _head_of(o_m, HEADS)
    # Keys before `whole` are visible to all of the tokens, keys from `stop` on to none. What holds no token sees
    # everything, so that its scores, of zeros, are finite.
    visible = tl.max(tl.where(m_token, o_q, -1), 0) + 1
    stop = (visible + STEP - 1) // STEP * STEP
    o_q = tl.where(m_token, o_q, stop)
    whole = tl.minimum(tl.min(o_q, 0) + 1, visible) // STEP * STEP

    # [M, D]
    b_q = queries(p_own_q, o_head, o_q, m_valid, o_d, s_q_h, s_q_t, head_dim)
    if HAS_LSE:
        p_own_lse = p_lse + (i_memory * heads + o_head) * query_slots + o_q + slot
        # [M]
        b_lse = tl.load(p_own_lse, mask=m_valid, other=float("inf")) * LOG2E
    else:
        # Every query sees the first key, so b_max is finite from the first strip on.
        b_max = tl.full([M], float("-inf"), tl.float32)
        b_sum = tl.zeros([M], tl.float32)
        for MASKED in tl.static_range(2):
            for o_strip in range(whole if MASKED else 0, stop if MASKED else whole, BLOCK_N):
                b_s = scores(b_q, p_own_k, o_strip + o_n, o_q, o_d, s_k_t, head_dim, end, MASKED, MASK_DIM)
                b_max, b_sum = accumulate(b_s * scale_log2, b_max, b_sum)
        b_lse = tl.where(m_valid, b_max + tl.log2(b_sum), float("inf"))

    o_slot = i_tokens * TOKENS + tl.arange(0, TOKENS)
    m_slot = o_slot < num_rows
    p_own_out = p_out + ((i_b * kv_heads + i_kv) * num_rows + o_slot) * num_keys
    o_part = tl.arange(0, PARTS)
    # A block of several strips is stored with its last one.
    initial = float("-inf") if REDUCE == "max" else 0.0
    b_block = tl.full([M if REDUCE == "row_sum" else TOKENS, PARTS], initial, tl.float32)
    b_total = tl.zeros([TOKENS], tl.float32)
    for MASKED in tl.static_range(2):
        for o_strip in range(whole if MASKED else 0, stop if MASKED else whole, BLOCK_N):
            b_s = scores(b_q, p_own_k, o_strip + o_n, o_q, o_d, s_k_t, head_dim, end, MASKED, MASK_DIM)
            b_strip = _reduce(b_s, b_lse, scale_log2, REDUCE, HEADS, PARTS)
            b_block = tl.maximum(b_block, b_strip) if REDUCE == "max" else b_block + b_strip
            done = (o_strip + BLOCK_N) % BLOCK == 0
            b_value = _value(b_block, weight, REDUCE, HEADS)
            o_key = o_strip // BLOCK + o_part
            tl.store(
                p_own_out[:, None] + o_key[None, :], b_value, mask=m_slot[:, None] & (o_key < num_keys)[None, :] & done
            )
            b_total += tl.where(done, tl.sum(b_value, 1), 0.0)
            b_block = tl.where(done, initial, b_block)

    # The rows are still in the cache: divide them, and fill them up with zeros. Rows of padding are 0 and stay 0.
    b_factor = 1.0 / tl.maximum(b_total, 1e-37)
    tl.debug_barrier()
    for o_first in tl.range(0, num_keys, BLOCK_OUT, num_stages=1):
        o_key = o_first + tl.arange(0, BLOCK_OUT)
        m_out = m_slot[:, None] & (o_key < num_keys)[None, :]
        m_written = (o_key < stop // BLOCK)[None, :]
        p_part = p_own_out[:, None] + o_key[None, :]
        if DIVIDE:
            # [TOKENS, BLOCK_OUT]
            b_part = tl.load(p_part, mask=m_out & m_written, other=0.0)
            tl.store(p_part, b_part * b_factor[:, None], mask=m_out)
        else:
            tl.store(p_part, tl.zeros([TOKENS, BLOCK_OUT], tl.float32), mask=m_out & (m_written == 0))


def pooled_attention_decode(q: Tensor, k: Tensor, rows: Tensor, wanted: Wanted) -> Tensor:
    block_size, scale, reduce, normalize, lse, span, _ = wanted
    batch, kv_heads = span.batch, k.shape[1]
    group, num_rows, num_keys = q.shape[1] // kv_heads, rows.numel(), span.num_key_blocks(block_size)
    out = torch.empty(batch, kv_heads, num_rows, num_keys, dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out
    shape = _launch_shape(q, group, lse is not None)
    lse = None if lse is None else lse.contiguous()
    weight = 1.0 / group if normalize else 1.0
    with torch.cuda.device_of(q):
        pooled_attention_decode_fwd_kernel[(-(-num_rows // shape["TOKENS"]), batch * kv_heads)](
            q, k, lse, rows.contiguous(), span.table, out, scale * LOG2E.value, weight, num_rows, *sizes(q, k, span),
            num_keys, *strides(q, k), HAS_LSE=lse is not None, TABLE=span.table is not None, PACKED=span.packed,
            REDUCE=reduce, DIVIDE=wanted.divides_by_sum, BLOCK=block_size, **shape,
        )  # fmt: skip
    return out


def _launch_shape(q: Tensor, group: int, lse_given: bool) -> dict[str, Any]:
    """Constants and options of a launch: query heads (padded) and tokens a program, keys a strip, and so on."""
    head_dim = q.shape[3]
    block_n, block_d = strip_shape(q.dtype, head_dim, 64)
    num_query_rows, num_stages = query_rows(q), 3
    if not lse_given:  # finding it takes registers of its own
        num_query_rows = min(num_query_rows, 128)
    if small_memory(q):
        num_query_rows, num_stages = 64, 2
    full_precision = q.dtype == torch.float32
    if full_precision:
        num_stages = 1
    padded_group = power_of_2(group)
    tokens = max(1, num_query_rows // padded_group)
    return {
        "HEADS": padded_group,
        "TOKENS": tokens,
        "BLOCK_N": block_n,
        "BLOCK_D": block_d,
        "MASK_DIM": block_d != head_dim,
        "BLOCK_OUT": max(16, 2048 // tokens),
        "num_warps": 8 if full_precision or head_dim > 128 else 4,
        "num_stages": num_stages,
    }
