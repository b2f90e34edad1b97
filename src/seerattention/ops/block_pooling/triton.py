"""Block pooling in Triton: one read of x for all kinds, by threads that need nothing of each other.

A program takes a block of several heads, side by side as models have them in memory, or several short blocks that
follow each other. Each thread reads 16 bytes of every token, a few tokens at a time, and keeps their maximum, minimum
and sum itself: no step of the reduction goes through shared memory, and what bounds the kernel is how fast x is read.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import power_of_2
from ..indices import num_blocks
from ..triton_launch import launch
from .reference import Grid

# Tokens that a thread reads at a time, whatever the block: so many loads are under way. And bytes of each.
TOKENS, VECTOR_BYTES = 16, 16
MAX_WARPS = 4


@triton.jit
def _pool_step(p_x, o_t, m_x, b_max, b_min, b_sum, s_x_t, BLOCKS: tl.constexpr, STEP: tl.constexpr):
    """Take in the tokens ``o_t`` of the columns at ``p_x``, where ``m_x`` holds (None: everywhere): STEP tokens of each
    of BLOCKS blocks."""
    p_step = p_x[None, :] + o_t.to(tl.int64)[:, None] * s_x_t
    # [BLOCKS * STEP, columns]
    if m_x is None:
        b_x = tl.load(p_step).to(tl.float32)
        b_high = b_x
        b_low = b_x
    else:
        b_x = tl.load(p_step, mask=m_x, other=0.0).to(tl.float32)
        b_high = tl.where(m_x, b_x, float("-inf"))
        b_low = tl.where(m_x, b_x, float("inf"))
    if BLOCKS > 1:
        shape: tl.constexpr = (BLOCKS, STEP, b_x.shape[1])
        b_max = tl.maximum(b_max, tl.max(tl.reshape(b_high, shape), 1))
        b_min = tl.minimum(b_min, tl.min(tl.reshape(b_low, shape), 1))
        b_sum += tl.sum(tl.reshape(b_x, shape), 1)
    else:
        b_max = tl.maximum(b_max, tl.max(b_high, 0))
        b_min = tl.minimum(b_min, tl.min(b_low, 0))
        b_sum += tl.sum(b_x, 0)
    return b_max, b_min, b_sum


@triton.jit
def _pool(
    i_program, p_x, p_table, p_out, heads, length, num, offset, s_x_b, s_x_h, s_x_t,
    HAS_TABLE: tl.constexpr, CHUNK: tl.constexpr,
    MAX_SLOT: tl.constexpr, MIN_SLOT: tl.constexpr, AVG_SLOT: tl.constexpr, NUM_KINDS: tl.constexpr,
    BLOCK: tl.constexpr, ALIGN: tl.constexpr, BLOCKS: tl.constexpr, STEP: tl.constexpr,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr,
):  # fmt: skip
    """BLOCKS blocks of HEADS heads. *_SLOT is the place of a kind among the concatenated results, -1 where it is not
    asked for; block 0 begins ``offset`` tokens before the first one of x, with a table at a multiple of ALIGN."""
    parts = (heads + HEADS - 1) // HEADS
    tiles = (num + BLOCKS - 1) // BLOCKS
    i_n = i_program // parts % tiles * BLOCKS
    i_b = (i_program // parts // tiles).to(tl.int64)
    end = length
    if HAS_TABLE:
        p_x += tl.load(p_table + i_b * 4).to(tl.int64) * s_x_t
        if CHUNK:
            offset = tl.load(p_table + i_b * 4 + 1) % ALIGN
        end = tl.load(p_table + i_b * 4 + 2)
    # The token of x with which the first block begins (there is none before token 0), and the number from there on.
    begin = i_n * BLOCK
    if CHUNK:
        begin -= offset
    count = tl.minimum(end - begin, BLOCKS * BLOCK)

    # The columns are the channels of one head after the other.
    o_column = tl.arange(0, HEADS * PADDED_DIM)
    o_h = i_program % parts * HEADS + o_column // PADDED_DIM
    o_d = o_column % PADDED_DIM
    m_column = (o_h < heads) & (o_d < HEAD_DIM)
    p_own_x = p_x + i_b * s_x_b + o_h.to(tl.int64) * s_x_h + o_d
    o_step = tl.arange(0, BLOCKS * STEP)  # several blocks at a time follow each other without a gap
    # One block has vectors and a number where several have a row each: a dimension of 1 costs registers.
    shape: tl.constexpr = (HEADS * PADDED_DIM,) if BLOCKS == 1 else (BLOCKS, HEADS * PADDED_DIM)
    b_max = tl.full(shape, float("-inf"), tl.float32)
    b_min = tl.full(shape, float("inf"), tl.float32)
    b_sum = tl.zeros(shape, tl.float32)
    whole = count == BLOCKS * BLOCK
    if CHUNK:
        whole = whole & (begin >= 0)
    if whole & (i_program % parts * HEADS + HEADS <= heads) & (HEAD_DIM == PADDED_DIM):
        for start in range(0, BLOCK, STEP):
            o_t = begin + start + o_step
            b_max, b_min, b_sum = _pool_step(p_own_x, o_t, None, b_max, b_min, b_sum, s_x_t, BLOCKS, STEP)
    else:
        for start in range(0, tl.minimum(count, BLOCK), STEP):
            o_t = begin + start + o_step
            m_x = (o_t < end)[:, None] & m_column[None, :]
            if CHUNK:
                m_x = m_x & (o_t >= 0)[:, None]
            b_max, b_min, b_sum = _pool_step(p_own_x, o_t, m_x, b_max, b_min, b_sum, s_x_t, BLOCKS, STEP)

    if BLOCKS == 1:
        o_out, m_out = i_n, m_column
        b_count = count
        if CHUNK:
            b_count += tl.minimum(begin, 0)
    else:
        o_n = i_n + tl.arange(0, BLOCKS)
        o_begin = begin + tl.arange(0, BLOCKS) * BLOCK
        b_count = (tl.minimum(end - o_begin, BLOCK) + tl.minimum(o_begin, 0))[:, None]
        o_out, m_out = o_n[:, None], (o_n < num)[:, None] & m_column[None, :]
        o_h, o_d = o_h[None, :], o_d[None, :]
    # [columns] or [BLOCKS, columns]
    p_own_out = p_out + ((i_b * heads + o_h) * num + o_out) * NUM_KINDS * HEAD_DIM + o_d
    if MAX_SLOT >= 0:
        b_max = tl.where(b_count > 0, b_max, 0.0)
        tl.store(p_own_out + MAX_SLOT * HEAD_DIM, b_max.to(p_out.dtype.element_ty), mask=m_out)
    if MIN_SLOT >= 0:
        b_min = tl.where(b_count > 0, b_min, 0.0)
        tl.store(p_own_out + MIN_SLOT * HEAD_DIM, b_min.to(p_out.dtype.element_ty), mask=m_out)
    if AVG_SLOT >= 0:
        b_avg = b_sum / tl.maximum(b_count, 1).to(tl.float32)
        tl.store(p_own_out + AVG_SLOT * HEAD_DIM, b_avg.to(p_out.dtype.element_ty), mask=m_out)


@triton.jit(do_not_specialize=["heads", "length", "num", "offset"])  # another length must not compile it again
def block_pooling_fwd_kernel(
    p_x, p_table, p_out, heads, length, num, offset, s_x_b, s_x_h, s_x_t,
    HAS_TABLE: tl.constexpr, CHUNK: tl.constexpr,
    MAX_SLOT: tl.constexpr, MIN_SLOT: tl.constexpr, AVG_SLOT: tl.constexpr, NUM_KINDS: tl.constexpr,
    BLOCK: tl.constexpr, ALIGN: tl.constexpr, BLOCKS: tl.constexpr, STEP: tl.constexpr,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr,
):  # fmt: skip
    """See ``_pool``."""
    _pool(
        tl.program_id(0), p_x, p_table, p_out, heads, length, num, offset, s_x_b, s_x_h, s_x_t, HAS_TABLE, CHUNK,
        MAX_SLOT, MIN_SLOT, AVG_SLOT, NUM_KINDS, BLOCK, ALIGN, BLOCKS, STEP, HEADS, HEAD_DIM, PADDED_DIM,
    )  # fmt: skip


@triton.jit(do_not_specialize=["programs", "length", "q_heads", "q_num", "k_heads", "k_num"])
def pool_both_kernel(
    p_q, p_k, p_q_out, p_k_out, programs, length, q_heads, q_num, k_heads, k_num,
    s_q_b, s_q_h, s_q_t, s_k_b, s_k_h, s_k_t,
    Q_MAX: tl.constexpr, Q_MIN: tl.constexpr, Q_AVG: tl.constexpr, Q_KINDS: tl.constexpr,
    Q_BLOCK: tl.constexpr, Q_BLOCKS: tl.constexpr, Q_STEP: tl.constexpr,
    K_MAX: tl.constexpr, K_MIN: tl.constexpr, K_AVG: tl.constexpr, K_KINDS: tl.constexpr,
    K_BLOCK: tl.constexpr, K_BLOCKS: tl.constexpr, K_STEP: tl.constexpr,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr,
):  # fmt: skip
    """Whole prompts: the first programs pool the queries, the others the keys."""
    i_program = tl.program_id(0)
    if i_program < programs:
        _pool(
            i_program, p_q, None, p_q_out, q_heads, length, q_num, 0, s_q_b, s_q_h, s_q_t, False, False,
            Q_MAX, Q_MIN, Q_AVG, Q_KINDS, Q_BLOCK, 0, Q_BLOCKS, Q_STEP, HEADS, HEAD_DIM, PADDED_DIM,
        )  # fmt: skip
    else:
        _pool(
            i_program - programs, p_k, None, p_k_out, k_heads, length, k_num, 0, s_k_b, s_k_h, s_k_t, False, False,
            K_MAX, K_MIN, K_AVG, K_KINDS, K_BLOCK, 0, K_BLOCKS, K_STEP, HEADS, HEAD_DIM, PADDED_DIM,
        )  # fmt: skip


def _heads_at_once(x: Tensor, heads: int) -> tuple[int, int]:
    """As many of ``heads`` heads as give every thread one vector, and the number of warps."""
    columns, padded_dim = 32 * MAX_WARPS * VECTOR_BYTES // x.itemsize, power_of_2(x.shape[3])
    heads = max(1, min(columns // padded_dim, power_of_2(heads)))
    return heads, max(1, heads * padded_dim * MAX_WARPS // columns)


def _blocks_at_once(block_size: int) -> tuple[int, int]:
    """As many blocks as give a thread TOKENS of them at a time, and how many tokens of each these are."""
    step = min(TOKENS, block_size & -block_size)  # the largest power of two that divides a block
    return (TOKENS // block_size if step == block_size else 1), step


def kind_slots(kinds: Sequence[str]) -> dict[str, int]:
    """The place of each kind of pooling among the concatenated results, -1 of those that are not asked for."""
    return {kind.upper(): kinds.index(kind) if kind in kinds else -1 for kind in ("max", "min", "avg")}


def block_pooling(x: Tensor, kinds: Sequence[str], block_size: int, grid: Grid) -> Tensor:
    batch, heads, length, head_dim = x.shape
    if grid.table is not None:
        batch = grid.table.shape[0]
    out = torch.empty(batch, heads, grid.num, len(kinds) * head_dim, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    padded_dim = power_of_2(head_dim)
    heads_at_once, num_warps = _heads_at_once(x, heads)
    blocks, step = _blocks_at_once(block_size)
    launch(
        block_pooling_fwd_kernel,
        (batch * num_blocks(grid.num, blocks) * num_blocks(heads, heads_at_once),),
        x,
        grid.table,
        out,
        heads,
        length,
        grid.num,
        grid.offset,
        x.stride(0) if x.shape[0] > 1 else 0,  # packed rows share the one of x
        *x.stride()[1:3],
        HAS_TABLE=grid.table is not None,
        CHUNK=grid.offset > 0 or (grid.table is not None and grid.align > 0),
        **{f"{kind}_SLOT": slot for kind, slot in kind_slots(kinds).items()},
        NUM_KINDS=len(kinds),
        BLOCK=block_size,
        ALIGN=grid.align,
        BLOCKS=blocks,
        STEP=step,
        HEADS=heads_at_once,
        HEAD_DIM=head_dim,
        PADDED_DIM=padded_dim,
        num_warps=num_warps,
    )
    return out


def pool_both(
    q: Tensor, k: Tensor, kinds: tuple[Sequence[str], Sequence[str]], sizes: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """:func:`block_pooling` of the queries and the keys of whole prompts in one launch.

    Programs of both take as many heads as suit the keys, of which there are fewer, but no fewer than give one warp
    something to do.
    """
    one_warp = 32 * VECTOR_BYTES // k.itemsize // power_of_2(k.shape[3])
    heads_at_once, num_warps = _heads_at_once(k, min(max(k.shape[1], one_warp), q.shape[1]))
    head_dim, outs, programs, constants = k.shape[3], [], [], {}
    for name, x, mine, size in zip("QK", (q, k), kinds, sizes, strict=True):
        num, (blocks, step) = num_blocks(x.shape[2], size), _blocks_at_once(size)
        outs.append(torch.empty(*x.shape[:2], num, len(mine) * head_dim, dtype=x.dtype, device=x.device))
        programs.append(x.shape[0] * num_blocks(num, blocks) * num_blocks(x.shape[1], heads_at_once))
        constants |= {f"{name}_{kind}": slot for kind, slot in kind_slots(mine).items()}
        constants |= {f"{name}_KINDS": len(mine), f"{name}_BLOCK": size}
        constants |= {f"{name}_BLOCKS": blocks, f"{name}_STEP": step}
    launch(
        pool_both_kernel,
        (sum(programs),),
        q,
        k,
        *outs,
        programs[0],
        q.shape[2],
        q.shape[1],
        outs[0].shape[2],
        k.shape[1],
        outs[1].shape[2],
        *q.stride()[:3],
        *k.stride()[:3],
        **constants,
        HEADS=heads_at_once,
        HEAD_DIM=head_dim,
        PADDED_DIM=power_of_2(head_dim),
        num_warps=num_warps,
    )
    return outs[0], outs[1]
