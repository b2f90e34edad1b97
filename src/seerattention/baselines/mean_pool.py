"""MeanPool: a block is as good as the mean of its keys (the training-free form of the MoBA gate)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..policies import Policy, TopK
from .base import TrainingFree
from .prompt import Prompt, dot, means


@dataclass(frozen=True)
class MeanPool(TrainingFree, kind="mean_pool"):
    """Scores are products of mean keys of blocks with queries, and a policy chooses.

    MoBA (arXiv 2502.13189, section 2.2) has one choice for each query token and trains the model with it. A block of
    queries has one choice here, and nothing is trained. Means are those of keys and queries after RoPE, in float32; of
    a partial block, those of the tokens that are there.

    Attributes:
        policy: gets ``scale * mean(q) . mean(k)`` as logits, or the maximum over the block's queries, see below.
        pool_queries: True: the queries of a block are averaged too. False: the block scores as for the query that
            likes it most.

    Raises:
        TypeError: a policy that is none, or a ``pool_queries`` that is not a bool.
        ValueError: another block size than the attention has.
    """

    policy: Policy = field(default_factory=lambda: TopK(0.1))
    pool_queries: bool = True

    policy_required = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.pool_queries, bool):
            raise TypeError(f"MeanPool: pool_queries must be True or False, got {self.pool_queries!r}")

    def score(self, prompt: Prompt) -> Tensor:
        """Logits of a sequence, float32 ``[Hq, R, N]``."""
        keys = means(prompt.k, self.block_size)
        if self.pool_queries:
            return dot(means(prompt.q, self.block_size, prompt.start) * prompt.scale, keys)
        scores = torch.empty(prompt.heads, prompt.num_rows, prompt.num_keys, device=keys.device)
        for blocks, slots in prompt.chunks(prompt.heads * self.block_size * prompt.num_keys):
            queries, present = prompt.queries(blocks)
            logits = dot(queries, keys).masked_fill_(~present[:, None], float("-inf"))
            scores[:, slots] = logits.unflatten(1, (-1, self.block_size)).amax(2)
        return scores
