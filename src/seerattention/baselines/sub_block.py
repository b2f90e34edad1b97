"""SubBlock: mean pooling of smaller pieces, so that one strong piece is not lost in its block."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..ops.span import num_blocks
from ..policies import Policy, TopK
from .base import TrainingFree
from .checks import check_choice
from .prompt import Prompt, dot, means

REDUCTIONS = ("lse", "max")


@dataclass(frozen=True)
class SubBlock(TrainingFree, kind="sub_block", limits={"query_parts": 1, "key_parts": 1}):
    """Products of the means of pieces of blocks, reduced over the pairs of pieces of two blocks; a policy chooses.

    The rule of the sub-block router of SGLang's sparse attention for video models (no paper), made causal: a pair of
    pieces counts if the first key of the one is visible to the last query of the other. Queries and keys are those
    after RoPE; means and scores are in float32, of a partial piece over the tokens that are there. One piece each is
    mean pooling. Pieces of one token with ``lse`` give the exact logarithm of a block's sum of ``exp(scale * q . k)``.

    Attributes:
        policy: gets the scores as logits. The router keeps a fixed number of blocks, and no diagonal in particular.
        query_parts, key_parts: pieces of a block of queries, and of keys; they divide the block size.
        reduce: "lse", the log-sum-exp over pairs, as in the router, or "max", the largest.

    Raises:
        ValueError: numbers that do not divide the block size, or another reduction.
        TypeError: a policy that is none.
    """

    policy: Policy = field(default_factory=lambda: TopK(0.1))
    query_parts: int = 4
    key_parts: int = 4
    reduce: str = "lse"

    policy_required = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, parts in (("query_parts", self.query_parts), ("key_parts", self.key_parts)):
            if self.block_size % parts:
                raise ValueError(f"SubBlock: {name} must divide blocks of {self.block_size} tokens, got {parts}")
        check_choice("SubBlock", "reduce", self.reduce, REDUCTIONS)

    def score(self, prompt: Prompt) -> Tensor:
        """Logits of a sequence, float32 ``[Hq, R, N]``; -inf behind the diagonal."""
        length, size = prompt.length, self.block_size
        query_size, key_size = size // self.query_parts, size // self.key_parts
        queries = means(prompt.q, query_size, prompt.start) * prompt.scale
        keys = means(prompt.k, key_size)
        # Whole blocks of pieces: those before the first query, and behind the last token, take no part.
        front = prompt.start // query_size - prompt.first_row * self.query_parts
        back = prompt.num_rows * self.query_parts - front - queries.shape[1]
        queries = torch.nn.functional.pad(queries, (0, 0, front, back))
        keys = torch.nn.functional.pad(keys, (0, 0, 0, prompt.num_keys * self.key_parts - keys.shape[1]))
        pieces = torch.arange(queries.shape[1], device=keys.device)
        present = (pieces >= front) & (pieces < front + num_blocks(length, query_size) - prompt.start // query_size)
        last_query = ((prompt.first_row * self.query_parts + pieces + 1) * query_size).clamp(max=length) - 1
        first_key = torch.arange(keys.shape[1], device=keys.device) * key_size
        scores = torch.empty(prompt.heads, prompt.num_rows, prompt.num_keys, device=keys.device)
        for _, slots in prompt.chunks(prompt.heads * self.query_parts * keys.shape[1]):
            here = slice(slots.start * self.query_parts, slots.stop * self.query_parts)
            visible = present[here, None] & (first_key <= last_query[here, None])
            logits = dot(queries[:, here], keys).masked_fill_(~visible, -math.inf)
            pairs = logits.unflatten(2, (-1, self.key_parts)).unflatten(1, (-1, self.query_parts))
            scores[:, slots] = pairs.logsumexp((2, 4)) if self.reduce == "lse" else pairs.amax((2, 4))
        return scores
