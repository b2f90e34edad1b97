"""Oracle: selects from the true block maxima. No method that scores blocks can do better at predicting the target.

It computes the whole attention map, so it saves nothing; it is the yardstick that gates are held against.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from ..ops.indices import BlockIndices
from ..ops.pooled_attention import pooled_attention
from ..policies import Policy, Threshold
from ..selectors import LayerInputs, Selector


@dataclass(frozen=True)
class Oracle(Selector):
    """A selector that feeds the true pooled attention map (the distillation target) to a policy.

    Attributes:
        policy: turns the logarithm of the map, whose softmax is the map itself, into block indices.
        block_size: tokens a block.
    """

    policy: Policy = field(default_factory=lambda: Threshold(2e-3))
    block_size: int = 64

    kind = "oracle"

    def select(self, inputs: LayerInputs) -> BlockIndices:
        return self(inputs.q, inputs.k, layer=inputs.layer, scale=inputs.scale, lengths=inputs.lengths)

    @property
    def rowwise(self) -> bool:
        return self.policy.rowwise

    def __call__(
        self, q: Tensor, k: Tensor, *, layer: int, scale: float, lengths: Tensor | None = None
    ) -> BlockIndices:
        """The same from plain tensors: q ``[B, Hq, T, D]`` and k ``[B, Hkv, T, D]`` after RoPE, int64 lengths ``[B]``;
        ``layer`` makes no difference."""
        target = pooled_attention(q, k, block_size=self.block_size, scale=scale, lengths=lengths)
        return self.policy.select(target.log_(), block_size=self.block_size, lengths=lengths)
