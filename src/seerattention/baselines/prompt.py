"""One sequence of a batch as training-free selectors see it, and the way from their answers to block lists.

A selector here answers for one sequence at a time: its content without padding, queries that are the last of its keys.
Padding, chunks, packed rows and pages are taken care of in this file. Lengths are read from the device, which waits
for it; these selectors are yardsticks, not kernels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops.indices import BlockIndices
from ..ops.span import LENGTH, START, Span, num_blocks
from ..policies import Policy
from ..selectors import LayerInputs

# Scores that a selector holds at once: 2^24 of float32 are 64 MiB.
MOST_SCORES = 1 << 24


@dataclass(frozen=True)
class Prompt:
    """The content of one sequence in one layer; its T queries are the last of L positions.

    Attributes:
        layer: index of the layer.
        q: ``[Hq, T, D]`` after RoPE, T at least 1.
        k: ``[Hkv, L, D]`` after RoPE.
        scale: softmax scale.
        block_size: tokens a block. Blocks are cut from position 0 on.
    """

    layer: int
    q: Tensor
    k: Tensor
    scale: float
    block_size: int

    @property
    def heads(self) -> int:
        """Hq."""
        return self.q.shape[0]

    @property
    def length(self) -> int:
        """L, the number of keys."""
        return self.k.shape[1]

    @property
    def start(self) -> int:
        """Position of the first query."""
        return self.length - self.q.shape[1]

    @property
    def first_row(self) -> int:
        """Query block that holds the first query."""
        return self.start // self.block_size

    @property
    def num_keys(self) -> int:
        """N, the number of key blocks."""
        return num_blocks(self.length, self.block_size)

    @property
    def num_rows(self) -> int:
        """R, the number of query blocks that hold a query."""
        return self.num_keys - self.first_row

    def rows(self) -> Tensor:
        """The query block of each row, int64 ``[R, 1]``."""
        return torch.arange(self.first_row, self.num_keys, device=self.q.device)[:, None]

    def columns(self) -> Tensor:
        """The key blocks, int64 ``[N]``."""
        return torch.arange(self.num_keys, device=self.q.device)

    def chunks(self, scores_a_row: int) -> Iterator[tuple[range, slice]]:
        """Query blocks to look at together if each takes so many scores in all heads: their numbers, their rows."""
        step = max(1, MOST_SCORES // max(1, scores_a_row))
        for first in range(self.first_row, self.num_keys, step):
            end = min(first + step, self.num_keys)
            yield range(first, end), slice(first - self.first_row, end - self.first_row)

    def positions(self, blocks: range) -> Tensor:
        """Where the queries of these query blocks are, int64."""
        first, end = max(self.start, blocks.start * self.block_size), min(self.length, blocks.stop * self.block_size)
        return torch.arange(first, end, device=self.q.device)

    def queries(self, blocks: range) -> tuple[Tensor, Tensor]:
        """Scaled queries of whole query blocks, and which are there: float32 ``[Hq, M, D]``, bool ``[M]``.

        M is ``len(blocks) * block_size``; places before the first query and behind the last one are 0.
        """
        begin, end = blocks.start * self.block_size, blocks.stop * self.block_size
        front, back = max(0, self.start - begin), max(0, end - self.length)
        q = self.q[:, begin + front - self.start : end - back - self.start].float() * self.scale
        positions = torch.arange(begin, end, device=q.device)
        present = (positions >= self.start) & (positions < self.length)
        return torch.nn.functional.pad(q, (0, 0, front, back)), present


def dot(q: Tensor, k: Tensor) -> Tensor:
    """``q [Hq, M, D]`` times ``k [Hkv, N, D]`` of the same group of heads: ``[Hq, M, N]``. Both float32."""
    product = q.reshape(k.shape[0], -1, q.shape[2]) @ k.mT
    return product.view(*q.shape[:2], k.shape[1])


def means(x: Tensor, size: int, start: int = 0) -> Tensor:
    """Means of groups of ``size`` positions, which are cut from position 0 on.

    Args:
        x: ``[H, T, D]``, the tokens at positions ``start`` and on.
        size: tokens a group. The mean of a group is that of its tokens that x holds.
        start: position of the first token.

    Returns:
        float32 ``[H, n, D]``, from the group that holds the first token to the one that holds the last.
    """
    front, end = start % size, start % size + x.shape[1]
    back = -end % size
    padded = torch.nn.functional.pad(x, (0, 0, front, back)) if front or back else x
    total = padded.unflatten(1, (-1, size)).sum(-2, dtype=torch.float32)
    present = torch.ones(x.shape[1], device=x.device)
    counts = torch.nn.functional.pad(present, (front, back)).view(-1, size).sum(-1)
    return total / counts[:, None]


def last_softmax(prompt: Prompt, most: int) -> Tensor:
    """Attention of the last ``most`` queries (or of all, if there are fewer), float32 ``[Hq, m, L]``."""
    q = prompt.q[:, -most:].float() * prompt.scale
    length = prompt.length
    scores = torch.empty(*q.shape[:2], length, device=q.device)
    group = prompt.heads // prompt.k.shape[0]
    for head in range(prompt.k.shape[0]):  # one at a time: all keys in float32 would be a copy of the cache
        here = slice(head * group, (head + 1) * group)
        scores[here] = dot(q[here], prompt.k[head : head + 1].float())
    positions = torch.arange(length, device=q.device)
    scores.masked_fill_(positions > positions[-q.shape[1] :, None], float("-inf"))
    return scores.softmax(-1)


def diagonal_sums(attention: Tensor) -> Tensor:
    """Sums of the attention ``[H, m, L]`` of the last m queries by distance of key and query, ``[H, L]``."""
    total = attention.new_zeros(attention.shape[0], attention.shape[2])
    for back in range(attention.shape[1]):  # the query with so many behind it sees L - back keys
        seen = attention.shape[2] - back
        total[:, :seen] += attention[:, -1 - back, :seen].flip(-1)
    return total


def antidiagonals(prompt: Prompt, stride: int) -> Iterator[tuple[range, slice, Tensor, Tensor]]:
    """Logits of small tiles of queries and keys by their antidiagonals, some query blocks at a time.

    With S the stride, tile (a, b) has ``scale / S`` times the sum over u < S of ``q[aS + S - 1 - u] . k[bS + u]``.
    Tiles are cut from position 0 on; tokens that a tile lacks count as zeros.

    Args:
        prompt: one sequence.
        stride: S, tokens a side of a tile, which divides the block size.

    Yields:
        Query blocks and their rows, as :meth:`Prompt.chunks`; logits float32 ``[Hq, a, b]`` of all tiles a of these
        blocks and all b up to the last of them, -inf where b > a; bool ``[a]``, which tiles hold a query.
    """
    tiles = prompt.block_size // stride  # of a block, on each side
    keys = torch.nn.functional.pad(prompt.k.float(), (0, 0, 0, -prompt.length % prompt.block_size))
    keys = keys.unflatten(1, (-1, stride)).flatten(2)  # [Hkv, N * tiles, stride * D]
    column = torch.arange(keys.shape[1], device=keys.device)
    for blocks, slots in prompt.chunks(prompt.heads * tiles * keys.shape[1]):
        queries, present = prompt.queries(blocks)
        queries = queries.unflatten(1, (-1, stride)).flip(2).flatten(2)
        end = blocks.stop * tiles
        logits = dot(queries, keys[:, :end]) / stride
        row = column[blocks.start * tiles : end, None]
        yield blocks, slots, logits.masked_fill_(column[:end] > row, -math.inf), present.view(-1, stride).any(-1)


def reach_share(mass: Tensor, rank: Tensor, share: float) -> Tensor:
    """Blocks in the order of their rank, until they have a share of the mass of the row; the one that gets there is in.

    Args:
        mass: ``[R, N]``, not negative, of one head: orders and sums in 64 bits take much memory.
        rank: ``[R, N]``, largest first; of equals, the first block.
        share: from 0 (nothing) to just below 1. For everything do not ask: sums are rounded.

    Returns:
        bool ``[R, N]``.
    """
    order = rank.sort(dim=-1, descending=True, stable=True).indices
    ordered = mass.gather(-1, order).double()
    before = ordered.cumsum(-1) - ordered
    wanted = before < share * ordered.sum(-1, keepdim=True)
    return torch.zeros_like(wanted).scatter_(-1, order, wanted)


@torch.no_grad()
def masks_to_lists(
    inputs: LayerInputs, block_size: int, choose: Callable[[Prompt], Tensor], heads: int | None = None
) -> BlockIndices:
    """Block lists of a selector with a rule of its own.

    Args:
        inputs: what the selector got.
        block_size: tokens a block.
        choose: gives the blocks to keep, bool ``[heads or 1, R, N]``, of a sequence. What lies behind the diagonal is
            dropped and the diagonal is added.
        heads: lists of each row; None: Hq. Hkv where the query heads of a group share one.
    """

    def keep(prompt: Prompt) -> Tensor:
        return choose(prompt) | (prompt.columns() == prompt.rows())

    mask = _for_each_row(inputs, block_size, keep, False, heads)
    return BlockIndices.from_mask(mask, block_size, span=inputs.span)


@torch.no_grad()
def scores_to_lists(
    inputs: LayerInputs,
    block_size: int,
    policy: Policy,
    score: Callable[[Prompt], Tensor],
    heads: int | None = None,
) -> BlockIndices:
    """Block lists of a selector that leaves the choice to a policy.

    Args:
        inputs: what the selector got.
        block_size: tokens a block.
        policy: gets the scores as logits.
        score: gives the scores of a sequence, float32 ``[heads or 1, R, N]``. What lies behind the diagonal is ignored.
        heads: lists of each row; None: Hq. Hkv where the query heads of a group share one.
    """
    logits = rows_of_scores(inputs, block_size, score, heads)
    lengths = inputs.lengths if inputs.span is None else None  # the span knows them
    return policy.of_layer(inputs.layer).select(logits, block_size=block_size, lengths=lengths, span=inputs.span)


@torch.no_grad()
def rows_of_scores(
    inputs: LayerInputs, block_size: int, score: Callable[[Prompt], Tensor], heads: int | None = None
) -> Tensor:
    """Scores of the sequences of a batch, float32 ``[B, heads, R, N]``, as a policy gets them."""
    return _for_each_row(inputs, block_size, score, 0.0, heads)


def _for_each_row(
    inputs: LayerInputs, block_size: int, answer: Callable[[Prompt], Tensor], fill: bool | float, heads: int | None
) -> Tensor:
    """Answers for the sequences of a batch, ``[B, heads, R, N]``; ``fill`` where a sequence has no such block."""
    span, heads = _span_of(inputs), inputs.q.shape[1] if heads is None else heads
    shape = span.batch, heads, span.num_rows(block_size), span.num_key_blocks(block_size)
    dtype = torch.bool if isinstance(fill, bool) else torch.float32
    out = torch.full(shape, fill, dtype=dtype, device=inputs.q.device)
    for b, prompt in prompts(inputs, block_size):
        out[b, :, : prompt.num_rows, : prompt.num_keys] = answer(prompt)
    return out


def prompts(inputs: LayerInputs, block_size: int) -> Iterator[tuple[int, Prompt]]:
    """The sequences of a batch that have a query, each with the number of its row."""
    q, k, span = inputs.q, inputs.k, _span_of(inputs)
    q, k = span.gather_queries(q), span.gather_keys(k)
    starts, counts = span.column(START).tolist(), span.column(LENGTH).tolist()
    for b, (start, count) in enumerate(zip(starts, counts, strict=True)):
        if count:
            yield b, Prompt(inputs.layer, q[b, :, :count], k[b, :, : start + count], inputs.scale, block_size)


def _span_of(inputs: LayerInputs) -> Span:
    if inputs.span is not None:
        return inputs.span
    return Span.of_padded(inputs.q.shape[0], inputs.q.shape[2], inputs.k.shape[2], inputs.lengths)
