"""MInference's vertical-slash pattern, in whole tiles: single keys and diagonals that the last queries look at."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import TrainingFree
from .prompt import Prompt, diagonal_sums, last_softmax

# Least numbers of each, and what is kept in any case: the first keys and the nearest diagonals.
LEAST_VERTICAL, LEAST_SLASH = 30, 50
FIRST_KEYS, NEAREST_DIAGONALS = 30, 100


@dataclass(frozen=True)
class MInference(
    TrainingFree, kind="minference", limits={"vertical": 0, "slash": 0, "multiplier": (0, 1e6), "last_queries": 1}
):
    """Every tile that a chosen key column or a chosen diagonal passes through.

    MInference (arXiv 2407.02490, section 3.2, vertical-slash heads). Of the attention of the last ``last_queries``
    queries (of a chunk: its last ones, at most all) each head takes the ``vertical`` keys with the largest sum, the
    first 30 in any case, and the ``slash`` distances between key and query with the largest sum, the 100 nearest in
    any case. Distances that not all of these queries have do not take part. Of equal sums the earlier key and the
    nearer distance come first. Numbers are absolute, as published, so that short prompts are dense.

    **This is more than the method reads.** Its kernel reads a chosen key alone and a diagonal as the 64 keys that a
    query block needs of it, which are rarely a whole tile; here each of these fills the tiles that it touches, two a
    diagonal. A thousand keys that lie apart touch up to a thousand tiles in every row. What the method itself reads, at
    its own density, is :class:`~seerattention.baselines.MInferenceExact`, which is no list of blocks.

    The published configurations have one pair of numbers for each head, found by a search; here one pair serves all.

    Attributes:
        vertical: keys to keep, at least 30 of them.
        slash: distances to keep, at least 50 of them.
        multiplier: both numbers are multiplied by this and rounded up, before the minimum: one knob for density.
        last_queries: queries whose attention is looked at.

    Raises:
        ValueError: values that are not such numbers.
    """

    vertical: int = 1000
    slash: int = 6096
    multiplier: float = 1.0
    last_queries: int = 64

    rowwise = False

    def patterns(self, prompt: Prompt) -> tuple[Tensor, Tensor]:
        """The chosen keys and the chosen distances of each head, bool ``[Hq, L]`` both."""
        attention = last_softmax(prompt, self.last_queries)
        by_key, by_distance = attention.sum(1), diagonal_sums(attention)
        by_key[:, :FIRST_KEYS] = math.inf
        common = prompt.length - attention.shape[1] + 1  # distances that every one of the queries has
        by_distance[:, :NEAREST_DIAGONALS] = math.inf
        keys = self._best(by_key, self.vertical, LEAST_VERTICAL)
        distances = torch.zeros_like(keys)
        distances[:, :common] = self._best(by_distance[:, :common], self.slash, LEAST_SLASH)
        return keys, distances

    def _best(self, sums: Tensor, number: int, least: int) -> Tensor:
        """The largest of ``sums [Hq, n]``, bool; of equal ones the earlier."""
        count = max(math.ceil(number * self.multiplier), least)
        order = sums.sort(dim=-1, descending=True, stable=True).indices[:, :count]
        return torch.zeros_like(sums, dtype=torch.bool).scatter_(-1, order, True)

    def keep(self, prompt: Prompt) -> Tensor:
        """bool ``[Hq, R, N]``."""
        size = self.block_size
        keys, distances = (
            torch.nn.functional.pad(x, (0, -prompt.length % size)).unflatten(1, (-1, size))
            for x in self.patterns(prompt)
        )
        # Distance r * size + s leads from a query block to the block r before it and, unless s is 0, to the next one.
        apart = distances.any(-1)
        apart[:, 1:] |= distances[:, :-1, 1:].any(-1)
        distance = (prompt.rows() - prompt.columns()).clamp(min=0)
        return keys.any(-1)[:, None] | apart[:, distance]
