"""Policies that look at the scores of a row: thresholds, shares, budgets of tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..ops.block_selection import dense_indices, select_threshold, select_topk, select_topp
from ..ops.block_selection.interface import select_counted
from ..ops.block_selection.shares import CEIL_SLACK, number_of_blocks, share_of, share_of_causal
from ..ops.indices import BlockIndices
from ..ops.span import Span
from .by_layer import ByLayer
from .policy import MOST_TOKENS, How, Policy, ScorePolicy, check_count, check_number, check_share

__all__ = ["Dense", "PublishedDecode", "RelativeThreshold", "Threshold", "TokenBudget", "TopK", "TopP"]

_MOST_BLOCKS = 1 << 20  # of a row


@dataclass(frozen=True)
class Threshold(ScorePolicy):
    """Keep the blocks whose softmax probability is strictly above ``threshold`` (SeerAttention paper, section 3.3).

    The density follows from the scores and falls with the length of the prompt: probabilities of a row sum to 1.

    Attributes:
        threshold: probability in [0, 1).
        last_blocks_dense: the last this many query blocks of each sequence read everything.
    """

    threshold: float
    last_blocks_dense: int = 0
    kind: ClassVar[str] = "threshold"

    def __post_init__(self) -> None:
        check_number("Threshold", "threshold", self.threshold)
        if not 0 <= self.threshold < 1:
            raise ValueError(f"threshold is a probability and must lie in [0, 1), got {self.threshold}")
        check_count("last_blocks_dense", self.last_blocks_dense)

    def _select(self, logits: Tensor, how: How) -> BlockIndices:
        return select_threshold(logits, self.threshold, softmax=True, **how)


@dataclass(frozen=True)
class RelativeThreshold(ByLayer):
    """Keep the blocks that get more than ``factor`` times what uniform attention would give them.

    A row that may see n blocks keeps those of softmax probability above ``factor / n``: rows and heads whose attention
    is spread out get more blocks than others, and the density falls less with the length than under a plain threshold.
    Short rows, which cost little, read everything; the sink is always kept.

    Attributes:
        factor: at least 0; 2 keeps about a tenth of the blocks, 1 a sixth (docs/experiments.md).
        min_blocks: a row keeps at least so many blocks, its best ones.
        first_blocks: the first this many blocks, the attention sink, are kept by every row.
        dense_rows: rows that may see at most so many blocks read them all.
        last_blocks_dense: the last this many query blocks of each sequence read everything.
        exponent: how much the number of blocks counts, from 0 to 1: those above ``factor / n**exponent`` are kept. At 0
            all rows have the same threshold, and among those of one prompt late ones get fewer blocks.
        layers: what the factor is multiplied by in each layer of the model (:class:`ByLayer`); (): the same in all.
    """

    factor: float
    min_blocks: int = 4
    first_blocks: int = 1
    dense_rows: int = 16
    last_blocks_dense: int = 0
    exponent: float = 1.0
    layers: tuple[float, ...] = field(default=(), repr=False)
    kind: ClassVar[str] = "relative_threshold"

    def __post_init__(self) -> None:
        check_number("RelativeThreshold", "factor", self.factor)
        if self.factor < 0:
            raise ValueError(f"factor must be 0 or more, got {self.factor}")
        for name in ("min_blocks", "first_blocks", "dense_rows", "last_blocks_dense"):
            check_count(name, getattr(self, name))
        check_number("RelativeThreshold", "exponent", self.exponent)
        if not 0 <= self.exponent <= 1:
            raise ValueError(f"exponent must lie in [0, 1], got {self.exponent}")
        if self.layers and self.factor == 0:
            raise ValueError("a factor of 0 keeps everything in all layers; leave layers out")
        self._set_layers()

    def to_dict(self) -> dict[str, Any]:
        """As other policies, without an exponent of 1: it came later, and results are found again by what they say."""
        told = super().to_dict()
        if told["exponent"] == 1:
            del told["exponent"]
        return told

    def factor_of(self, blocks: float) -> float:
        """What uniform attention is multiplied by in a row that may see so many blocks."""
        return float(self.factor * blocks ** (1 - self.exponent))

    def _select(self, logits: Tensor, how: How) -> BlockIndices:
        if self.exponent < 1 and self.factor > 0:
            return self._rules[0]._select(logits, how)
        return select_threshold(logits, self.factor, softmax=True, relative=True, **{**dict(self._floors()), **how})

    def _curve(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        ends = (1.0, float(_MOST_BLOCKS))
        return ends, tuple(self.factor_of(n) for n in ends)

    def _floors(self) -> tuple[tuple[str, int], ...]:
        return tuple((name, getattr(self, name)) for name in ("min_blocks", "first_blocks", "dense_rows"))


@dataclass(frozen=True)
class TopK(ScorePolicy):
    """Keep a fixed share of the causal blocks of each row.

    Row i, counted from 0, keeps ``max(1, ceil(density * (i + 1)))`` blocks, the diagonal among them.

    Attributes:
        density: share of the causal blocks to keep, in (0, 1].
        last_blocks_dense: the last this many query blocks of each sequence read everything.
        uniform: the rule of the published code (``nz_ratio``) instead: every row keeps the same
            ``max(1, int((1 - sqrt(1 - density)) * n))`` best of n key blocks, and the diagonal where it is not
            among them.
    """

    density: float
    last_blocks_dense: int = 0
    uniform: bool = False
    kind: ClassVar[str] = "top_k"

    def __post_init__(self) -> None:
        check_share("TopK", "density", self.density, "the share of causal blocks to keep")
        check_count("last_blocks_dense", self.last_blocks_dense)
        if not isinstance(self.uniform, bool):
            raise TypeError(f"uniform must be True or False, got {self.uniform!r}")

    @property
    def rowwise(self) -> bool:
        return super().rowwise and not self.uniform  # which counts all blocks of the sequence

    def _select(self, logits: Tensor, how: How) -> BlockIndices:
        if self.density == 1:
            return Dense().select(logits, block_size=how["block_size"], lengths=how["lengths"], span=how["span"])
        num_rows, num_keys = logits.shape[-2:]
        block_size, lengths, span = how["block_size"], how["lengths"], how["span"]
        differ = span is not None and not span.plain
        if self.uniform:
            # n counts the blocks of each sequence's own content, so padding does not change what it keeps.
            share = 1.0 - math.sqrt(1.0 - self.density)
            longest = max(1, int(share * num_keys))
            ends = span.ends() if span is not None and differ else lengths
            if ends is None:
                keep = number_of_blocks(longest, num_rows, logits.device)
            else:
                blocks = (ends + (block_size - 1)) // block_size
                keep = (blocks.double() * share).long().clamp(min=1)[:, None].expand(-1, num_rows)
            capacity, differ = longest + 1, ends is not None
        else:
            if span is not None and differ:
                keep = share_of(self.density, span.row_blocks(block_size) + 1)
            else:
                keep = share_of_causal(self.density, num_rows, num_keys, logits.device)
            capacity = max(1, math.ceil(num_keys * self.density - CEIL_SLACK))  # what the last row keeps
        if not differ:
            return select_counted(logits, keep, diagonal_extra=self.uniform, capacity=capacity, **how)
        return select_topk(logits, keep, diagonal_extra=self.uniform, capacity=capacity, **how)


@dataclass(frozen=True)
class TopP(ScorePolicy):
    """Keep the diagonal and the fewest best other blocks with which the softmax probabilities sum to at least ``p``.

    Attributes:
        p: probability mass in (0, 1]; 1 keeps every causal block.
        last_blocks_dense: the last this many query blocks of each sequence read everything.
    """

    p: float
    last_blocks_dense: int = 0
    kind: ClassVar[str] = "top_p"

    def __post_init__(self) -> None:
        check_share("TopP", "p", self.p, "a probability mass")
        check_count("last_blocks_dense", self.last_blocks_dense)

    def _select(self, logits: Tensor, how: How) -> BlockIndices:
        return select_topp(logits, self.p, softmax=True, **how)


@dataclass(frozen=True)
class TokenBudget(ScorePolicy):
    """Keep the best ``ceil(tokens / block_size)`` blocks of each row, the diagonal among them.

    Attributes:
        tokens: keys that a query block may read, at least 1.
        last_blocks_dense: the last this many query blocks of each sequence read everything.
    """

    tokens: int
    last_blocks_dense: int = 0
    kind: ClassVar[str] = "token_budget"

    def __post_init__(self) -> None:
        if isinstance(self.tokens, bool) or not isinstance(self.tokens, int) or not 1 <= self.tokens <= MOST_TOKENS:
            raise ValueError(f"tokens must be an integer from 1 to {MOST_TOKENS}, got {self.tokens!r}")
        check_count("last_blocks_dense", self.last_blocks_dense)

    def _select(self, logits: Tensor, how: How) -> BlockIndices:
        num_rows, num_keys = logits.shape[-2:]
        blocks = min(-(-self.tokens // how["block_size"]), num_keys)
        return select_counted(logits, number_of_blocks(blocks, num_rows, logits.device), capacity=blocks, **how)


@dataclass(frozen=True)
class Dense(Policy):
    """Keep every causal block: the result is that of dense attention."""

    kind: ClassVar[str] = "dense"

    def select(
        self, logits: Tensor, *, block_size: int, lengths: Tensor | None = None, span: Span | None = None
    ) -> BlockIndices:
        return dense_indices(*logits.shape, block_size=block_size, lengths=lengths, device=logits.device, span=span)


@dataclass(frozen=True)
class PublishedDecode(Policy):
    """What the published code of SeerAttention-R (arXiv 2506.08889) reads in decoding, to compare with it.

    It differs from :class:`TokenBudget` and :class:`Threshold` in two things. The open block, which has no score
    (-inf), takes part with a score of 0: in the softmax, and for one of the places of the budget; it is read besides
    where it wins none. And the first block is always read.

    Attributes:
        tokens: keeps the best ``tokens // block_size`` blocks, one at least. None: by threshold.
        threshold: keeps the blocks whose softmax probability is strictly above it, in [0, 1). None: by tokens.
        first_block: read the first block; False gives the mask of the published gate, to which the published kernel
            adds that block.
    """

    tokens: int | None = None
    threshold: float | None = None
    first_block: bool = True
    kind: ClassVar[str] = "published_decode"

    def __post_init__(self) -> None:
        if (self.tokens is None) == (self.threshold is None):
            raise ValueError(f"PublishedDecode needs tokens or a threshold, got {self.tokens} and {self.threshold}")
        if self.tokens is not None:
            TokenBudget(self.tokens)
        if self.threshold is not None:
            Threshold(self.threshold)
        if not isinstance(self.first_block, bool):
            raise TypeError(f"first_block must be True or False, got {self.first_block!r}")

    def select(
        self, logits: Tensor, *, block_size: int, lengths: Tensor | None = None, span: Span | None = None
    ) -> BlockIndices:
        logits = logits.masked_fill(logits == -math.inf, 0.0)  # what lies above the diagonal is ignored anyway
        how: How = {"block_size": block_size, "lengths": lengths, "span": span}
        if self.tokens is None:
            assert self.threshold is not None
            return select_threshold(logits, self.threshold, softmax=True, first_blocks=int(self.first_block), **how)
        best = max(1, self.tokens // block_size)
        keep = torch.full((logits.shape[-2],), best, dtype=torch.int64, device=logits.device)
        chosen = select_topk(logits, keep, diagonal_extra=True, capacity=best + 1, **how)
        if not self.first_block:
            return chosen
        mask = chosen.to_mask()
        mask[..., :1] |= mask.any(-1, keepdim=True)  # rows without a query stay empty
        return BlockIndices.from_mask(mask, block_size, span=chosen.span)
