"""Gate scores of sub-blocks for Hopper GPUs (compute capability 9.0) in Gluon: maxima of tiles of 8 by 8 products.

A program is one warpgroup with a square of 64 by 64 tiles of one query head. Sub-blocks are taken by their *places*,
the first ones of the 64 tiles together, then the second ones (``[64, W]``, brought in by the tensor copy engine, TMA).
Places of keys stay in shared memory, those of queries come one after the other, go into registers, which halves what
products read from shared memory, and are multiplied with all keys that are there. Places are multiplied apart, so the
largest product of a tile is a maximum between values that one thread holds. Products are asynchronous: the maxima of
one are taken while the tensor cores make the next.

Two things that ptxas does shape the code. It moves arithmetic on products behind later products until registers run
out, but not out of a loop: hence one of a single round (``_larger``). And it makes products wait for each other if one
is under way where a loop begins anew: hence rounds of loops end with none (``_multiply``).

Rows that lack sub-blocks (``Tiles.whole_rows``) are left to Triton: the last one of a prompt to ``triton_row.py``, as a
square that is nearly empty would take as long as a full one. What TMA demands of addresses and strides is checked by
``hopper_usable`` in ``interface.py``.
"""

from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..hopper import view_descriptor
from ..indices import num_blocks
from ..triton_launch import launch
from .reference import Tiles
from .triton import gate_scores as triton_scores
from .triton_row import row_scores

TILE = gl.constexpr(64)  # tiles on both sides of a square
PLACES = gl.constexpr(8)  # sub-blocks on both sides of a tile
NUM_WARPS = 4
# Places of keys in shared memory: half of them, so that two programs share a multiprocessor and fill each other's gaps.
# Queries pass by once for each half.
HELD = gl.constexpr(4)
# Places of queries under way; the one that is multiplied is in registers.
STAGES = gl.constexpr(2)
# Places of queries whose products follow each other without a gap; one on the diagonal, which few squares touch, for
# less code.
BURST = gl.constexpr(2)
EDGE_BURST = gl.constexpr(1)

# Lengths and head counts vary from call to call: one binary serves them all. ``once`` is 1, which ptxas must not know.
_RUNTIME_SCALARS = ["num_kv_heads", "group", "squares", "across", "shift", "num_rows", "first_row", "once"]


@gluon.jit
def _before(i_m, shift):
    """Squares in the rows of squares before row i_m, where row i has i + 1 + shift of them."""
    return i_m * (i_m + 1 + 2 * shift) // 2


@gluon.jit
def _square(i_square, across, shift, MASKED: gl.constexpr):
    """Row and column of a square: of all, or of those that are not above the diagonal."""
    if MASKED:
        i_m = i_square // across
        return i_m, i_square % across
    else:
        odd = shift * 2.0 + 1.0
        i_m = ((gl.sqrt(odd * odd + i_square * 8.0) - odd) * 0.5).to(gl.int32)
        i_m += (_before(i_m + 1, shift) <= i_square).to(gl.int32)  # the root may be off by rounding
        i_m -= (_before(i_m, shift) > i_square).to(gl.int32)
        return i_m, i_square - _before(i_m, shift)


@gluon.jit
def _copy(d_x, i_b, i_h, i_tiles, i_place, bar, smem, m_any):
    """Start the copy of one place of 64 tiles, if ``m_any``; ``bar`` completes when it has arrived."""
    mbarrier.expect(bar, d_x.block_type.nbytes, pred=m_any)
    tma.async_copy_global_to_shared(d_x, [i_b, i_h, i_tiles * TILE, i_place, 0], bar, smem, pred=m_any)


@gluon.jit
def _larger(b_best, b_diagonal, b_x, i_q, i_k, once, EDGE: gl.constexpr):
    """Maxima of tiles so far and of the product of query place i_q and key place i_k.

    b_diagonal: as the diagonal tile sees it, where key sub-blocks count that do not begin after the query sub-block. It
    is kept beside the other because a mask of the diagonal would be 32 comparisons a product, or as many registers.
    """
    for _ in range(once):
        b_best = gl.maximum(b_best, b_x)
        if EDGE:
            b_diagonal = gl.maximum(b_diagonal, b_x + gl.where(i_k > i_q, float("-inf"), 0.0))
    return b_best, b_diagonal


@gluon.jit
def _take(d_q, smem_q, bars_q, i, i_b, i_h, i_m, QUERY: gl.constexpr):
    """The i-th place of queries that passes by, in registers; the copy of another into its buffer is started.

    Behind the last of them what is in the buffer is given again, which nobody multiplies.
    """
    PASSES: gl.constexpr = PLACES * (PLACES // HELD)
    slot = i % STAGES
    mbarrier.wait(bars_q.index(slot), i // STAGES & 1, pred=i < PASSES)
    b_q = smem_q.index(slot).reshape([TILE, d_q.block_shape[4]]).load(QUERY)
    i_next = i + STAGES
    _copy(d_q, i_b, i_h, i_m, i_next % PLACES, bars_q.index(slot), smem_q.index(slot), i_next < PASSES)
    return b_q


@gluon.jit
def _multiply(
    b_q, b_best, b_diagonal, d_q, d_k, smem_q, smem_k, bars_q, bars_k, i, once, i_b, i_h, i_kv, i_m, i_n,
    LAST: gl.constexpr, EDGE: gl.constexpr, PRODUCT: gl.constexpr, QUERY: gl.constexpr,
):  # fmt: skip
    """Products of some places of queries, of which b_q is the i-th that passes by, with the keys that are here.

    Returns the next place of queries and the maxima. LAST: the keys are not needed any more: copies of those of the
    next half are started.
    """
    COUNT: gl.constexpr = EDGE_BURST if EDGE else BURST
    W: gl.constexpr = d_q.block_shape[4]
    b_zero = gl.zeros([TILE, TILE], gl.float32, PRODUCT)
    i_half = i // PLACES
    first = i_half * HELD  # place of the first of the keys that are here
    m_more = i_half + 1 < PLACES // HELD
    b_x = b_zero
    for u in gl.static_range(COUNT):
        for p in gl.static_range(HELD):
            b_k = smem_k.index(p).reshape([TILE, W]).permute((1, 0))
            mbarrier.wait(bars_k.index(p), i_half & 1)
            b_next = warpgroup_mma(b_q, b_k, b_zero, use_acc=False, is_async=True)
            if p == HELD - 1:  # while this product, and often the one before, are under way
                b_q = _take(d_q, smem_q, bars_q, i + u + 1, i_b, i_h, i_m, QUERY)
            if u + p > 0:  # the product before this one; maxima go through the wait, too, so that they stay behind it
                b_done, b_best = warpgroup_mma_wait(1, deps=(b_x, b_best))
                if LAST and u == COUNT - 1 and p > 0:
                    i_k = first + HELD + p - 1
                    _copy(d_k, i_b, i_kv, i_n, i_k, bars_k.index(p - 1), smem_k.index(p - 1), m_more)
                i_q, i_k = (i + (u * HELD + p - 1) // HELD) % PLACES, first + (p - 1) % HELD
                b_best, b_diagonal = _larger(b_best, b_diagonal, b_done, i_q, i_k, once, EDGE)
            b_x = b_next
    b_done, b_best = warpgroup_mma_wait(0, deps=(b_x, b_best))
    i_q, i_k = (i + COUNT - 1) % PLACES, first + HELD - 1
    if LAST:
        _copy(d_k, i_b, i_kv, i_n, i_k + HELD, bars_k.index(HELD - 1), smem_k.index(HELD - 1), m_more)
    b_best, b_diagonal = _larger(b_best, b_diagonal, b_done, i_q, i_k, once, EDGE)
    return b_q, b_best, b_diagonal


@gluon.jit
def _scores(
    b_q, d_q, d_k, smem_q, smem_k, bars_q, bars_k, once, i_b, i_h, i_kv, i_m, i_n,
    EDGE: gl.constexpr, PRODUCT: gl.constexpr, QUERY: gl.constexpr,
):  # fmt: skip
    """Largest products of a square, and as diagonal tiles see them (EDGE); b_q: the first place of queries."""
    COUNT: gl.constexpr = EDGE_BURST if EDGE else BURST
    b_best = gl.full([TILE, TILE], float("-inf"), gl.float32, PRODUCT)
    b_diagonal = b_best
    for i_half in range(PLACES // HELD):
        for i in range(PLACES // COUNT - 1):
            b_q, b_best, b_diagonal = _multiply(
                b_q, b_best, b_diagonal, d_q, d_k, smem_q, smem_k, bars_q, bars_k, i_half * PLACES + i * COUNT, once,
                i_b, i_h, i_kv, i_m, i_n, False, EDGE, PRODUCT, QUERY,
            )  # fmt: skip
        b_q, b_best, b_diagonal = _multiply(
            b_q, b_best, b_diagonal, d_q, d_k, smem_q, smem_k, bars_q, bars_k, i_half * PLACES + PLACES - COUNT, once,
            i_b, i_h, i_kv, i_m, i_n, True, EDGE, PRODUCT, QUERY,
        )  # fmt: skip
    return b_best, b_diagonal


@gluon.jit
def _numbers(i_m, i_n, PRODUCT: gl.constexpr):
    """Of the rows of tiles of a square, ``[TILE, 1]``, and of its columns, ``[1, TILE]``."""
    o_r = i_m * TILE + gl.arange(0, TILE, layout=gl.SliceLayout(1, PRODUCT))
    o_c = i_n * TILE + gl.arange(0, TILE, layout=gl.SliceLayout(0, PRODUCT))
    return o_r[:, None], o_c[None, :]


@gluon.jit
def _store(p_out, b_out, o_r, o_c, num_rows, s_out_r):
    """The padding of rows is written, too: it lies above the diagonal."""
    gl.store(p_out + (o_r.to(gl.int64) * s_out_r + o_c), b_out, mask=(o_r < num_rows) & (o_c < s_out_r))


@gluon.jit(do_not_specialize=_RUNTIME_SCALARS)
def gate_scores_hopper_kernel(
    d_q, d_k, p_out, scale, num_kv_heads, group, squares, across, shift, num_rows, first_row, s_out_h, s_out_r, once,
    MASKED: gl.constexpr,
):  # fmt: skip
    """Writes ``num_rows`` rows of ``out [B, H, rows, s_out_r]``: the squares with a tile that is not above the
    diagonal, which has -inf above it; MASKED: all squares."""
    DTYPE: gl.constexpr = d_q.dtype
    W: gl.constexpr = d_q.block_shape[4]
    PRODUCT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, TILE, 16])
    QUERY: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=PRODUCT, k_width=2)

    # Query heads of one KV head are neighbours.
    i_program = gl.program_id(0)
    i_place = i_program // group // squares
    i_b, i_kv = i_place // num_kv_heads, i_place % num_kv_heads
    i_h = i_kv * group + i_program % group
    i_m, i_n = _square(i_program // group % squares, across, shift, MASKED)

    p_out += (i_b * num_kv_heads * group + i_h).to(gl.int64) * s_out_h
    if i_n * TILE < first_row + (i_m + 1) * TILE:
        smem_q = gl.allocate_shared_memory(DTYPE, [STAGES, 1, 1, TILE, 1, W], d_q.layout)
        smem_k = gl.allocate_shared_memory(DTYPE, [HELD, 1, 1, TILE, 1, W], d_k.layout)
        bars_q = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        bars_k = gl.allocate_shared_memory(gl.int64, [HELD, 1], mbarrier.MBarrierLayout())
        for i in gl.static_range(STAGES):
            mbarrier.init(bars_q.index(i), count=1)
        for i in gl.static_range(HELD):
            mbarrier.init(bars_k.index(i), count=1)
        for i in gl.static_range(HELD):  # in the order in which they are needed
            if i < STAGES:
                _copy(d_q, i_b, i_h, i_m, i, bars_q.index(i), smem_q.index(i), True)
            _copy(d_k, i_b, i_kv, i_n, i, bars_k.index(i), smem_k.index(i), True)
        b_q = _take(d_q, smem_q, bars_q, 0, i_b, i_h, i_m, QUERY)
        if (i_n + 1) * TILE <= first_row + i_m * TILE:
            b_best, b_diagonal = _scores(
                b_q, d_q, d_k, smem_q, smem_k, bars_q, bars_k, once, i_b, i_h, i_kv, i_m, i_n, False, PRODUCT, QUERY
            )
        else:
            b_best, b_diagonal = _scores(
                b_q, d_q, d_k, smem_q, smem_k, bars_q, bars_k, once, i_b, i_h, i_kv, i_m, i_n, True, PRODUCT, QUERY
            )
        o_r, o_c = _numbers(i_m, i_n, PRODUCT)
        b_out = gl.where(o_c == first_row + o_r, b_diagonal, b_best) * scale
        b_out = gl.where(o_c <= first_row + o_r, b_out, float("-inf"))
        _store(p_out, b_out, o_r, o_c, num_rows, s_out_r)
    elif MASKED:
        o_r, o_c = _numbers(i_m, i_n, PRODUCT)
        b_out = gl.full([TILE, TILE], float("-inf"), gl.float32, PRODUCT)
        _store(p_out, b_out, o_r, o_c, num_rows, s_out_r)


def gate_scores(q: Tensor, k: Tensor, scores: Tensor, tiles: Tiles) -> None:
    """Writes ``scores [B, Hq, R, N]``, whose rows are padded in memory (``interface.empty_scores``); ``hopper_usable``
    found no reason against it."""
    if scores.numel() == 0:
        return
    batch, heads, num_rows, columns = scores.shape
    whole = tiles.whole_rows(q, k)
    down, across = num_blocks(whole, TILE.value), num_blocks(columns, TILE.value)
    shift = num_blocks(tiles.first_row, TILE.value)
    # Row i of squares has i + 1 + shift with a tile that is not above the diagonal; of the last one not all may exist.
    squares = (down - 1) * (down + 2 * shift) // 2 + min(down + shift, across)
    if tiles.masked:
        squares = down * across
    launch(
        gate_scores_hopper_kernel,
        (squares * batch * heads,),
        by_places(q, PLACES.value, TILE.value, 1),
        by_places(k, PLACES.value, TILE.value, 1),
        scores,
        tiles.scale,
        k.shape[1],
        heads // k.shape[1],
        squares,
        across,
        shift,
        whole,
        tiles.first_row,
        scores.stride(1),
        scores.stride(2),
        1,
        MASKED=tiles.masked,
        num_warps=NUM_WARPS,
    )
    if whole < num_rows:
        write = row_scores if whole + 1 == num_rows else triton_scores
        rest = tiles._replace(first_row=tiles.first_row + whole)
        write(q[:, :, whole * PLACES.value :], k, scores[:, :, whole:], rest)


def by_places(x: Tensor, places: int, tiles: int, at_once: int) -> TensorDescriptor:
    """The whole tiles of ``x [B, H, N, W]`` for TMA, as ``[B, H, N // places, places, W]``.

    A copy takes ``at_once`` places of ``tiles`` tiles; tiles that do not exist arrive as zeros.
    """
    batch, heads, num, width = x.shape
    s_b, s_h, s_n = x.stride()[:3]
    sizes = [batch, heads, num // places, places, width]
    return view_descriptor(x, sizes, [s_b, s_h, places * s_n, s_n, 1], [1, 1, tiles, at_once, width])
