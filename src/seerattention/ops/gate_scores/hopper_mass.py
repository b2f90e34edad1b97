"""Gate scores of ``reduce="mass"`` for Hopper GPUs (compute capability 9.0) in Gluon: products are made once.

A share is of the sum of a whole row, so Triton's kernels (``triton_mass.py``) make all products twice. But powers
summed over the key sub-blocks of a tile are 8 or 16 times fewer than products, and can be kept. A program takes *units*
of 64 query sub-blocks of two heads of one KV head. It goes along their keys, 32 tiles (a *chunk*) at a time, makes

    S(query sub-block, tile) = sum over the places of the tile of 2**(product * scale * log2(e) - reference),

writes S to scratch memory of its own and adds it to the total of the row. At the end of the row it reads S back and
writes the logarithm of the largest S / total over the places of queries.

The reference of a row is the largest of its first products, which are of the chunk with the diagonal. So the total is
at least about 1, and an S too small for a number is a share that nobody sees. That goes well unless a product is larger
than the reference by more than about 100 (powers of 2), which the total shows: then the unit is done again with exact
maxima (``_maxima``, slow). So nothing is ever rescaled.

A warpgroup has both heads of a unit as two *parts*, whose products with the same keys follow each other: while the
tensor cores make one, powers of the other are taken. Two programs share a multiprocessor and fill each other's gaps. A
product takes a pair of places of a chunk (``[32 tiles, 2 places]``, one copy of the tensor copy engine, TMA), so that
one thread holds both places of a tile.

As in ``hopper.py``, what ptxas does shapes the code: arithmetic on a product is in a loop of a single round (``_add``),
and no product is under way where a loop begins anew (``_chunk``). Rows that lack sub-blocks (``Tiles.whole_rows``) are
left to Triton, a prompt's last one to ``triton_mass_row.py``. What can run is decided by ``hopper_usable``.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from .. import dispatch
from ..hopper import thread_barrier, view_descriptor
from ..indices import num_blocks
from ..triton_launch import launch
from ..triton_span import LOG2E
from .hopper import by_places
from .reference import LEAST_MASS, Tiles
from .triton_mass import mass_scores as triton_mass_scores
from .triton_mass_row import mass_row_scores

ROWS = gl.constexpr(64)  # query sub-blocks of a head in a unit
PARTS = gl.constexpr(2)  # heads of a unit
TILES = gl.constexpr(32)  # tiles of a chunk of keys
PAIR = gl.constexpr(2)  # places of a product
# Pairs of places in shared memory. A chunk has 8 of them, or 4, and passes by.
HELD = gl.constexpr(4)
# Tiles that are written at a time; rows of the scratch are padded to a multiple.
COLUMNS = gl.constexpr(128)
PROGRAMS = 2  # a multiprocessor
NUM_WARPS = 4
LEAST = gl.constexpr(LEAST_MASS)
MOST = gl.constexpr(2.0**100)  # a total from which on the reference of a row was too small

# Lengths and head counts vary from call to call: one binary serves them all. ``once`` is 1, which ptxas must not know.
_RUNTIME_SCALARS = ["num_kv", "pairs", "num_units", "low", "high", "num_rows", "first_row", "columns", "once"]


@gluon.jit
def _unit(i, num_kv, pairs, low, high, num_units):
    """The i-th unit of this program: whether there is one, its batch row, KV head, first query head and row of units.

    The longest rows come first, to programs from the first to the last and back again, so that they get equal shares.
    """
    programs, i_program = gl.num_programs(0), gl.program_id(0)
    i_unit = i * programs + gl.where(i % 2 == 0, i_program, programs - 1 - i_program)
    m_any = i_unit < num_units
    i_unit = gl.minimum(i_unit, num_units - 1)
    across = num_units // (high - low + 1)  # units of a row: pairs of heads of the whole batch
    i_pair, heads = i_unit % across, num_kv * pairs
    return m_any, i_pair // heads, i_pair % heads // pairs, i_pair % heads * PARTS, high - i_unit // across


@gluon.jit
def _copy_queries(d_q, i_b, i_h, o_q, bar, smem, m_any):
    """Start the copies of the queries of both parts, if ``m_any``; ``bar`` completes when they have arrived."""
    mbarrier.expect(bar, d_q.block_type.nbytes * PARTS, pred=m_any)
    for part in gl.static_range(PARTS):
        tma.async_copy_global_to_shared(d_q, [i_b, i_h + part, o_q, 0], bar, smem.index(part), pred=m_any)


@gluon.jit
def _copy_keys(d_k, i_b, i_kv, i_chunk, i_pair, bar, smem, m_any):
    """The same of a pair of places of a chunk."""
    mbarrier.expect(bar, d_k.block_type.nbytes, pred=m_any)
    tma.async_copy_global_to_shared(d_k, [i_b, i_kv, i_chunk * TILES, i_pair * PAIR, 0], bar, smem, pred=m_any)


@gluon.jit
def _refill(d_k, smem_k, bars_k, slot, i_pair, here, then, m_more, COUNT: gl.constexpr):
    """The keys of a slot, pair ``i_pair`` of chunk ``here``, are not needed any more: start the copy of those that are
    needed next, of the same chunk or of the one after it, ``then``, if ``m_more``."""
    i_b, i_kv, i_chunk = then
    if HELD < COUNT:
        m_same = i_pair + HELD < COUNT
        i_b = gl.where(m_same, here[0], i_b)
        i_kv = gl.where(m_same, here[1], i_kv)
        i_chunk = gl.where(m_same, here[2], i_chunk)
        i_pair = (i_pair + HELD) % COUNT
        m_more = m_same | m_more
    _copy_keys(d_k, i_b, i_kv, i_chunk, i_pair, bars_k.index(slot), smem_k.index(slot), m_more)


@gluon.jit
def _places(b_x, PLACED: gl.constexpr):
    """The products of a pair of places, ``[ROWS, TILES]`` each."""
    return gl.split(gl.convert_layout(b_x.reshape([ROWS, TILES, PAIR]), PLACED, assert_trivial=True))


@gluon.jit
def _last_place(i_m, i_chunk, PLACES: gl.constexpr, PLACED: gl.constexpr):
    """The last place of each tile of a chunk that a query sub-block sees, ``[ROWS, TILES]``; below 0: none."""
    SUMS: gl.constexpr = gl.SliceLayout(2, PLACED)
    o_q = i_m * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, SUMS))
    o_n = i_chunk * TILES + gl.arange(0, TILES, layout=gl.SliceLayout(0, SUMS))
    return o_q[:, None] - o_n[None, :] * PLACES


@gluon.jit
def _add(b_s, b_ref, b_x, b_last, i_k, factor, once, m_first, FIRST: gl.constexpr, EDGE: gl.constexpr,
         PLACED: gl.constexpr):  # fmt: skip
    """S with the powers of a product of key places i_k and i_k + 1, and the reference, which is taken here if
    ``m_first`` (and FIRST); EDGE: places up to b_last count."""
    for i in range(once):
        b_0, b_1 = _places(b_x, PLACED)
        if EDGE:  # i is 0, and keeps comparisons here: in front of the loop they would need many registers
            b_0 = gl.where(b_last >= i_k + i, b_0, float("-inf"))
            b_1 = gl.where(b_last >= i_k + i + 1, b_1, float("-inf"))
            if FIRST:
                b_ref = gl.where(m_first, gl.max(gl.maximum(b_0, b_1), 1) * factor, b_ref)
        b_s = b_s + gl.exp2(gl.fma(b_0, factor, -b_ref[:, None]))
        b_s = b_s + gl.exp2(gl.fma(b_1, factor, -b_ref[:, None]))
    return b_s, b_ref


@gluon.jit
def _chunk(
    b_q, b_ref, d_k, smem_k, bars_k, phase, factor, once, m_first, i_m, here, m_same, i_next, other, m_other,
    EDGE: gl.constexpr, PLACES: gl.constexpr, PRODUCT: gl.constexpr, PLACED: gl.constexpr,
):  # fmt: skip
    """S of both parts with a chunk, and their references.

    Args:
        b_q, b_ref: queries and references of both parts; references are taken from the first product if ``m_first``.
        phase: of all slots when the chunk begins.
        here: batch row, KV head and number of this chunk.
        i_next, other: number of the next one of the same row, if ``m_same``; else the first one of the next unit, if
            ``m_other``. Copies of its first keys are started.
        EDGE: not all products count, and code is shorter.
    """
    COUNT: gl.constexpr = PLACES // PAIR
    ROUND: gl.constexpr = HELD if EDGE else COUNT  # pairs between two points where no product is under way
    b_zero = gl.zeros([ROWS, TILES * PAIR], gl.float32, PRODUCT)
    b_s0 = gl.zeros([ROWS, TILES], gl.float32, gl.SliceLayout(2, PLACED))
    b_s1 = b_s0
    b_ref0, b_ref1 = b_ref
    m_more, i_b, i_kv = m_same | m_other, gl.where(m_same, here[0], other[0]), gl.where(m_same, here[1], other[1])
    then = i_b, i_kv, gl.where(m_same, i_next, other[2])
    b_last = 0
    if EDGE:
        b_last = _last_place(i_m, here[2], PLACES, PLACED)
    for r in range(COUNT // ROUND):
        none = phase & (once - 1)  # 0; keeps ptxas from holding the addresses of all slots in registers
        first = r * ROUND + none
        b_x = b_zero
        for s in gl.static_range(ROUND * PARTS):
            slot = s // PARTS % HELD + none
            b_k = smem_k.index(slot).reshape([TILES * PAIR, d_k.block_shape[4]]).permute((1, 0))
            if s % PARTS == 0:
                mbarrier.wait(bars_k.index(slot), phase + s // PARTS // HELD + r * (ROUND // HELD) & 1)
            b_next = warpgroup_mma(b_q[s % PARTS], b_k, b_zero, use_acc=False, is_async=True)
            if s > 0:  # the product before this one; S goes through the wait, too, so that sums stay behind it
                i_k = (first + (s - 1) // PARTS) * PAIR
                m_now = m_first & (r == 0)
                if s % PARTS == 1:
                    b_done, b_s0 = warpgroup_mma_wait(1, deps=(b_x, b_s0))
                    b_s0, b_ref0 = _add(b_s0, b_ref0, b_done, b_last, i_k, factor, once, m_now, s == 1, EDGE, PLACED)
                else:
                    b_done, b_s1 = warpgroup_mma_wait(1, deps=(b_x, b_s1))
                    i_pair = s // PARTS - 1
                    _refill(d_k, smem_k, bars_k, i_pair % HELD + none, first + i_pair, here, then, m_more, COUNT)
                    b_s1, b_ref1 = _add(b_s1, b_ref1, b_done, b_last, i_k, factor, once, m_now, s == 2, EDGE, PLACED)
            b_x = b_next
        b_done, b_s1 = warpgroup_mma_wait(0, deps=(b_x, b_s1))
        _refill(d_k, smem_k, bars_k, HELD - 1 + none, first + ROUND - 1, here, then, m_more, COUNT)
        i_k = (first + ROUND - 1) * PAIR
        b_s1, b_ref1 = _add(b_s1, b_ref1, b_done, b_last, i_k, factor, once, False, False, EDGE, PLACED)
    return b_s0, b_s1, b_ref0, b_ref1


@gluon.jit
def _maxima(
    b_q, d_k, smem, bar, i_b, i_kv, i_m, i_edge, once,
    PLACES: gl.constexpr, PRODUCT: gl.constexpr, PLACED: gl.constexpr,
):  # fmt: skip
    """The largest products of the rows of both parts, unscaled, one product after the other."""
    COUNT: gl.constexpr = PLACES // PAIR
    b_zero = gl.zeros([ROWS, TILES * PAIR], gl.float32, PRODUCT)
    b_best0 = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, gl.SliceLayout(2, PLACED)))
    b_best1 = b_best0
    for i in range((i_edge + 1) * COUNT):  # an even number of phases: the barrier is as it was
        _copy_keys(d_k, i_b, i_kv, i // COUNT, i % COUNT, bar, smem, True)
        mbarrier.wait(bar, i & 1)
        b_k = smem.reshape([TILES * PAIR, d_k.block_shape[4]]).permute((1, 0))
        b_last = _last_place(i_m, i // COUNT, PLACES, PLACED) - i % COUNT * PAIR
        for part in gl.static_range(PARTS):
            b_x = warpgroup_mma(b_q[part], b_k, b_zero, use_acc=False, is_async=True)
            b_x = warpgroup_mma_wait(0, deps=(b_x,))
            for _ in range(once):
                b_0, b_1 = _places(b_x, PLACED)
                b_0 = gl.where(b_last >= 0, b_0, float("-inf"))
                b_1 = gl.where(b_last >= 1, b_1, float("-inf"))
                b_best = gl.max(gl.maximum(b_0, b_1), 1)
                if part == 0:
                    b_best0 = gl.maximum(b_best0, b_best)
                else:
                    b_best1 = gl.maximum(b_best1, b_best)
    return b_best0, b_best1


@gluon.jit
def _partial(b_s):
    """Sums of what a thread holds of a row, ``[ROWS, 4]``."""
    return gl.sum(b_s.reshape([ROWS, TILES // 4, 4]), 1)


@gluon.jit
def _keep(p_rows, b_s, s_rows):
    """S of a chunk to the scratch. A thread has every fourth tile of a row; there they lie side by side, as vectors."""
    KEPT: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 4], [8, 0]], [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [],
        [ROWS, TILES],
    )  # fmt: skip
    o_q = gl.arange(0, ROWS, layout=gl.SliceLayout(1, KEPT))
    o_n = gl.arange(0, TILES, layout=gl.SliceLayout(0, KEPT))
    b_s = b_s.reshape([ROWS, TILES // 4, 4]).permute((0, 2, 1)).reshape([ROWS, TILES])
    gl.store(p_rows + ((o_q * s_rows)[:, None] + o_n[None, :]), gl.convert_layout(b_s, KEPT, assert_trivial=True))


@gluon.jit
def _finish(
    p_rows, p_out, b_total, i_row, num_rows, first_row, s_rows, s_out_r, PLACES: gl.constexpr, MASKED: gl.constexpr
):
    """Scores of one part of a unit, whose first row of tiles is query block ``i_row``; MASKED: of whole rows."""
    R: gl.constexpr = ROWS // PLACES  # rows of tiles
    READ: gl.constexpr = gl.BlockedLayout([PLACES, 4], [1, 32], [4, 1], [1, 0])
    WRITTEN: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [4, 1], [1, 0])
    b_inverse = 1.0 / gl.convert_layout(b_total, gl.SliceLayout(1, READ))
    o_q = gl.arange(0, ROWS, layout=gl.SliceLayout(1, READ))
    o_s = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, READ))
    o_m = i_row + gl.arange(0, R, layout=gl.SliceLayout(1, WRITTEN))
    o_c = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, WRITTEN))
    o_c = o_c // TILES * TILES + o_c % (TILES // 4) * 4 + o_c % TILES // (TILES // 4)  # as ``_keep`` has put them
    o_r = o_m - first_row
    m_r = (o_r >= 0) & (o_r < num_rows)
    o_out = o_r.to(gl.int64) * s_out_r
    for c in range(0, s_out_r if MASKED else i_row + R, COLUMNS):
        b_s = gl.load(p_rows + ((o_q * s_rows)[:, None] + (c + o_s)[None, :]), mask=c < i_row + R, other=0.0)
        b_s = (b_s * b_inverse[:, None]).reshape([R, PLACES, COLUMNS])
        b_top = gl.convert_layout(gl.max(b_s, 1), WRITTEN, assert_trivial=True)
        b_out = gl.log2(gl.maximum(b_top, LEAST)) / LOG2E
        # Behind the last chunk nothing was written to the scratch: that is above the diagonal, too.
        o_n = c + o_c
        b_out = gl.where(o_n[None, :] <= o_m[:, None], b_out, float("-inf"))
        gl.store(p_out + (o_out[:, None] + o_n[None, :]), b_out, mask=m_r[:, None] & (o_n < s_out_r)[None, :])


@gluon.jit(do_not_specialize=_RUNTIME_SCALARS)
def mass_scores_hopper_kernel(
    d_q, d_k, p_scratch, p_out, factor, num_kv, pairs, num_units, low, high, num_rows, first_row, s_out_h, s_out_r,
    columns, once, PLACES: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """Writes ``num_rows`` rows of ``out [B, H, rows, s_out_r]``, -inf above the diagonal, where MASKED: all columns.

    p_scratch: float32 ``[programs, PARTS, ROWS, columns * COLUMNS]``.
    """
    DTYPE: gl.constexpr = d_q.dtype
    W: gl.constexpr = d_q.block_shape[3]
    COUNT: gl.constexpr = PLACES // PAIR
    R: gl.constexpr = ROWS // PLACES
    N: gl.constexpr = TILES * PAIR
    PRODUCT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, N, 16])
    QUERY: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=PRODUCT, k_width=2)
    # The same by places. A thread holds both of a tile, of every fourth tile of two rows.
    PLACED: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 0, 1], [8, 0, 0], [0, 4, 0], [0, 8, 0], [0, 16, 0]],
        [[0, 1, 0], [0, 2, 0], [1, 0, 0], [2, 0, 0], [4, 0, 0]], [[16, 0, 0], [32, 0, 0]], [], [ROWS, TILES, PAIR],
    )  # fmt: skip

    smem_q = gl.allocate_shared_memory(DTYPE, [PARTS, 1, 1, ROWS, W], d_q.layout)
    smem_k = gl.allocate_shared_memory(DTYPE, [HELD, 1, 1, TILES, PAIR, W], d_k.layout)
    bars = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())  # of queries, and of ``_maxima``
    bars_k = gl.allocate_shared_memory(gl.int64, [HELD, 1], mbarrier.MBarrierLayout())
    mbarrier.init(bars.index(0), count=1)
    mbarrier.init(bars.index(1), count=1)
    for i in gl.static_range(HELD):
        mbarrier.init(bars_k.index(i), count=1)

    s_rows = columns * COLUMNS
    p_rows0 = p_scratch + gl.program_id(0).to(gl.int64) * (PARTS * ROWS) * s_rows
    p_rows1 = p_rows0 + ROWS * s_rows
    m_any, i_b, i_kv, i_h, i_m = _unit(0, num_kv, pairs, low, high, num_units)
    i_edge = i_m * R // TILES  # the chunk with the diagonal: it comes first, then the others from the first one on
    _copy_queries(d_q, i_b, i_h, i_m * ROWS - first_row * PLACES, bars.index(0), smem_q, m_any)
    for i in gl.static_range(HELD):
        _copy_keys(d_k, i_b, i_kv, i_edge, i, bars_k.index(i), smem_k.index(i), m_any)

    phase = 0
    for i_turn in range((num_units - 1) // gl.num_programs(0) + 1):
        m_next, j_b, j_kv, j_h, j_m = _unit(i_turn + 1, num_kv, pairs, low, high, num_units)
        j_edge = j_m * R // TILES
        if m_any:
            mbarrier.wait(bars.index(0), i_turn & 1)
            b_q0 = smem_q.index(0).reshape([ROWS, W]).load(QUERY)
            b_q1 = smem_q.index(1).reshape([ROWS, W]).load(QUERY)
            _copy_queries(d_q, j_b, j_h, j_m * ROWS - first_row * PLACES, bars.index(0), smem_q, m_next)
            b_ref0 = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, gl.SliceLayout(2, PLACED)))
            b_ref1 = b_ref0
            b_total0 = _partial(gl.zeros([ROWS, TILES], gl.float32, gl.SliceLayout(2, PLACED)))
            b_total1 = b_total0
            b_row0 = gl.sum(b_total0, 1)
            b_row1 = b_row0
            attempt, again = 0, 1
            while again > 0:
                if attempt > 0:
                    if m_next:  # the keys of the next unit are here already
                        for i in gl.static_range(HELD):
                            mbarrier.wait(bars_k.index(i), phase & 1)
                        phase += 1
                    b_ref0, b_ref1 = _maxima(
                        (b_q0, b_q1), d_k, smem_k.index(0), bars.index(1), i_b, i_kv, i_m, i_edge, once, PLACES,
                        PRODUCT, PLACED,
                    )  # fmt: skip
                    b_ref0, b_ref1 = b_ref0 * factor, b_ref1 * factor
                    for i in gl.static_range(HELD):
                        _copy_keys(d_k, i_b, i_kv, i_edge, i, bars_k.index(i), smem_k.index(i), True)
                b_s0, b_s1, b_ref0, b_ref1 = _chunk(
                    (b_q0, b_q1), (b_ref0, b_ref1), d_k, smem_k, bars_k, phase, factor, once, attempt == 0, i_m,
                    (i_b, i_kv, i_edge), i_edge > 0, 0, (j_b, j_kv, j_edge), m_next, True, PLACES, PRODUCT, PLACED,
                )  # fmt: skip
                phase += COUNT // HELD
                b_total0, b_total1 = _partial(b_s0), _partial(b_s1)
                _keep(p_rows0 + i_edge * TILES, b_s0, s_rows)
                _keep(p_rows1 + i_edge * TILES, b_s1, s_rows)
                for i_chunk in range(i_edge):
                    b_s0, b_s1, b_ref0, b_ref1 = _chunk(
                        (b_q0, b_q1), (b_ref0, b_ref1), d_k, smem_k, bars_k, phase, factor, once, False, i_m,
                        (i_b, i_kv, i_chunk), i_chunk + 1 < i_edge, i_chunk + 1, (j_b, j_kv, j_edge), m_next, False,
                        PLACES, PRODUCT, PLACED,
                    )  # fmt: skip
                    phase += COUNT // HELD
                    b_total0, b_total1 = b_total0 + _partial(b_s0), b_total1 + _partial(b_s1)
                    _keep(p_rows0 + i_chunk * TILES, b_s0, s_rows)
                    _keep(p_rows1 + i_chunk * TILES, b_s1, s_rows)
                b_row0, b_row1 = gl.sum(b_total0, 1), gl.sum(b_total1, 1)
                beyond = gl.max(gl.where((b_row0 < MOST) & (b_row1 < MOST), 0, 1), 0)  # NaN is, too
                again = gl.where(attempt == 0, beyond, 0)
                attempt += 1
            p_head0 = p_out + (i_b * num_kv * pairs * PARTS + i_h).to(gl.int64) * s_out_h
            thread_barrier()
            _finish(p_rows0, p_head0, b_row0, i_m * R, num_rows, first_row, s_rows, s_out_r, PLACES, MASKED)
            _finish(p_rows1, p_head0 + s_out_h, b_row1, i_m * R, num_rows, first_row, s_rows, s_out_r, PLACES, MASKED)
            thread_barrier()
        m_any, i_b, i_kv, i_h, i_m, i_edge = m_next, j_b, j_kv, j_h, j_m, j_edge


def mass_scores(q: Tensor, k: Tensor, scores: Tensor, tiles: Tiles) -> None:
    """Writes the natural logarithms of shares.

    Args:
        q: ``[B, Hq, Nq, W]``, float16 or bfloat16, W 64 or 128; Hq is an even multiple of Hk.
        k: ``[B, Hk, Nk, W]``, dtype of q.
        scores: float32 ``[B, Hq, R, N]``, whose rows are padded in memory (``interface.empty_scores``).
        tiles: blocks of 64 tokens in sub-blocks of 4 or of 8 tokens on both sides. ``hopper_usable`` found no reason
            against it.

    Allocates 512 bytes for each tile of a row and running program, of which there are two a multiprocessor: ``512 * N *
    2 * 132`` bytes on an H200, 66 MiB for the 512 tiles of 32K tokens.
    """
    if scores.numel() == 0:
        return
    (batch, heads, num_rows, _), num_kv, width = scores.shape, k.shape[1], k.shape[3]
    pairs, places, whole = heads // num_kv // PARTS.value, tiles.block_size // tiles.q_pitch, tiles.whole_rows(q, k)
    low, high = tiles.first_row * places // ROWS.value, ((tiles.first_row + whole) * places - 1) // ROWS.value
    units = (high - low + 1) * batch * num_kv * pairs
    programs = min(units, PROGRAMS * dispatch.multiprocessors(q.device))
    columns = num_blocks((high + 1) * ROWS.value // places, COLUMNS.value)
    scratch = q.new_empty(programs, PARTS.value, ROWS.value, columns * COLUMNS.value, dtype=torch.float32)
    # Whole rows of queries, and whole tiles of keys by places; what is not there arrives as zeros.
    d_q = view_descriptor(q, [batch, heads, whole * places, width], q.stride(), [1, 1, ROWS.value, width])
    d_k = by_places(k, places, TILES.value, PAIR.value)
    numbers = num_kv, pairs, units, low, high, whole, tiles.first_row, scores.stride(1), scores.stride(2), columns, 1
    factor, constants = tiles.scale * LOG2E.value, {"PLACES": places, "MASKED": tiles.masked, "num_warps": NUM_WARPS}
    launch(mass_scores_hopper_kernel, (programs,), d_q, d_k, scratch, scores, factor, *numbers, **constants)
    if whole < num_rows:
        write = mass_row_scores if whole + 1 == num_rows else triton_mass_scores
        write(q[:, :, whole * places :], k, scores[:, :, whole:], tiles._replace(first_row=tiles.first_row + whole))
