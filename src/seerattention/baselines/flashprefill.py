"""FlashPrefill, first version: each query against mean keys, and the blocks that come near the best one."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..policies import Policy
from .base import TrainingFree
from .prompt import Prompt, dot, means


@dataclass(frozen=True)
class FlashPrefill(
    TrainingFree,
    kind="flashprefill",
    limits={"alpha": (0, 1), "sink_blocks": 0, "window_blocks": 0, "last_blocks_dense": 0},
):
    """Energies of blocks, and those of at least ``alpha`` times the largest, with the first and the latest blocks.

    FlashPrefill (arXiv 2603.06199; the rule of the published code, which uses all queries where the paper speaks of a
    sample). The energy of a block is the sum of ``exp(scale * q . mean(k))`` over the queries of the query block that
    see all of the key block; in the diagonal block that is its last query alone. Nothing is normalised for each query,
    so one with large logits decides for its block. Only ratios within a row matter. Tokens of padding take no part,
    unlike in the published code.

    The numbers of first and latest blocks are those of the publication, whose blocks have 128 tokens; there, the last
    two query blocks also read everything (``last_blocks_dense=2``).

    Attributes:
        alpha: least share of the largest energy of the row, from 0 (everything) to 1; published 0.18 for Llama and
            0.08 to 0.12 for Qwen.
        sink_blocks: first blocks that are always kept.
        window_blocks: latest blocks that are always kept, the diagonal among them.
        last_blocks_dense: the last this many query blocks read everything.
        policy: chooses instead, with the logarithm of the energy as logits; the four above then make no difference.

    Raises:
        ValueError: values that are not such numbers.
        TypeError: a policy that is none.
    """

    alpha: float = 0.18
    sink_blocks: int = 2
    window_blocks: int = 4
    last_blocks_dense: int = 0
    policy: Policy | None = None

    def score(self, prompt: Prompt) -> Tensor:
        """Logarithm of the energy of each block, float32 ``[Hq, R, N]``; -inf where no query sees all of a block."""
        return log_energies(prompt, means(prompt.k, self.block_size))

    def keep(self, prompt: Prompt) -> Tensor:
        """bool ``[Hq, R, N]``."""
        rows, columns = prompt.rows(), prompt.columns()
        always = (columns < self.sink_blocks) | (rows - columns < self.window_blocks)
        always |= rows >= prompt.num_keys - self.last_blocks_dense
        energy = self.score(prompt)
        least = energy.amax(-1, keepdim=True) + (math.log(self.alpha) if self.alpha else -math.inf)
        return always | (energy >= least)


def log_energies(prompt: Prompt, keys: Tensor, bonus: Tensor | None = None) -> Tensor:
    """Logarithm of the sum of ``exp(logit)`` over the queries of a query block that see all of a key block.

    Args:
        prompt: one sequence.
        keys: one key for each block, float32 ``[Hkv, N, D]``.
        bonus: ``[Hkv, N]``, times the length of a query and the softmax scale added to its logit.

    Returns:
        float32 ``[Hq, R, N]``; -inf where no query sees all of a block.
    """
    size = prompt.block_size
    # The last block may be partial: its last key is the last of all.
    last_key = ((prompt.columns() + 1) * size).clamp(max=prompt.length) - 1
    energy = torch.empty(prompt.heads, prompt.num_rows, prompt.num_keys, device=keys.device)
    for blocks, slots in prompt.chunks(prompt.heads * size * prompt.num_keys):
        queries, present = prompt.queries(blocks)
        first = blocks.start * size
        positions = torch.arange(first, first + len(present), device=keys.device)[:, None]
        counts = present[:, None] & (positions >= last_key)
        logits = dot(queries, keys)
        if bonus is not None:
            logits += dot(queries.norm(dim=-1, keepdim=True), bonus[..., None])
        energy[:, slots] = logits.masked_fill_(~counts, -math.inf).unflatten(1, (-1, size)).logsumexp(2)
    return energy
