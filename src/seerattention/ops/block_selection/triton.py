"""Block selection in Triton: one program per row, which it holds in registers; no sort, no mask in memory.

* A row is read as far as it is causal, rounded up to one of a few widths (``LEVELS``), and up to 2048 blocks of it lie
  with one warp, whose sums need no shared memory and no barrier. Four neighbouring blocks lie with one thread, as four
  tensors (``0`` to ``3``): prefix sums then go over a quarter of the row.
* Top-k and top-p look for their boundary score in the integer view of float32 that is ordered like the floats: between
  the least and the greatest score of the row, by interpolation on the counts (or masses) found so far, until just as
  many blocks as are wanted lie at or above it. A handful of sums over the row does for most; scores that are equal at
  the boundary bring the search down to neighbouring integers, and then the lowest indices are taken. What the search
  steps through changes its length only: results equal the reference bit for bit.
* Masses are added in float32; where such a sum is too near to the target to tell, it is taken again in the integers
  that the reference adds.
* The causal softmax, where it is asked for, is taken of the registers: probabilities are never written.
* What is not to be taken by its score (the diagonal, which always is, and what is not causal) is NaN.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import power_of_2
from ..triton_span import span_row
from .reference import Rule, topp_target
from .triton_search import add, replace_nan, topk_boundary, topp_boundary, units, units_above, value_of

# Not specialised, so that a prompt of another length does not compile the kernels again. Strides are, as vector loads
# depend on their alignment: two variants at most.
SIZES = ["bound", "heads", "num_rows", "num_keys", "s_keep_b", "capacity", "last", "block_size", "min_blocks"]
SIZES += ["first_blocks", "dense_rows", "s_bounds_h", "s_bounds_r"]
# Registers of a thread, by rule: as many as the search wants.
KIND_REGISTERS = {"threshold": 128, "topk": 168, "topp": 216}
# Of a threshold with a floor, for float32 and for others, which want more. They must not be short: with 168 for
# bfloat16 ptxas 12.8 kept two values in one register, and lists of 4,096 scores came out wrong (docs/experiments.md).
FLOOR_REGISTERS, OTHER_FLOOR_REGISTERS = 184, 255
# Blocks that one warp holds, and the least width of a row.
BLOCKS_PER_WARP, MIN_WIDTH = 2048, 128
# Registers of a multiprocessor, which all threads of a program share: from 16 warps on (rows of 32,768 blocks) they
# have fewer than they want, and spill.
REGISTERS = 1 << 16
# Scores that a thread loads at once.
VECTOR = 4


@triton.jit
def _ranks(m_0, m_1, m_2, m_3):
    """For each block: how many blocks the mask has up to and including it, in order of position."""
    b_0, b_1, b_2, b_3 = m_0.to(tl.int32), m_1.to(tl.int32), m_2.to(tl.int32), m_3.to(tl.int32)
    b_3 = ((b_0 + b_1) + b_2) + b_3
    b_before = tl.cumsum(b_3, 0) - b_3
    return b_before + b_0, b_before + b_0 + b_1, b_before + b_0 + b_1 + b_2, b_before + b_3


@triton.jit
def _nth(m_0, m_1, m_2, m_3, n, o_key):
    """Index of the n-th block of a mask."""
    b_0, b_1, b_2, b_3 = _ranks(m_0, m_1, m_2, m_3)
    last = 1 << 30
    b_low = tl.minimum(
        tl.minimum(tl.where(b_0 >= n, o_key, last), tl.where(b_1 >= n, o_key + 1, last)),
        tl.minimum(tl.where(b_2 >= n, o_key + 2, last), tl.where(b_3 >= n, o_key + 3, last)),
    )
    return tl.min(b_low, 0)


@triton.jit
def _pack(m_0, m_1, m_2, m_3, i_query, o_key, p_list, p_count, first, FIRST: tl.constexpr):
    """Write the list of a row: the blocks of the mask, which come before the diagonal, the first ones, and the
    diagonal."""
    if FIRST:
        first = tl.minimum(first, i_query)
        m_0, m_1 = m_0 | (o_key < first), m_1 | (o_key + 1 < first)
        m_2, m_3 = m_2 | (o_key + 2 < first), m_3 | (o_key + 3 < first)
    b_0, b_1, b_2, b_3 = _ranks(m_0, m_1, m_2, m_3)
    tl.store(p_list + (b_0 - 1), o_key, mask=m_0)
    tl.store(p_list + (b_1 - 1), o_key + 1, mask=m_1)
    tl.store(p_list + (b_2 - 1), o_key + 2, mask=m_2)
    tl.store(p_list + (b_3 - 1), o_key + 3, mask=m_3)
    count = tl.max(b_3, 0)
    tl.store(p_list + count, i_query)
    tl.store(p_count, count + 1)


@triton.jit
def _pack_best(b_x0, b_x1, b_x2, b_x3, floor, tied, left, i_query, o_key, p_list, p_count, first, FIRST: tl.constexpr):
    """The blocks that score at least ``floor``; where it is ``tied``, all above and the first ``left`` equal to it.

    Two packs, and not one of masks from two branches: that took a third more time at 2,048 blocks.
    """
    if tied:
        cut = _nth(b_x0 == floor, b_x1 == floor, b_x2 == floor, b_x3 == floor, left, o_key)
        _pack(
            (b_x0 > floor) | ((b_x0 == floor) & (o_key <= cut)),
            (b_x1 > floor) | ((b_x1 == floor) & (o_key + 1 <= cut)),
            (b_x2 > floor) | ((b_x2 == floor) & (o_key + 2 <= cut)),
            (b_x3 > floor) | ((b_x3 == floor) & (o_key + 3 <= cut)),
            i_query, o_key, p_list, p_count, first, FIRST,
        )  # fmt: skip
    else:
        m_0, m_1, m_2, m_3 = b_x0 >= floor, b_x1 >= floor, b_x2 >= floor, b_x3 >= floor
        _pack(m_0, m_1, m_2, m_3, i_query, o_key, p_list, p_count, first, FIRST)


@triton.jit
def _load(p_row, i_query, SOFTMAX: tl.constexpr, VECTOR: tl.constexpr, WIDTH: tl.constexpr):
    """Scores of the row, or their softmax, in float32, and the index of the first of each four; what is not causal is
    -inf, or of probability 0."""
    o_x = tl.arange(0, WIDTH)
    # The mask is that of whole vectors: one of single elements would make the loads scalar.
    b_x = tl.load(p_row + o_x, mask=o_x // VECTOR * VECTOR <= i_query, other=float("-inf")).to(tl.float32)
    b_x = tl.where(o_x <= i_query, b_x, float("-inf"))
    if SOFTMAX:
        b_x = tl.exp(b_x - tl.max(b_x, 0))
        b_x = b_x * (1.0 / tl.sum(b_x, 0))
    b_even, b_odd = tl.split(tl.reshape(b_x, [WIDTH // 4, 2, 2]))
    b_x0, b_x2 = tl.split(b_even)
    b_x1, b_x3 = tl.split(b_odd)
    return b_x0, b_x1, b_x2, b_x3, 4 * tl.arange(0, WIDTH // 4)


@triton.jit
def _before(b_x0, b_x1, b_x2, b_x3, o_key, end):
    """The scores before ``end``, NaN from there on."""
    b_x0, b_x1 = tl.where(o_key < end, b_x0, float("nan")), tl.where(o_key + 1 < end, b_x1, float("nan"))
    b_x2, b_x3 = tl.where(o_key + 2 < end, b_x2, float("nan")), tl.where(o_key + 3 < end, b_x3, float("nan"))
    return b_x0, b_x1, b_x2, b_x3


@triton.jit
def _threshold_row(
    b_x0, b_x1, b_x2, b_x3, i_query, o_key, threshold, min_blocks, p_list, p_count, first,
    FLOOR: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    b_x0, b_x1, b_x2, b_x3 = _before(b_x0, b_x1, b_x2, b_x3, o_key, i_query)
    m_0, m_1, m_2, m_3 = b_x0 > threshold, b_x1 > threshold, b_x2 > threshold, b_x3 > threshold
    enough = True
    if FLOOR:
        wanted = tl.minimum(min_blocks - 1, i_query)  # besides the diagonal
        enough = add(m_0.to(tl.int32), m_1.to(tl.int32), m_2.to(tl.int32), m_3.to(tl.int32)) >= wanted
    if enough:
        _pack(m_0, m_1, m_2, m_3, i_query, o_key, p_list, p_count, first, FIRST)
    else:
        _topk_row(b_x0, b_x1, b_x2, b_x3, i_query, o_key, min_blocks, p_list, p_count, first, False, FIRST)


@triton.jit
def _topk_row(
    b_x0, b_x1, b_x2, b_x3, i_query, o_key, keep, p_list, p_count, first,
    DIAGONAL_EXTRA: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    low = float("-inf")
    b_x0, b_x1, b_x2, b_x3 = (
        replace_nan(b_x0, low),
        replace_nan(b_x1, low),
        replace_nan(b_x2, low),
        replace_nan(b_x3, low),
    )
    # Without DIAGONAL_EXTRA the diagonal is one of the blocks to keep, and the others compete below it.
    total = i_query + 1 if DIAGONAL_EXTRA else i_query
    wanted = tl.minimum(keep if DIAGONAL_EXTRA else keep - 1, total)
    b_x0, b_x1, b_x2, b_x3 = _before(b_x0, b_x1, b_x2, b_x3, o_key, total)
    lo, _, n_lo, n_hi = topk_boundary(b_x0, b_x1, b_x2, b_x3, wanted, total)
    if DIAGONAL_EXTRA:  # not among those that are ranked by index
        b_x0, b_x1, b_x2, b_x3 = _before(b_x0, b_x1, b_x2, b_x3, o_key, i_query)
    _pack_best(
        b_x0, b_x1, b_x2, b_x3, value_of(lo), n_lo != wanted, wanted - n_hi, i_query, o_key, p_list, p_count, first,
        FIRST,
    )  # fmt: skip


@triton.jit
def _topp_row(b_x0, b_x1, b_x2, b_x3, i_query, o_key, target, p_list, p_count, first, FIRST: tl.constexpr):
    b_p0, b_p1, b_p2, b_p3 = _probability(b_x0), _probability(b_x1), _probability(b_x2), _probability(b_x3)
    # The diagonal is taken first and its mass counts; the blocks below it make up the rest.
    diagonal = add(
        tl.where(o_key == i_query, b_p0, 0.0),
        tl.where(o_key + 1 == i_query, b_p1, 0.0),
        tl.where(o_key + 2 == i_query, b_p2, 0.0),
        tl.where(o_key + 3 == i_query, b_p3, 0.0),
    )
    needed = target - units(diagonal)
    b_p0, b_p1, b_p2, b_p3 = _before(b_p0, b_p1, b_p2, b_p3, o_key, i_query)
    lo, hi, n_lo, n_hi = topp_boundary(b_p0, b_p1, b_p2, b_p3, needed, i_query)
    floor = value_of(lo)
    tied, left = n_lo - n_hi > 1, lo * 0
    if tied:
        unit = tl.maximum(units(floor), 1)
        above = units_above(b_p0, b_p1, b_p2, b_p3, value_of(hi))
        left = ((needed - above + unit - 1) // unit).to(tl.int32)
    _pack_best(b_p0, b_p1, b_p2, b_p3, floor, tied, left, i_query, o_key, p_list, p_count, first, FIRST)


@triton.jit
def _probability(b_x):
    return tl.where(b_x > 0.0, tl.minimum(b_x, 1.0), 0.0)


@triton.jit
def _place(
    p_x, p_table, p_indices, p_counts, heads, num_rows, num_keys, s_x_b, s_x_h, s_x_r, capacity, last, block_size,
    dense_rows, TABLE: tl.constexpr,
):  # fmt: skip
    """The program's query block, its scores, list and count, and how it is chosen: the scores decide (2), all causal
    blocks (1), none (0)."""
    i_row, i_bh = num_rows - 1 - tl.program_id(0), tl.program_id(1)  # long rows first
    i_b = i_bh // heads
    o_row = i_bh.to(tl.int64) * num_rows + i_row
    p_row = p_x + i_b.to(tl.int64) * s_x_b + (i_bh % heads).to(tl.int64) * s_x_h + i_row.to(tl.int64) * s_x_r
    _, start, length, _ = span_row(p_table, i_b, num_rows, num_keys, TABLE)
    if TABLE:
        i_query = start // block_size + i_row
        end = tl.minimum((start + length + block_size - 1) // block_size, num_keys)
        end = tl.where(length > 0, end, 0)
    else:  # the last blocks, and all of them
        i_query = num_keys - num_rows + i_row
        end = num_keys
    kind = tl.where(i_query >= end, 0, tl.where((i_query >= end - last) | (i_query < dense_rows), 1, 2))
    return i_query, p_row, p_indices + o_row * capacity, p_counts + o_row, kind


@triton.jit
def _without_scores(p_list, p_count, i_query, kind, WIDTH: tl.constexpr):
    """A row of padding, or one that reads everything."""
    length = tl.where(kind == 0, 0, i_query + 1)
    for start in range(0, length, WIDTH):
        o_key = start + tl.arange(0, WIDTH)
        tl.store(p_list + o_key, o_key, mask=o_key < length)
    tl.store(p_count, length)


@triton.jit
def _fits(i_query, BLOCK: tl.constexpr, LEVEL: tl.constexpr, LEVELS: tl.constexpr):
    """Whether this width is the least one that holds the causal part of the row."""
    fits = i_query < (BLOCK >> LEVEL)
    if LEVEL + 1 < LEVELS:
        fits = fits & (i_query >= (BLOCK >> (LEVEL + 1)))
    return fits


@triton.jit(do_not_specialize=SIZES)
def select_kernel(
    p_x, p_keep, p_table, p_bounds, p_indices, p_counts, bound, heads, num_rows, num_keys, s_x_b, s_x_h, s_x_r,
    s_keep_b, capacity, last, block_size, min_blocks, first_blocks, dense_rows, s_bounds_h, s_bounds_r,
    RULE: tl.constexpr, SOFTMAX: tl.constexpr, RELATIVE: tl.constexpr, BOUNDS: tl.constexpr, FLOOR: tl.constexpr,
    FIRST: tl.constexpr, DIAGONAL_EXTRA: tl.constexpr, TABLE: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr,
    LEVELS: tl.constexpr,
):  # fmt: skip
    """One row. ``bound`` is the threshold, or the mass to reach; BOUNDS: it is read by head and own block instead;
    FLOOR and FIRST: whether ``min_blocks`` and ``first_blocks`` are more than 0."""
    i_query, p_row, p_list, p_count, kind = _place(
        p_x, p_table, p_indices, p_counts, heads, num_rows, num_keys, s_x_b, s_x_h, s_x_r, capacity, last, block_size,
        dense_rows, TABLE,
    )  # fmt: skip
    if kind < 2:
        _without_scores(p_list, p_count, i_query, kind, BLOCK >> (LEVELS - 1))
    else:
        if BOUNDS:
            i_head = (tl.program_id(1) % heads).to(tl.int64)
            bound = tl.load(p_bounds + i_head * s_bounds_h + i_query.to(tl.int64) * s_bounds_r)
        for i_level in tl.static_range(LEVELS):
            if _fits(i_query, BLOCK, i_level, LEVELS):
                b_x0, b_x1, b_x2, b_x3, o_key = _load(p_row, i_query, SOFTMAX, VECTOR, BLOCK >> i_level)
                if RELATIVE:  # to uniform attention
                    factor = (i_query + 1).to(tl.float32)
                    b_x0, b_x1, b_x2, b_x3 = b_x0 * factor, b_x1 * factor, b_x2 * factor, b_x3 * factor
                if RULE == "threshold":
                    _threshold_row(
                        b_x0, b_x1, b_x2, b_x3, i_query, o_key, bound, min_blocks, p_list, p_count, first_blocks,
                        FLOOR, FIRST,
                    )  # fmt: skip
                elif RULE == "topk":
                    i_row = num_rows - 1 - tl.program_id(0)
                    keep = tl.load(p_keep + (tl.program_id(1) // heads) * s_keep_b + i_row).to(tl.int32)
                    _topk_row(
                        b_x0, b_x1, b_x2, b_x3, i_query, o_key, keep, p_list, p_count, first_blocks,
                        DIAGONAL_EXTRA, FIRST,
                    )  # fmt: skip
                else:
                    _topp_row(b_x0, b_x1, b_x2, b_x3, i_query, o_key, bound, p_list, p_count, first_blocks, FIRST)


def _limit(registers: int) -> dict[str, int]:
    """Launch options that hold a thread to so many registers. Left alone, the compiler takes all that a warp may have,
    and few rows are in work at a time to hide each other's latencies. AMD's compiler takes no such option."""
    return {} if torch.version.hip else {"maxnreg": registers}


def _whole_vectors(x: Tensor) -> bool:
    """Whether rows begin at whole vectors, and a vector that a row ends within is all inside the memory."""
    end = -(-x.shape[-1] // VECTOR) * VECTOR
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        if stride % VECTOR:
            return False
        end += (size - 1) * stride
    return x.storage_offset() % VECTOR == 0 and x.storage_offset() + end <= x.untyped_storage().nbytes() // x.itemsize


def _step(x: Tensor | None, dim: int) -> int:
    """How far apart entries lie along a dimension, of which there may be one for all."""
    return 0 if x is None or x.shape[dim] == 1 else x.stride(dim)


def select(x: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
    batch, heads, num_rows, num_keys = x.shape
    indices = torch.empty(batch, heads, num_rows, rule.capacity, dtype=torch.int32, device=x.device)
    counts = torch.empty(batch, heads, num_rows, dtype=torch.int32, device=x.device)
    if not counts.numel():
        return indices, counts
    block = max(MIN_WIDTH, power_of_2(num_keys))
    num_warps = max(1, block // BLOCKS_PER_WARP)
    bound = topp_target(rule.bound) if rule.kind == "topp" else rule.bound
    keep, bounds, registers = rule.keep, rule.bounds, KIND_REGISTERS[rule.kind]
    if rule.min_blocks:
        registers = FLOOR_REGISTERS if x.dtype == torch.float32 else OTHER_FLOOR_REGISTERS
    with torch.cuda.device_of(x):
        select_kernel[(num_rows, batch * heads)](
            x,
            keep,
            rule.table,
            bounds,
            indices,
            counts,
            bound,
            heads,
            num_rows,
            num_keys,
            *x.stride()[:3],
            keep.stride(0) if keep is not None and keep.shape[0] > 1 else 0,
            rule.capacity,
            rule.last_blocks_dense,
            rule.block_size,
            rule.min_blocks,
            rule.first_blocks,
            rule.dense_rows,
            _step(bounds, 0),
            _step(bounds, 1),
            RULE=rule.kind,
            SOFTMAX=rule.softmax,
            RELATIVE=rule.relative,
            BOUNDS=bounds is not None,
            FLOOR=rule.min_blocks > 0,
            FIRST=rule.first_blocks > 0,
            DIAGONAL_EXTRA=rule.diagonal_extra,
            TABLE=rule.table is not None,
            VECTOR=VECTOR if _whole_vectors(x) else 1,
            BLOCK=block,
            LEVELS=min(4, (block // MIN_WIDTH).bit_length()),
            num_warps=num_warps,
            **_limit(min(registers, REGISTERS // (32 * num_warps))),
        )
    return indices, counts
