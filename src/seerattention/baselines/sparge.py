"""SpargeAttention's rule: mean pooling, trusted only where the tokens of a block are alike."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from .base import TrainingFree
from .prompt import Prompt, dot, means


@dataclass(frozen=True)
class Sparge(TrainingFree, kind="sparge", limits={"tau": (0, 1), "theta": (-1, 1)}):
    """Mean pooling for blocks of tokens that are alike, and everything that concerns the others.

    SpargeAttention (arXiv 2502.18137, the first of its two stages; the published code). The *self-similarity* of a
    block is the mean cosine of all pairs of its tokens, of keys after the mean of all keys is taken away. Where it is
    not above ``theta``, a mean says little of the block: such a block of keys is read by every row, such a block of
    queries reads everything. Of the other key blocks a row takes the largest of the softmax of
    ``scale * mean(q) . mean(k)`` over these, as long as their sum is not above ``tau``, and one at least: the block
    that goes beyond ``tau`` is not kept.

    The publication has blocks of 128 queries and 64 keys, and its kernel skips more products on the way, when it finds
    them small. Its numbers are tuned for each head; here one pair serves all. The diagonal is kept, too.

    Attributes:
        tau: most of the softmax to keep, from 0 (the best block) to 1 (everything); the default of the published code.
        theta: self-similarity above which a block is trusted; it is never negative, so -1 trusts all.

    Raises:
        ValueError: values that are not such numbers.
    """

    tau: float = 0.98
    theta: float = 0.6

    @property
    def rowwise(self) -> bool:
        """The mean of all keys is one of the whole prompt."""
        return self.theta < 0

    def keep(self, prompt: Prompt) -> Tensor:
        """bool ``[Hq, R, N]``."""
        size, group = self.block_size, prompt.heads // prompt.k.shape[0]
        keys = prompt.k.float()
        logits = dot(means(prompt.q, size, prompt.start) * prompt.scale, means(keys, size))
        keep = torch.ones_like(logits, dtype=torch.bool)
        if self.tau == 1:
            return keep
        smooth = keys - keys.mean(1, keepdim=True)
        doubted_keys = (similarity(smooth, size) <= self.theta).repeat_interleave(group, 0)
        doubted_queries = similarity(prompt.q, size, prompt.start) <= self.theta
        future = prompt.columns() > prompt.rows()
        for head in range(prompt.heads):  # one at a time: orders and sums in 64 bits take much memory
            hidden = future | doubted_keys[head]
            # A row without a block to trust is NaN: nothing is chosen, as it reads all of them anyway.
            shares = logits[head].masked_fill(hidden, float("-inf")).softmax(-1).nan_to_num(nan=0.0)
            ordered, order = shares.double().sort(dim=-1, descending=True, stable=True)
            count = (ordered.cumsum(-1) <= self.tau).sum(-1, keepdim=True).clamp(min=1)
            chosen = torch.zeros_like(future).scatter_(-1, order, prompt.columns() < count)
            keep[head] = chosen | doubted_keys[head] | doubted_queries[head][:, None]
        return keep


def similarity(x: Tensor, size: int, start: int = 0) -> Tensor:
    """Mean cosine of all pairs of tokens of each block, each with itself too; ``x [H, T, D]`` -> float32 ``[H, n]``.

    That is the squared length of the mean of the tokens' directions. ``start``: position of the first token.
    """
    return means(normalize(x.float(), dim=-1), size, start).square().sum(-1).clamp(max=1.0)
