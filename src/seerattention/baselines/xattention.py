"""XAttention: a block is as good as the attention along the antidiagonals of its small tiles."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..policies import Policy
from .base import TrainingFree
from .prompt import Prompt, antidiagonals, reach_share


@dataclass(frozen=True)
class XAttention(TrainingFree, kind="xattention", limits={"stride": 1, "tau": (0, 1)}):
    """Antidiagonal sums of tiles of ``stride`` x ``stride``, their softmax, and enough blocks for a share of it.

    XAttention (arXiv 2503.16428, sections 2.1 and 2.2). With S the stride, tile (a, b) of queries and keys scores
    ``scale / S`` times the sum over u < S of ``q[aS + S - 1 - u] . k[bS + u]``. A softmax over the tiles b <= a of each
    a; the mass of a block is the sum of its tiles. Tiles are cut from position 0 on. Tokens that a tile lacks, behind
    the end of the prompt or before the first query of a chunk, count as zeros; tiles without a query have no mass.

    The rule of its own: block 0 and the diagonal are kept and their mass counts; others follow by falling mass, until
    what is kept has reached ``tau`` of the mass of the row. Tiles on the diagonal look at some keys of the future, as
    published.

    Attributes:
        stride: tokens a side of a tile, which divides the block size; published with 4, 8 and 16.
        tau: share of the mass to keep, from 0 (block 0 and the diagonal) to 1 (everything). One number for all heads;
            the published RULER results have one for each head.
        policy: chooses instead, with the logarithm of the mass as logits; ``tau`` then makes no difference.

    Raises:
        ValueError: a stride that does not divide the block size, or values out of range.
        TypeError: a policy that is none.
    """

    stride: int = 8
    tau: float = 0.9
    policy: Policy | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self).__name__
        if self.block_size % self.stride:
            raise ValueError(f"{name}: a stride of {self.stride} does not divide blocks of {self.block_size}")

    def score(self, prompt: Prompt) -> Tensor:
        """Logarithm of the mass of each block, float32 ``[Hq, R, N]``."""
        return self.mass(prompt).log()

    def mass(self, prompt: Prompt) -> Tensor:
        """Mass of each block, float32 ``[Hq, R, N]``; a row sums to its number of tiles with a query."""
        tiles = self.block_size // self.stride
        mass = torch.zeros(prompt.heads, prompt.num_rows, prompt.num_keys, device=prompt.q.device)
        for blocks, slots, logits, present in antidiagonals(prompt, self.stride):
            shares = logits.softmax(-1)
            shares *= present[:, None]
            mass[:, slots, : blocks.stop] = shares.unflatten(2, (-1, tiles)).sum(-1).unflatten(1, (-1, tiles)).sum(2)
        return mass

    def keep(self, prompt: Prompt) -> Tensor:
        """bool ``[Hq, R, N]``."""
        mass = self.mass(prompt)
        keep = torch.ones_like(mass, dtype=torch.bool)
        if self.tau == 1:
            return keep
        columns = prompt.columns()
        forced = (columns == 0) | (columns == prompt.rows())
        for head in range(prompt.heads):
            rank = mass[head].masked_fill(forced, float("inf"))
            keep[head] = reach_share(mass[head], rank, self.tau) | forced
        return keep
