"""OracleCover: few blocks, but so that every single query keeps its share of the true attention."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import TrainingFree
from .prompt import Prompt, dot

# Numbers that are held at once of what queries give to blocks: 2^27 of float32 are 512 MiB.
_MOST_MASSES = 1 << 27


@dataclass(frozen=True)
class OracleCover(TrainingFree, kind="oracle_cover", limits={"p": (0, 1)}):
    """Blocks with which each query of a query block keeps at least ``p`` of its attention.

    An oracle of averages may leave one query of a block with nothing. Here the diagonal is kept first; then, as long as
    the query that keeps least has less than ``p``, the block that holds most for this query follows (of equal queries
    and blocks the first). The fewest blocks that would do are a set cover problem; this greedy answer is near it.

    It computes the whole attention map and saves nothing.

    Attributes:
        p: share of the attention of each query, in [0, 1]; 1 keeps everything.

    Raises:
        ValueError: values that are not such numbers.
    """

    p: float = 0.9

    def keep(self, prompt: Prompt) -> Tensor:
        """bool ``[Hq, R, N]``."""
        if self.p == 1:
            shape = prompt.heads, prompt.num_rows, prompt.num_keys
            return torch.ones(shape, dtype=torch.bool, device=prompt.q.device)
        together = max(1, _MOST_MASSES // (prompt.heads * prompt.block_size * prompt.num_keys))
        found = []
        for first in range(prompt.first_row, prompt.num_keys, together):
            rows = range(first, min(first + together, prompt.num_keys))
            found.append(cover(block_masses(prompt, rows), self.p, first))
        return torch.cat(found, 1)


def block_masses(prompt: Prompt, rows: range) -> Tensor:
    """Attention of each query of these query blocks by key block, float32 ``[Hq, rows, m, N]``.

    Queries that are not there, before the first one and behind the last, give infinity to every block.
    """
    size, group = prompt.block_size, prompt.heads // prompt.k.shape[0]
    keys = torch.arange(prompt.length, device=prompt.q.device)
    masses = prompt.q.new_zeros((prompt.heads, len(rows), size, prompt.num_keys), dtype=torch.float32)
    for blocks, _ in prompt.chunks(group * size * prompt.length):
        blocks = range(max(blocks.start, rows.start), min(blocks.stop, rows.stop))
        if not blocks:
            continue
        queries, present = prompt.queries(blocks)
        positions = blocks.start * size + torch.arange(len(present), device=keys.device)
        hidden = keys > positions[:, None]
        for head in range(prompt.k.shape[0]):
            mine = slice(head * group, (head + 1) * group)
            logits = dot(queries[mine], prompt.k[head : head + 1].float())
            shares = logits.masked_fill_(hidden, -math.inf).softmax(-1)
            shares = torch.nn.functional.pad(shares, (0, -prompt.length % size)).unflatten(-1, (-1, size)).sum(-1)
            shares.masked_fill_(~present[:, None], math.inf)
            slots = slice(blocks.start - rows.start, blocks.stop - rows.start)
            masses[mine, slots] = shares.unflatten(1, (len(blocks), size))
    return masses


def cover(masses: Tensor, p: float, first: int) -> Tensor:
    """The blocks that :class:`OracleCover` keeps of ``masses [H, R, m, N]``, whose rows are those from ``first`` on.

    Returns:
        bool ``[H, R, N]``.
    """
    heads, rows, _, columns = masses.shape
    diagonal = first + torch.arange(rows, device=masses.device)
    blocks = torch.arange(columns, device=masses.device)
    keep = (blocks == diagonal[:, None]).expand(heads, -1, -1).contiguous()
    out = (blocks > diagonal[:, None]) | keep  # what cannot be chosen: the future, and what is kept already

    def of_block(block: Tensor) -> Tensor:
        """What the queries give to one block of each row: ``[H, R]`` to ``[H, R, m]``."""
        return masses.gather(3, block[..., None, None].expand(-1, -1, masses.shape[2], 1))[..., 0]

    kept = of_block(diagonal.expand(heads, -1)).double()
    for _ in range(first + rows - 1):
        least, query = kept.min(-1)
        short = (least < p) & ~out.all(-1)
        if not bool(short.any()):
            break
        wanted = masses.gather(2, query[..., None, None].expand(-1, -1, 1, columns))[:, :, 0]
        block = wanted.masked_fill(out, -1.0).argmax(-1)
        chosen = (blocks == block[..., None]) & short[..., None]
        keep |= chosen
        out |= chosen
        kept += of_block(block).where(short[..., None], 0.0)  # of what is not there: infinity
    return keep
