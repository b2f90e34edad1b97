"""The search of the selection kernels: between which scores of a row the boundary lies that is asked for.

A row is four tensors, as in ``triton.py``, NaN where a block does not compete.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .reference import PROBABILITY_UNITS

UNITS = tl.constexpr(float(PROBABILITY_UNITS))
SIGN = tl.constexpr(-(1 << 31))
INFINITY_BITS = tl.constexpr(0x7F800000)
# Search steps after which every second one halves the bracket of integers, whatever the interpolation says.
PATIENCE = tl.constexpr(10)


@triton.jit
def _ordered(b_x):
    """int32 in the order of the floats; -0 and 0 are equal, NaN is as low as -inf."""
    b_bits = b_x.to(tl.int32, bitcast=True)
    b_key = tl.where(b_bits < 0, -(b_bits & 0x7FFFFFFF), b_bits)
    return tl.where(b_key > INFINITY_BITS, -INFINITY_BITS, tl.maximum(b_key, -INFINITY_BITS))


@triton.jit
def value_of(key):
    """The float of an integer of :func:`_ordered`."""
    return tl.where(key < 0, -key | SIGN, key).to(tl.float32, bitcast=True)


@triton.jit
def _halfway(lo, hi):
    """Floor of the mean, without overflow; lo itself where hi is its neighbour."""
    return (lo & hi) + ((lo ^ hi) >> 1)


@triton.jit
def add(b_0, b_1, b_2, b_3):
    return tl.sum((b_0 + b_1) + (b_2 + b_3), 0)


@triton.jit
def _total(b_x0, b_x1, b_x2, b_x3, floor):
    """How many scores lie at or above ``floor``. Added as floats, which takes fewer instructions."""
    return add(
        tl.where(b_x0 >= floor, 1.0, 0.0),
        tl.where(b_x1 >= floor, 1.0, 0.0),
        tl.where(b_x2 >= floor, 1.0, 0.0),
        tl.where(b_x3 >= floor, 1.0, 0.0),
    ).to(tl.int32)


@triton.jit
def _above(b_x, floor):
    """Scores at or above ``floor``, else 0."""
    return tl.where(b_x >= floor, b_x, 0.0)


@triton.jit
def replace_nan(b_x, other):
    return tl.where(b_x == b_x, b_x, other)


@triton.jit
def _bracket(b_x0, b_x1, b_x2, b_x3):
    """The integer of the least score and the one above that of the greatest."""
    high, low = float("inf"), float("-inf")
    b_low = tl.minimum(
        tl.minimum(replace_nan(b_x0, high), replace_nan(b_x1, high)),
        tl.minimum(replace_nan(b_x2, high), replace_nan(b_x3, high)),
    )
    b_high = tl.maximum(
        tl.maximum(replace_nan(b_x0, low), replace_nan(b_x1, low)),
        tl.maximum(replace_nan(b_x2, low), replace_nan(b_x3, low)),
    )
    return _ordered(tl.min(b_low, 0)), _ordered(tl.max(b_high, 0)) + 1


@triton.jit
def _root(count):
    """Fourth root: counts of the scores above a boundary fall about evenly with it on this scale."""
    return tl.sqrt(tl.sqrt(count.to(tl.float32)))


@triton.jit
def topk_boundary(b_x0, b_x1, b_x2, b_x3, wanted, total):
    """Integers ``lo`` and ``hi`` of two scores, and how many scores lie at or above each.

    Either exactly ``wanted`` scores lie at or above ``lo``, or ``hi`` is its neighbour and scores equal to ``lo``
    compete.
    """
    lo, hi = _bracket(b_x0, b_x1, b_x2, b_x3)
    lo = tl.where(wanted > 0, lo, hi)
    n_lo, n_hi = tl.where(wanted > 0, total, 0), total * 0
    goal = tl.sqrt(tl.sqrt(wanted.to(tl.float32) + 0.5))
    f_lo, f_hi = _root(n_lo), _root(n_hi)
    side, step = total * 0, total * 0
    while (n_lo != wanted) & (_halfway(lo, hi) != lo):
        guess = value_of(lo) + (value_of(hi) - value_of(lo)) * ((f_lo - goal) / (f_lo - f_hi))
        trust = (tl.abs(guess) < float("inf")) & ((step < PATIENCE) | (step % 2 == 0))
        mid = tl.where(trust, tl.minimum(tl.maximum(_ordered(guess), lo + 1), hi - 1), _halfway(lo, hi))
        n_mid = _total(b_x0, b_x1, b_x2, b_x3, value_of(mid))
        up = n_mid >= wanted
        # An end that stays twice is drawn nearer to the goal, or the other one would only creep (the Illinois rule).
        f_hi = tl.where(up, tl.where(side > 0, 0.5 * (f_hi + goal), f_hi), _root(n_mid))
        f_lo = tl.where(up, _root(n_mid), tl.where(side < 0, 0.5 * (f_lo + goal), f_lo))
        side = tl.where(up, 1, -1)
        lo, n_lo = tl.where(up, mid, lo), tl.where(up, n_mid, n_lo)
        hi, n_hi = tl.where(up, hi, mid), tl.where(up, n_hi, n_mid)
        step += 1
    return lo, hi, n_lo, n_hi


@triton.jit
def units(b_p):
    return (b_p * UNITS).to(tl.int64)


@triton.jit
def units_above(b_p0, b_p1, b_p2, b_p3, floor):
    """The mass of the probabilities at or above ``floor``, exactly."""
    return add(
        units(_above(b_p0, floor)),
        units(_above(b_p1, floor)),
        units(_above(b_p2, floor)),
        units(_above(b_p3, floor)),
    )


@triton.jit
def _reaches(b_p0, b_p1, b_p2, b_p3, floor, needed, goal):
    """Whether the probabilities at or above ``floor`` make at least ``needed`` units, and their sum in float32.

    Up to 64 additions a thread and those of the threads' sums leave a relative error below 2^-17, cutting to units and
    the rounding of the goal below 2^-24 in all.
    """
    mass = add(_above(b_p0, floor), _above(b_p1, floor), _above(b_p2, floor), _above(b_p3, floor))
    reached = mass >= goal
    if tl.abs(mass - goal) <= mass * (1.0 / 32768) + goal * (1.0 / 8388608) + (1.0 / 16777216):
        reached = units_above(b_p0, b_p1, b_p2, b_p3, floor) >= needed
    return reached, mass


@triton.jit
def topp_boundary(b_p0, b_p1, b_p2, b_p3, needed, total):
    """As :func:`topk_boundary`, for the mass ``needed``: one score lies from ``lo`` to below ``hi``, or equal ones."""
    lo, hi = _bracket(b_p0, b_p1, b_p2, b_p3)
    goal = needed.to(tl.float32) * (1.0 / UNITS)
    f_hi = goal * 0.0
    enough, f_lo = _reaches(b_p0, b_p1, b_p2, b_p3, 0.0, needed, goal)
    # Nothing is needed: none. Not enough is there: all.
    lo = tl.where(needed > 0, lo, hi)
    n_lo = tl.where(needed > 0, total, 0)
    n_hi = tl.where(enough, 0, n_lo)
    side, step = total * 0, total * 0
    while (n_lo - n_hi > 1) & (_halfway(lo, hi) != lo):
        # Probabilities are even on a logarithmic scale, as their bits are.
        part = tl.minimum(tl.maximum((f_lo - goal) / tl.maximum(f_lo - f_hi, 1e-30), 0.0), 1.0)
        guess = lo + (part * (hi - lo).to(tl.float32)).to(tl.int32)
        trust = (step < PATIENCE) | (step % 2 == 0)
        mid = tl.where(trust, tl.minimum(tl.maximum(guess, lo + 1), hi - 1), _halfway(lo, hi))
        up, f_mid = _reaches(b_p0, b_p1, b_p2, b_p3, value_of(mid), needed, goal)
        n_mid = _total(b_p0, b_p1, b_p2, b_p3, value_of(mid))
        f_hi = tl.where(up, tl.where(side > 0, 0.5 * (f_hi + goal), f_hi), f_mid)
        f_lo = tl.where(up, f_mid, tl.where(side < 0, 0.5 * (f_lo + goal), f_lo))
        side = tl.where(up, 1, -1)
        lo, n_lo = tl.where(up, mid, lo), tl.where(up, n_mid, n_lo)
        hi, n_hi = tl.where(up, hi, mid), tl.where(up, n_hi, n_mid)
        step += 1
    return lo, hi, n_lo, n_hi
