"""OracleCover: few blocks, but so that every single query keeps its share of the true attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import TrainingFree
from .prompt import Prompt, dot


@dataclass(frozen=True)
class OracleCover(TrainingFree, kind="oracle_cover", limits={"p": (0, 1)}):
    """Blocks with which each query of a query block keeps at least ``p`` of its attention.

    An oracle of averages may leave one query of a block with nothing. Here the diagonal is kept first; then, as long as
    the query that keeps least has less than ``p``, the block that holds most for this query follows (of equal queries
    and blocks the first). The fewest blocks that would do are a set cover problem; this greedy answer is near it.

    It computes the whole attention map, one query block and KV head at a time, and saves nothing.

    Attributes:
        p: share of the attention of each query, in [0, 1]; 1 keeps everything.

    Raises:
        ValueError: values that are not such numbers.
    """

    p: float = 0.9

    def keep(self, prompt: Prompt) -> Tensor:
        """bool ``[Hq, R, N]``."""
        shape = prompt.heads, prompt.num_rows, prompt.num_keys
        keep = torch.ones(shape, dtype=torch.bool, device=prompt.q.device)
        if self.p == 1:
            return keep
        for slot, row in enumerate(range(prompt.first_row, prompt.num_keys)):
            keep[:, slot, : row + 1] = cover(block_masses(prompt, row), self.p)
        return keep


def block_masses(prompt: Prompt, row: int) -> Tensor:
    """Attention of each query of a query block by key block, float32 ``[Hq, m, row + 1]``, of the queries there are."""
    size = prompt.block_size
    first, end = max(row * size, prompt.start), min((row + 1) * size, prompt.length)
    positions = torch.arange(end, device=prompt.q.device)
    hidden = positions > positions[first:, None]
    group = prompt.heads // prompt.k.shape[0]
    masses = []
    for head in range(prompt.k.shape[0]):
        queries = prompt.q[head * group : (head + 1) * group, first - prompt.start : end - prompt.start].float()
        logits = dot(queries * prompt.scale, prompt.k[head : head + 1, :end].float())
        shares = logits.masked_fill_(hidden, float("-inf")).softmax(-1)
        masses.append(torch.nn.functional.pad(shares, (0, -end % size)).unflatten(-1, (-1, size)).sum(-1))
    return torch.cat(masses)


def cover(masses: Tensor, p: float) -> Tensor:
    """The blocks that :class:`OracleCover` keeps of ``masses [H, m, n]``, of which the last is the diagonal.

    Returns:
        bool ``[H, n]``.
    """
    heads = torch.arange(masses.shape[0], device=masses.device)
    keep = torch.zeros(masses.shape[0], masses.shape[2], dtype=torch.bool, device=masses.device)
    keep[:, -1] = True
    kept = masses[:, :, -1].double()
    for _ in range(masses.shape[2] - 1):
        least, query = kept.min(-1)
        short = least < p
        if not bool(short.any()):
            break
        block = masses[heads, query].masked_fill(keep, -1.0).argmax(-1)
        keep[heads, block] |= short
        kept += masses[heads, :, block] * short[:, None]
    return keep
