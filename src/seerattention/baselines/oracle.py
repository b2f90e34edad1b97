"""Oracle: selects from the true block maxima. No method that scores blocks can do better at predicting the target.

It computes the whole attention map, so it saves nothing; it is the yardstick that gates are held against.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from ..ops.indices import BlockIndices
from ..ops.pooled_attention import pooled_attention
from ..policies import Policy, Threshold


@dataclass(frozen=True)
class Oracle:
    """A selector that feeds the true pooled attention map (the distillation target) to a policy.

    Attributes:
        policy: turns the logarithm of the map, whose softmax is the map itself, into block indices.
        block_size: tokens a block.
    """

    policy: Policy = field(default_factory=lambda: Threshold(2e-3))
    block_size: int = 64

    def __call__(
        self, q: Tensor, k: Tensor, *, layer: int, scale: float, lengths: Tensor | None = None
    ) -> BlockIndices:
        """See :class:`seerattention.baselines.Selector`; ``layer`` makes no difference."""
        target = pooled_attention(q, k, block_size=self.block_size, scale=scale, lengths=lengths)
        return self.policy.select(target.log_(), block_size=self.block_size, lengths=lengths)
