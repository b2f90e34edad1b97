"""CoSA: a block is as good as its best antidiagonals, and blocks with the best one of a row of tiles come first."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .prompt import Prompt, antidiagonals, reach_share
from .xattention import XAttention

# A tile is the best of its row if exp(logit - largest logit) is at least this, as in the published code.
_BEST = 1 - 1e-3


@dataclass(frozen=True)
class CoSA(XAttention, kind="cosa", limits=XAttention.limits):
    """Maxima of antidiagonals in each block, and enough blocks for a share of their sum.

    CoSA (arXiv 2607.25291; the rule of the published code). Logits are those of XAttention: tile (a, b) of ``stride``
    x ``stride`` queries and keys has the scaled mean of its antidiagonal, for b <= a. Of each row of tiles a, a block
    of keys has its largest logit, as ``exp(it - largest logit of the row)``; the mass of a pair of blocks is the sum
    over the rows of tiles in the query block. So a block with one good tile counts as much as one with many.

    The rule of its own: block 0 and the diagonal come first, then blocks with the best tile of some row (or one within
    a thousandth), then all others, each group by falling mass; what is kept ends with the block that reaches ``tau``
    of the mass of the row. The published kernel walks blocks in this order and may stop earlier than the list ends,
    by what it finds in attention; here the whole list is read, in the order of positions.

    Tokens that a tile lacks, behind the end of the prompt or before the first query of a chunk, count as zeros; rows of
    tiles without a query have no mass. Tiles on the diagonal look at some keys of the future, as published.

    Attributes:
        stride: tokens a side of a tile, which divides the block size; published with 8.
        tau: share of the mass to keep, from 0 (block 0 and the diagonal) to 1 (everything).
        policy: chooses instead, with the logarithm of the mass as logits; ``tau``, and which blocks have the best tile
            of a row, then make no difference.

    Raises:
        ValueError: a stride that does not divide the block size, or values out of range.
        TypeError: a policy that is none.
    """

    tau: float = 0.8

    def score(self, prompt: Prompt) -> Tensor:
        """Logarithm of the mass of each block, float32 ``[Hq, R, N]``."""
        return self.maxima(prompt)[0]

    def mass(self, prompt: Prompt) -> Tensor:
        """Mass of each block, float32 ``[Hq, R, N]``."""
        return self.score(prompt).exp_()

    def maxima(self, prompt: Prompt) -> tuple[Tensor, Tensor]:
        """Logarithm of the mass of each block, and whether it has the best tile of a row: ``[Hq, R, N]``, both."""
        tiles = self.block_size // self.stride
        score = torch.full((prompt.heads, prompt.num_rows, prompt.num_keys), -math.inf, device=prompt.q.device)
        best = torch.zeros_like(score, dtype=torch.bool)
        for blocks, slots, logits, present in antidiagonals(prompt, self.stride):
            found = logits.unflatten(2, (-1, tiles)).amax(-1)  # [Hq, rows of tiles, blocks]
            found = (found - found.amax(-1, keepdim=True)).masked_fill_(~present[:, None], -math.inf)
            found = found.unflatten(1, (-1, tiles))
            score[:, slots, : blocks.stop] = found.logsumexp(2)
            best[:, slots, : blocks.stop] = found.amax(2) >= math.log(_BEST)
        return score, best

    def keep(self, prompt: Prompt) -> Tensor:
        """bool ``[Hq, R, N]``."""
        score, best = self.maxima(prompt)
        if self.tau == 1:
            return torch.ones_like(best)
        mass, columns = score.exp_(), prompt.columns()
        forced = (columns == 0) | (columns == prompt.rows())
        keep = torch.empty_like(best)
        for head in range(prompt.heads):
            # No mass is above the number of rows of tiles, so this puts the best in front and is exact in 64 bits.
            rank = mass[head].double() + best[head] * (self.block_size // self.stride + 1)
            keep[head] = reach_share(mass[head], rank.masked_fill_(forced, math.inf), self.tau) | forced
        return keep
