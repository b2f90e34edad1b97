"""FlexPrefill: each head finds out from its last queries whether it looks at places, or at what the query asks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.span import num_blocks
from .base import TrainingFree
from .checks import check_integer
from .prompt import Prompt, diagonal_sums, dot, last_softmax, means


class Probe(NamedTuple):
    """What the last queries of a sequence say of each head.

    Attributes:
        vertical, slash: float32 ``[Hq, L]``, their mean attention by key, and by distance to the query with the
            largest distance first; both sum to 1.
        query_aware: bool ``[Hq]``, whether pooled queries and keys tell well enough where the attention is.
    """

    vertical: Tensor
    slash: Tensor
    query_aware: Tensor


@dataclass(frozen=True)
class FlexPrefill(TrainingFree, kind="flexprefill", limits={"gamma": (0, 1), "tau": (0, math.inf), "min_budget": 1}):
    """Key blocks and block diagonals for some heads, the best pooled scores for the others, within shares of attention.

    FlexPrefill (arXiv 2502.20766, section 3). The probe is the attention of the last ``block_size`` queries (of a
    chunk: its last ones, at most all). Its mass by key, and by distance, is summed over blocks; the fewest single keys,
    and distances, that hold ``gamma`` of it say how many blocks of each kind to keep. A head whose pooled scores are
    within ``tau`` of the probe (square root of the Jensen-Shannon divergence of both, over key blocks) keeps the
    minimum of these, and what holds ``gamma`` of the sum of all pooled rows besides: its query blocks share one budget.

    Where the paper and the published code differ, this is the code, with two exceptions. Counts of tokens are divided
    by the block size, where the code divides by 128 for every block size. Rows of one call share a budget, so a chunk
    shares what it has. As in the code, a block diagonal r is the blocks (i, i - r), although distances of so many
    tokens reach into a neighbour, and the block that goes beyond ``gamma`` of the pooled rows is not kept. Block 0 and
    the diagonal are always kept. Sequences of at most two blocks, or of the minimum, read everything.

    Attributes:
        gamma: share of the attention to keep, in [0, 1].
        tau: largest distance at which a head counts as one that pooled scores tell; 0: none is.
        min_budget: least tokens to keep by key, and by distance.
        max_budget: most of each; None: all.

    Raises:
        ValueError: values that are not such numbers.
    """

    gamma: float = 0.9
    tau: float = 0.1
    min_budget: int = 1024
    max_budget: int | None = None

    rowwise = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_budget is not None:
            check_integer("FlexPrefill", "max_budget", self.max_budget, self.min_budget)

    def keep(self, prompt: Prompt) -> Tensor:
        """bool ``[Hq, R, N]``."""
        shape = prompt.heads, prompt.num_rows, prompt.num_keys
        least = num_blocks(self.min_budget, self.block_size)
        if prompt.num_keys <= max(2, least):
            return torch.ones(shape, dtype=torch.bool, device=prompt.q.device)
        probe = self.probe(prompt)
        return self._places(prompt, probe, least) | self._pooled(prompt, probe.query_aware)

    def probe(self, prompt: Prompt) -> Probe:
        """See :class:`Probe`."""
        attention = last_softmax(prompt, self.block_size)
        vertical, slash = attention.mean(1), diagonal_sums(attention).flip(-1) / attention.shape[1]
        query = prompt.q[:, -attention.shape[1] :].float().mean(1, keepdim=True) * prompt.scale
        guess = dot(query, means(prompt.k, self.block_size))[:, 0].softmax(-1)
        truth = block_sums(vertical, self.block_size)
        middle = (guess + truth) / 2
        divergence = (guess * (guess / middle).log() + truth * (truth / middle).log()).sum(-1) / 2
        # A probability of 0 makes NaN of this, which is not below tau: such a head looks at places.
        return Probe(vertical, slash, divergence.clamp(min=0).sqrt() < self.tau)

    def _places(self, prompt: Prompt, probe: Probe, least: int) -> Tensor:
        """Key blocks and block diagonals, bool ``[Hq, R, N]``."""
        vertical = block_sums(probe.vertical, self.block_size)
        slash = block_sums(probe.slash, self.block_size)
        vertical[:, 0], slash[:, -1] = math.inf, math.inf
        by_key = best(vertical, self._budget(probe.vertical, probe.query_aware, least))
        by_distance = best(slash, self._budget(probe.slash, probe.query_aware, least)).flip(-1)
        distance = (prompt.rows() - prompt.columns()).clamp(min=0)
        return by_key[:, None] | by_distance[:, distance]

    def _budget(self, mass: Tensor, query_aware: Tensor, least: int) -> Tensor:
        """Blocks to keep of each head, int64 ``[Hq]``, for the mass ``[Hq, L]`` of single keys or distances."""
        enough = (mass.double().sort(dim=-1, descending=True).values.cumsum(-1) <= self.gamma).sum(-1)
        most = None if self.max_budget is None else num_blocks(self.max_budget, self.block_size)
        blocks = ((enough + 1) // self.block_size + 1).clamp(min=least, max=most)
        return blocks.masked_fill(query_aware, least)

    def _pooled(self, prompt: Prompt, query_aware: Tensor) -> Tensor:
        """Best pooled scores of all rows together, bool ``[Hq, R, N]``; none for heads that look at places."""
        queries = means(prompt.q, self.block_size, prompt.start) * prompt.scale
        keys = means(prompt.k, self.block_size)
        future = prompt.columns() > prompt.rows()
        keep = torch.zeros(prompt.heads, *future.shape, dtype=torch.bool, device=future.device)
        group = prompt.heads // len(keys)
        for head in query_aware.nonzero().flatten().tolist():  # one at a time: orders take much memory
            logits = queries[head] @ keys[head // group].T
            shares = logits.masked_fill(future, -math.inf).softmax(-1).flatten()
            ordered, order = shares.sort(descending=True, stable=True)
            keep[head].view(-1)[order[ordered.double().cumsum(0) <= self.gamma * prompt.num_rows]] = True
        return keep


def block_sums(x: Tensor, block_size: int) -> Tensor:
    """``[H, L]`` summed over blocks, ``[H, N]``; the last one may be partial."""
    return torch.nn.functional.pad(x, (0, -x.shape[-1] % block_size)).unflatten(-1, (-1, block_size)).sum(-1)


def best(values: Tensor, count: Tensor) -> Tensor:
    """The ``count [H]`` largest of ``values [H, N]``, bool ``[H, N]``; of equal ones the earlier."""
    order = values.sort(dim=-1, descending=True, stable=True).indices
    wanted = torch.arange(values.shape[-1], device=values.device) < count[:, None]
    return torch.zeros_like(wanted).scatter_(-1, order, wanted)
