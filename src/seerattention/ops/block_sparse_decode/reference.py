"""Block-sparse decoding spelled out: dense scores in float32, a mask, a softmax. Runs on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from ..indices import BlockIndices, read_lists, span_of
from ..span import START, Span


def block_sparse_decode(
    q: Tensor, k: Tensor, v: Tensor, blocks: BlockIndices, scale: float, return_lse: bool
) -> tuple[Tensor, Tensor]:
    """Arguments as checked by the interface; see there.

    Returns:
        ``out`` like q, and the natural-log ``lse``, float32, q's shape without the last dimension.
    """
    span = span_of(blocks, q, k)
    queries, keys, values = span.gather_queries(q).float(), span.gather_keys(k).float(), span.gather_keys(v).float()
    group = queries.shape[1] // keys.shape[1]
    # What lies behind a row's last key may hold anything, NaN too, and 0 * NaN is no 0.
    position = torch.arange(span.keys, device=q.device)
    values = values.masked_fill((position >= span.ends(q.device)[:, None])[:, None, :, None], 0.0)
    visible = _visible(*read_lists(blocks), blocks.block_size, span).repeat_interleave(group, 1)
    scores = queries @ keys.repeat_interleave(group, 1).transpose(-1, -2) * scale
    scores = scores.masked_fill(~visible, float("-inf"))
    lse = scores.logsumexp(-1)
    # A query without keys has lse -inf; exp(-inf - 0) makes its probabilities 0 rather than NaN.
    weights = (scores - lse.masked_fill(lse == float("-inf"), 0.0)[..., None]).exp()
    out = weights @ values.repeat_interleave(group, 1)
    empty_out, empty_lse = torch.zeros_like(q), q.new_full(q.shape[:-1], float("-inf"), dtype=torch.float32)
    return span.scatter_queries(out.to(q.dtype), empty_out), span.scatter_queries(lse, empty_lse)


def _visible(indices: Tensor, counts: Tensor, block_size: int, span: Span) -> Tensor:
    """Bool ``[B, Hkv, Tq, Tk]``: which keys each query may read."""
    listed = torch.zeros(*counts.shape, span.num_key_blocks(block_size) + 1, dtype=torch.bool, device=counts.device)
    slots = torch.arange(indices.shape[-1], device=counts.device)
    spare = listed.shape[-1] - 1
    known = (slots < counts[..., None]) & (indices >= 0) & (indices < spare)
    listed.scatter_(-1, torch.where(known, indices.long(), spare), True)
    keys = torch.arange(span.keys, device=counts.device)
    positions = span.column(START, counts.device)[:, None] + torch.arange(span.queries, device=counts.device)
    causal = keys <= positions[..., None]  # [B, Tq, Tk]
    return listed[..., keys // block_size] & causal[:, None]
