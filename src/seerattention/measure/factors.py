"""How many blocks a ``RelativeThreshold`` keeps with each of some factors, and with which it has a density."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops.indices import read_lists
from ..policies import RelativeThreshold


class KeptByFactor:
    """Blocks that are kept with each factor, over all layers, heads and rows that were added.

    Args:
        policy: whose factor is to be found.
        factors: that are tried, ascending.
    """

    def __init__(self, policy: RelativeThreshold, factors: Sequence[float]) -> None:
        self.policies = [dataclasses.replace(policy, factor=factor) for factor in factors]
        self.kept = torch.zeros(len(factors), dtype=torch.float64)
        self.causal = 0

    def add(self, scores: Tensor, layer: int, block_size: int, lengths: Tensor | None) -> None:
        """Scores ``[B, H, Q, N]`` of a layer whose softmax is a map, of whole prompts; int64 ``lengths [B]``."""
        batch, heads, count, _ = scores.shape
        rows = torch.arange(1, count + 1, device=scores.device)
        if lengths is None:
            self.causal += int(rows.sum()) * batch * heads
        else:
            self.causal += int((rows * (rows <= -(-lengths // block_size)[:, None])).sum()) * heads
        counts = []
        for policy in self.policies:  # one factor's lists at a time: each has room for all blocks
            lists = policy.of_layer(layer).select(scores, block_size=block_size, lengths=lengths)
            counts.append(read_lists(lists)[1].sum())
        self.kept += torch.stack(counts).double().cpu()

    @property
    def least(self) -> float:
        """Density of the largest factor: what is always kept."""
        return float(self.kept[-1]) / self.causal

    def factor(self, density: float) -> float:
        """The factor whose density that is, between the two nearest of those tried, in logarithms of both."""
        found = (self.kept / max(self.causal, 1)).tolist()  # falls
        place = min(max(1, sum(value > density for value in found)), len(found) - 1)
        (low, high), (a, b) = found[place - 1 : place + 1], [p.factor for p in self.policies[place - 1 : place + 1]]
        if low <= high or low <= 0 or high <= 0:
            return b
        share = (math.log(low) - math.log(density)) / (math.log(low) - math.log(high))
        return a * (b / a) ** min(max(share, 0.0), 1.0)
