"""Block-sparse attention in which what is left out is not forgotten: each such block stands in as its mean."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..dispatch import default_scale
from ..indices import BlockIndices, span_of
from ..span import START, Span
from .interface import block_sparse_attention

__all__ = ["mean_corrected_attention"]

# Products of queries and means held at a time, in elements of float32.
MAX_SCORES = 1 << 25


def mean_corrected_attention(
    q: Tensor, k: Tensor, v: Tensor, blocks: BlockIndices, *, scale: float | None = None, return_lse: bool = False,
    implementation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Block-sparse attention with the mean correction of FlashPrefill V2 (arXiv 2608.19758).

    A query reads the keys of the listed blocks as in :func:`block_sparse_attention`. Each block that is not on its list
    and whose tokens it could all see (whose last position is not behind its own) joins the softmax as one key and value
    more: the logit is ``scale * q . mean(k) + log(block_size)``, the value ``mean(v)``. That is exact where all keys of
    the block are the same, and otherwise less than what the block has (Jensen's inequality).

    The listed blocks are read by the kernel; the means, their attention in float32, and joining both by their
    log-sum-exp are plain torch, which reads every key and value once more. The correction takes ``Tq * N`` products a
    head where dense attention takes ``Tq * Tk``, in chunks of bounded memory. There is no backward.

    Args:
        q, k, v, blocks, scale, return_lse, implementation: as in :func:`block_sparse_attention`, spans included.

    Returns:
        As :func:`block_sparse_attention`; ``lse`` counts the stand-ins.

    Raises:
        ValueError, TypeError, NotImplementedError: as :func:`block_sparse_attention`.
    """
    listed = block_sparse_attention(q, k, v, blocks, scale=scale, return_lse=True, implementation=implementation)
    assert isinstance(listed, tuple)
    span = span_of(blocks, q, k)
    out, lse = (span.gather_queries(x) for x in listed)
    out, lse = _join_means(span.gather_queries(q), k, v, blocks, span, default_scale(q.shape[-1], scale), out, lse)
    empty_lse = torch.full(q.shape[:3], -math.inf, dtype=torch.float32, device=q.device)
    result = span.scatter_queries(out, torch.zeros_like(q))
    return (result, span.scatter_queries(lse, empty_lse)) if return_lse else result


def _join_means(
    q: Tensor, k: Tensor, v: Tensor, blocks: BlockIndices, span: Span, scale: float, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor]:
    """What was read of the lists, ``out [B, Hq, Tq, D]`` and its ``lse``, with the stand-ins of what was not.

    Args:
        q, out, lse: each row's first query first.
    """
    size, device = blocks.block_size, q.device
    num = span.keys // size  # the blocks that may be seen as a whole
    if num == 0 or q.shape[2] == 0:
        return out, lse
    (batch, heads, queries, dim), kv_heads = q.shape, k.shape[1]
    ends = span.ends(device)
    present = (torch.arange(num, device=device) < ends[:, None] // size)[:, None, :, None]
    # Of a batch row that has no such block the mean is that of anything, NaN even, which would spread.
    mean_k, mean_v = (_means(span.gather_keys(x), size, num).masked_fill(~present, 0.0) for x in (k, v))
    mask, rows = blocks.to_mask()[..., :num], span.row_blocks(size, device)
    positions = span.column(START, device)[:, None] + torch.arange(queries, device=device)
    out, lse = torch.empty_like(out).copy_(out), lse.clone()
    step = max(1, MAX_SCORES // (batch * heads * num))
    for first in range(0, queries, step):
        part = slice(first, min(first + step, queries))
        here = positions[:, part]
        row = (here // size - rows[:, :1]).clamp(0, mask.shape[2] - 1)
        read = mask.gather(2, row[:, None, :, None].expand(-1, mask.shape[1], -1, num))
        seen = torch.arange(num, device=device) < ((here + 1) // size)[..., None]
        seen &= (here < ends[:, None])[..., None]  # behind a row's last query there is none
        counts = (~read & seen[:, None]).repeat_interleave(heads // read.shape[1], 1)
        grouped = q[:, :, part].float().reshape(batch, kv_heads, -1, dim)
        logits = (grouped @ mean_k.mT).view(counts.shape) * scale + math.log(size)
        logits.masked_fill_(~counts, -math.inf)
        total = torch.logaddexp(lse[:, :, part], logits.logsumexp(-1))
        # A query that reads nothing has -inf; exp(-inf - 0) makes its shares 0 rather than NaN.
        base = total.masked_fill(total == -math.inf, 0.0)
        shares = (logits - base[..., None]).exp_().view(batch, kv_heads, -1, num)
        means = (shares @ mean_v).view(batch, heads, -1, dim)
        kept = (lse[:, :, part] - base).exp()[..., None]
        out[:, :, part] = (out[:, :, part].float() * kept + means).to(out.dtype)
        lse[:, :, part] = total
    return out, lse


def _means(x: Tensor, size: int, num: int) -> Tensor:
    """Means of the first ``num`` blocks of ``x [B, H, T, D]``, float32 ``[B, H, num, D]``."""
    return x[:, :, : num * size].unflatten(2, (num, size)).mean(3, dtype=torch.float32)
