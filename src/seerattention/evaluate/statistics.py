"""Intervals by resampling: what a score, or its difference from another on the same questions, might have been."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

__all__ = ["Interval", "bootstrap", "paired_bootstrap"]

RESAMPLES = 2000


class Interval(NamedTuple):
    """A mean, and the range that holds 95 % of the means of resamples."""

    mean: float
    low: float
    high: float


def bootstrap(groups: Sequence[np.ndarray], resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """Percentile bootstrap of the mean over groups of their means.

    Args:
        groups: float ``[samples]`` each, of any lengths. Samples are drawn anew within each group.
        resamples: how many times.
        seed: of the draws.

    Raises:
        ValueError: no group, or an empty one.
    """
    if not groups or any(len(group) == 0 for group in groups):
        raise ValueError("an interval needs at least one sample in each group")
    rng = np.random.default_rng(seed)
    means = np.zeros(resamples)
    for group in groups:
        values = np.asarray(group, dtype=np.float64)
        drawn = rng.integers(0, len(values), (resamples, len(values)))
        means += values[drawn].mean(-1)
    means /= len(groups)
    low, high = np.percentile(means, (2.5, 97.5))
    return Interval(float(np.mean([np.mean(group) for group in groups])), float(low), float(high))


def paired_bootstrap(
    mine: Sequence[np.ndarray], theirs: Sequence[np.ndarray], resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """:func:`bootstrap` of the differences of two settings on the same samples.

    Raises:
        ValueError: other numbers of samples.
    """
    shapes = [[len(group) for group in groups] for groups in (mine, theirs)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"pairs need the same samples in both, got {shapes[0]} and {shapes[1]}")
    return bootstrap([a - b for a, b in zip(mine, theirs, strict=True)], resamples, seed)
