"""XAttention: a block is as good as the attention along the antidiagonals of its small tiles."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..policies import Policy
from .base import TrainingFree
from .prompt import Prompt, dot


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
        if self.block_size % self.stride:
            raise ValueError(f"XAttention: a stride of {self.stride} does not divide blocks of {self.block_size}")

    def score(self, prompt: Prompt) -> Tensor:
        """Logarithm of the mass of each block, float32 ``[Hq, R, N]``."""
        return self.mass(prompt).log()

    def mass(self, prompt: Prompt) -> Tensor:
        """Mass of each block, float32 ``[Hq, R, N]``; a row sums to its number of tiles with a query."""
        tiles = self.block_size // self.stride  # of a block, on each side
        keys = torch.nn.functional.pad(prompt.k.float(), (0, 0, 0, -prompt.length % self.block_size))
        keys = keys.unflatten(1, (-1, self.stride)).flatten(2)  # [Hkv, N * tiles, stride * D]
        column = torch.arange(keys.shape[1], device=keys.device)
        mass = torch.zeros(prompt.heads, prompt.num_rows, prompt.num_keys, device=keys.device)
        for blocks, slots in prompt.chunks(prompt.heads * tiles * keys.shape[1]):
            queries, present = prompt.queries(blocks)
            queries = queries.unflatten(1, (-1, self.stride)).flip(2).flatten(2)
            end = blocks.stop * tiles
            logits = dot(queries, keys[:, :end]) / self.stride
            row = column[blocks.start * tiles : end, None]
            shares = logits.masked_fill_(column[:end] > row, float("-inf")).softmax(-1)
            shares *= present.view(-1, self.stride).any(-1)[:, None]
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
        for head in range(prompt.heads):  # one at a time: orders and sums in 64 bits take much memory
            order = mass[head].masked_fill(forced, float("inf")).sort(dim=-1, descending=True, stable=True).indices
            ordered = mass[head].gather(-1, order).double()
            before = ordered.cumsum(-1) - ordered
            wanted = before < self.tau * ordered.sum(-1, keepdim=True)
            keep[head] = torch.zeros_like(forced).scatter_(-1, order, wanted) | forced
        return keep
