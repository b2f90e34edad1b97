"""Oracle: selects from the true attention map. No method that scores blocks can do better at predicting it.

It computes the whole attention map, so it saves nothing; it is the yardstick that gates are held against.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from ..ops.indices import BlockIndices
from ..ops.pooled_attention import pooled_attention
from ..policies import Policy, Threshold
from ..selectors import LayerInputs, Selector
from .checks import check_choice

_REDUCTIONS = {"max": "max", "mass": "sum", "row_mass": "row_sum"}


@dataclass(frozen=True)
class Oracle(Selector):
    """A selector that feeds the true pooled attention map to a policy.

    Attributes:
        policy: turns the logarithm of the map, whose softmax is the map itself, into block indices.
        block_size: tokens a block.
        reduce: what the map holds of a tile. "max": the largest probability, the distillation target of gates
            (SeerAttention, arXiv 2410.13276, section 3.2), of which no method that scores blocks can predict more.
            "mass": the sum of all probabilities over the number of queries, so that ``TopP(p)`` keeps p of the
            attention of the queries of a block on average. The logarithm of the mass without the normalisation of each
            query is ``SubBlock`` with as many parts as tokens. "row_mass": the largest mass that one query of the block
            gives to the tile, the target of gates of ``DistillConfig(target="row_mass")``; it is not in the paper.

    Raises:
        ValueError: another reduction.
    """

    policy: Policy = field(default_factory=lambda: Threshold(2e-3))
    block_size: int = 64
    reduce: str = "max"

    kind = "oracle"
    takes_chunks = True

    def __post_init__(self) -> None:
        check_choice("Oracle", "reduce", self.reduce, tuple(_REDUCTIONS))

    def select(self, inputs: LayerInputs) -> BlockIndices:
        span = inputs.span
        if span is None:
            return self(inputs.q, inputs.k, layer=inputs.layer, scale=inputs.scale, lengths=inputs.lengths)
        return self.policy.of_layer(inputs.layer).select(self.scores(inputs), block_size=self.block_size, span=span)

    def scores(self, inputs: LayerInputs) -> Tensor:
        """Logarithm of the map."""
        how = {"span": inputs.span} if inputs.span is not None else {"lengths": inputs.lengths}
        reduce, size = _REDUCTIONS[self.reduce], self.block_size
        return pooled_attention(inputs.q, inputs.k, block_size=size, scale=inputs.scale, reduce=reduce, **how).log_()

    @property
    def rowwise(self) -> bool:
        return self.policy.rowwise

    def __call__(
        self, q: Tensor, k: Tensor, *, layer: int, scale: float, lengths: Tensor | None = None
    ) -> BlockIndices:
        """The same from plain tensors: q ``[B, Hq, T, D]`` and k ``[B, Hkv, T, D]`` after RoPE, int64 lengths ``[B]``;
        ``layer`` matters to policies that are not the same in all of them."""
        reduce = _REDUCTIONS[self.reduce]
        target = pooled_attention(q, k, block_size=self.block_size, scale=scale, lengths=lengths, reduce=reduce)
        return self.policy.of_layer(layer).select(target.log_(), block_size=self.block_size, lengths=lengths)
