"""MInference's vertical-slash pattern as the method reads it: single keys, and what is needed of a diagonal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops.indices import BlockIndices
from ..ops.span import Span
from ..selectors import LayerInputs
from .minference import MInference
from .prompt import Prompt, prompts


@dataclass(frozen=True)
class MInferenceExact(MInference, kind="minference_exact", limits=MInference.limits):
    """The keys and diagonals of :class:`MInference`, read token by token.

    MInference (arXiv 2407.02490, section 3.2, vertical-slash heads). A query block that ends before position e reads
    the chosen keys, and of each chosen distance d the keys from ``e - d - block_size`` to before ``e - d``, which are
    those that one of its queries has at this distance; all its queries read all of these, up to themselves. The
    published kernel joins neighbouring stretches in steps of 64 keys, so that it reads up to 63 keys more at the end of
    each; that is left out.

    **A yardstick of quality, not of time.** What is read are no lists of blocks, so attention is PyTorch's own, masked,
    over everything that a chunk of query blocks may see, and saves nothing. Densities are exact: pairs of tokens that
    are read over causal pairs. Observers, and what they make (block recall, maps), get the tiles of the other form.

    Attributes:
        block_size: queries that read the same keys; 64 in the published kernel.
        vertical, slash, multiplier, last_queries: as in :class:`MInference`.
    """

    reads_blocks = False

    @property
    def attention(self) -> str:
        return "token by token"

    def attend(self, inputs: LayerInputs, blocks: BlockIndices) -> Tensor:
        q, span = inputs.q, inputs.span
        if span is None:
            span = Span(q.shape[0], q.shape[2], inputs.k.shape[2])
        values, out = span.gather_keys(inputs.v), q.new_zeros(span.batch, q.shape[1], span.queries, q.shape[3])
        for b, prompt in prompts(inputs, self.block_size):
            v = values[b, :, : prompt.length]
            out[b, :, : prompt.q.shape[1]] = _attend(prompt, v, self.reader(prompt))
        return span.scatter_queries(out, torch.zeros_like(q))

    def share_read(self, inputs: LayerInputs) -> Tensor:
        """Pairs of tokens that are read over causal pairs, over heads and rows; float64 ``[]``."""
        read = torch.zeros((), dtype=torch.float64, device=inputs.q.device)
        pairs = 0
        for _, prompt in prompts(inputs, self.block_size):
            reader = self.reader(prompt)
            for blocks, _ in prompt.chunks(prompt.heads * prompt.length):
                positions = prompt.positions(blocks)
                upto = reader(blocks).cumsum(-1, dtype=torch.int32)  # keys that are read up to each
                read += upto[:, positions // self.block_size - blocks.start, positions].sum(dtype=torch.float64)
            # start + 1 of the first query to length of the last
            pairs += prompt.heads * (prompt.start + 1 + prompt.length) * prompt.q.shape[1] // 2
        return read / pairs

    def reader(self, prompt: Prompt) -> Callable[[range], Tensor]:
        """Gives of query blocks the keys that each reads, bool ``[Hq, blocks, L]``; causality is not looked at."""
        keys, distances = self.patterns(prompt)
        size, length = self.block_size, prompt.length
        room = prompt.num_keys * size - length
        # A key x before the last place of a block is needed for a distance of x - size + 1 to x.
        padded = torch.nn.functional.pad(distances.float(), (size - 1, room))
        needed = torch.nn.functional.max_pool1d(padded[:, None], size, 1)[:, 0] > 0
        places = torch.arange(length, device=keys.device)

        def read(blocks: range) -> Tensor:
            last = torch.arange(blocks.start + 1, blocks.stop + 1, device=keys.device)[:, None] * size - 1
            return keys[:, None] | needed[:, (last - places).clamp(min=0)]

        return read


def _attend(prompt: Prompt, v: Tensor, reader: Callable[[range], Tensor]) -> Tensor:
    """Attention of one sequence over the keys that its query blocks read, ``[Hq, T, D]``; ``v [Hkv, L, D]``."""
    group, size = prompt.heads // v.shape[0], prompt.block_size
    k, v = (x.repeat_interleave(group, 0) for x in (prompt.k, v))
    out = torch.empty_like(prompt.q)
    places = torch.arange(prompt.length, device=v.device)
    for blocks, _ in prompt.chunks(prompt.heads * size * prompt.length):
        positions = prompt.positions(blocks)
        first, end = max(prompt.start, blocks.start * size), min(prompt.length, blocks.stop * size)
        mask = reader(blocks)[:, positions // size - blocks.start, :end] & (places[:end] <= positions[:, None])
        here = slice(first - prompt.start, end - prompt.start)
        out[:, here] = torch.nn.functional.scaled_dot_product_attention(
            prompt.q[None, :, here], k[None, :, :end], v[None, :, :end], attn_mask=mask[None], scale=prompt.scale
        )[0]
    return out
