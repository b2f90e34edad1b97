"""FlashPrefill, second version: energies shared by the query heads of a KV head, and a correction for what is left."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from ..ops.block_sparse_attention.mean_correction import mean_corrected_attention
from ..ops.indices import BlockIndices
from ..policies import Policy
from ..selectors import LayerInputs
from .base import TrainingFree
from .prompt import Prompt, dot, means


@dataclass(frozen=True)
class FlashPrefillV2(
    TrainingFree,
    kind="flashprefill_v2",
    limits={
        "alpha": (0, 1), "sink_blocks": 0, "window_blocks": 0, "last_blocks_dense": 0, "first_layers_dense": 0,
    },
):  # fmt: skip
    """Energies of blocks, summed over a query block and the query heads of a KV head, which share one list.

    FlashPrefill V2 (arXiv 2608.19758; the rule of the published code). The energy of a block is the sum of
    ``exp(scale * q . mean(k))`` over the queries of all heads of the group in the query block. Blocks that are complete
    by the last of these queries have one; a partial last block has none. Kept are those of at least ``alpha`` times the
    largest energy of the row, the first ones, and the latest ones, the diagonal among them.

    Published are row tiles of 128 pairs of query and head (32 positions where four heads share a KV head) and key
    blocks of 128 tokens; here the queries of a block and the keys of a block are equally many. The numbers of first and
    latest blocks are those of blocks of 128.

    Attributes:
        alpha: least share of the largest energy of the row, from 0 (everything) to 1; published 0.1 for every model.
        sink_blocks: first blocks that are always kept.
        window_blocks: latest blocks that are always kept, the diagonal among them.
        last_blocks_dense: the last this many query blocks read everything. Published: two row tiles, in the recipe
            eight.
        first_layers_dense: layers of a smaller index than this read everything; the published recipe has four.
        mean_correction: attention is :func:`~seerattention.ops.mean_corrected_attention`: each block that is left out
            stands in as its mean, as in the published kernel. This is another attention than that of all other
            selectors, it reads every key once more, and tables mark it. Densities are of what is read as it is.
        policy: chooses instead, with the logarithm of the energy as logits; ``alpha`` and the numbers of first, latest
            and last blocks, and of layers, then make no difference.

    Raises:
        ValueError: values that are not such numbers.
        TypeError: a policy that is none, or a ``mean_correction`` that is not a bool.
    """

    alpha: float = 0.1
    sink_blocks: int = 2
    window_blocks: int = 4
    last_blocks_dense: int = 0
    first_layers_dense: int = 0
    mean_correction: bool = False
    policy: Policy | None = None

    lists_per_kv_head = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.mean_correction, bool):
            raise TypeError(f"FlashPrefillV2: mean_correction must be True or False, got {self.mean_correction!r}")

    @property
    def attention(self) -> str:
        return "+ mean correction" if self.mean_correction else ""

    def attend(self, inputs: LayerInputs, blocks: BlockIndices) -> Tensor | None:
        if not self.mean_correction:
            return None
        return cast(Tensor, mean_corrected_attention(inputs.q, inputs.k, inputs.v, blocks, scale=inputs.scale))

    def score(self, prompt: Prompt) -> Tensor:
        """Logarithm of the energy of each block, float32 ``[Hkv, R, N]``; -inf of blocks that have none."""
        keys = means(prompt.k, self.block_size)
        kv_heads, num_keys = keys.shape[:2]
        energy = torch.empty(kv_heads, prompt.num_rows, num_keys, device=keys.device)
        for blocks, slots in prompt.chunks(prompt.heads * self.block_size * num_keys):
            queries, present = prompt.queries(blocks)
            logits = dot(queries, keys).masked_fill_(~present[:, None], -math.inf)
            # [Hkv, G, rows, tokens, N]: one sum over heads and tokens
            tiles = logits.unflatten(1, (-1, self.block_size)).unflatten(0, (kv_heads, -1))
            energy[:, slots] = tiles.logsumexp((1, 3))
        end = ((prompt.rows() + 1) * self.block_size).clamp(max=prompt.length)  # behind the last query of each row
        complete = (prompt.columns() + 1) * self.block_size <= end
        return energy.masked_fill_(~complete, -math.inf)

    def keep(self, prompt: Prompt) -> Tensor:
        """bool ``[Hkv, R, N]``."""
        rows, columns = prompt.rows(), prompt.columns()
        always = (columns < self.sink_blocks) | (rows - columns < self.window_blocks)
        always |= rows >= prompt.num_keys - self.last_blocks_dense
        if prompt.layer < self.first_layers_dense:
            always = torch.ones_like(always)
        energy = self.score(prompt)
        least = energy.amax(-1, keepdim=True) + (math.log(self.alpha) if self.alpha else -math.inf)
        return always | (energy >= least)
