"""Pooled attention in plain torch, float32, one query block after the other: the definition, not the fast way."""

from __future__ import annotations

import torch
from torch import Tensor

from ..indices import num_blocks
from .arguments import Wanted


def pooled_attention(q: Tensor, k: Tensor, rows: Tensor, wanted: Wanted) -> Tensor:
    block_size, scale, lengths, reduce, _, lse = wanted
    batch, heads, query_length, _ = q.shape
    key_length = k.shape[2]
    num_keys = num_blocks(key_length, block_size)
    k = k.float().repeat_interleave(heads // k.shape[1], dim=1)
    key_positions = torch.arange(key_length, device=q.device)
    offset = key_length - query_length  # position of the first query
    out = torch.zeros(batch, heads, rows.numel(), num_keys, dtype=torch.float32, device=q.device)
    for slot, row in enumerate(rows.tolist()):
        start, end = max(row * block_size, offset), min((row + 1) * block_size, key_length)
        positions = torch.arange(start, end, device=q.device)
        scores = q[:, :, start - offset : end - offset].float() @ k.transpose(-1, -2) * scale
        scores = scores.masked_fill(key_positions > positions[:, None], float("-inf"))
        if lse is None:
            probabilities = scores.softmax(-1)
        else:
            probabilities = (scores - lse[:, :, start - offset : end - offset, None]).exp()
        if lengths is not None:
            padded_queries = (positions >= lengths[:, None])[:, None, :, None]
            probabilities = probabilities.masked_fill(padded_queries, 0.0)
        padded = torch.nn.functional.pad(probabilities, (0, num_keys * block_size - key_length))
        tiles = padded.unflatten(-1, (num_keys, block_size))
        out[:, :, slot] = tiles.amax(dim=(2, 4)) if reduce == "max" else tiles.sum(dim=(2, 4))
    return finish(out, rows, key_length, query_length, wanted)


def finish(out: Tensor, rows: Tensor, key_length: int, query_length: int, wanted: Wanted) -> Tensor:
    """Divide ``out [B, H, R, Nk]`` in place: rows of tile maxima by their sum, of tile masses by the number of queries.

    Rows without a valid query are 0 and stay 0.
    """
    if not wanted.normalize:
        return out
    if wanted.reduce == "max":
        return divide_by_sum(out)
    start = (rows * wanted.block_size).clamp(min=key_length - query_length)
    end = ((rows + 1) * wanted.block_size).clamp(max=key_length)
    if wanted.lengths is not None:
        end = torch.minimum(end, wanted.lengths[:, None])  # [B, R]
    queries = (end - start).clamp(min=1)
    return out.div_(queries.view(-1, 1, rows.numel(), 1))


def divide_by_sum(out: Tensor) -> Tensor:
    """Each row of ``out [..., Nk]`` divided in place by its sum; rows of 0 stay 0."""
    return out.div_(out.sum(-1, keepdim=True).clamp_(min=torch.finfo(torch.float32).tiny))
