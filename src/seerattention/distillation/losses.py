"""The distillation loss: KL divergence of the gate's block distribution from the pooled attention map, row by row.

Sums and counts are kept apart: gradients and losses of several batches, and of several processes, are added up first
and divided by the total count last, so that a global batch gives one result however it is cut and padded.
"""

from __future__ import annotations

import torch
from torch import Tensor


def kl_sum(logits: Tensor, target: Tensor, valid: Tensor | None = None) -> Tensor:
    """Sum over rows of KL(target || softmax(logits)), the loss of the SeerAttention paper (section 3.2).

    Args:
        logits: ``[B, H, R, N]`` gate logits, -inf (or the lowest finite value) above the block diagonal.
        target: ``[B, H, R, N]`` float32, non-negative, each row summing to 1, zero above the block diagonal.
        valid: bool ``[B, R]``; rows that are False are left out (padding). None: all rows count.

    Returns:
        A float32 scalar. A NaN in logits or target of a valid row makes it NaN.
    """
    if logits.shape != target.shape:
        raise ValueError(
            f"logits and target must have the same shape, got {tuple(logits.shape)} and {tuple(target.shape)}"
        )
    log_probabilities = torch.log_softmax(logits.float(), -1)
    # 0 * -inf above the diagonal must be 0, in the value and in the gradient.
    log_probabilities = torch.where(target == 0, torch.zeros_like(target), log_probabilities)
    divergence = (torch.xlogy(target, target) - target * log_probabilities).sum(-1)
    if valid is not None:
        divergence = torch.where(valid[:, None], divergence, torch.zeros_like(divergence))
    return divergence.sum()


def kl_count(valid_rows: int, num_heads: int, num_key_blocks: int, reduction: str) -> int:
    """What :func:`kl_sum` is divided by: the (head, row) pairs; "official" counts every key block of each of them too.

    Args:
        valid_rows: number of (batch, row) pairs that entered the sum.
    """
    pairs = valid_rows * num_heads
    return pairs * num_key_blocks if reduction == "official" else pairs


def draw_rows(
    num_blocks: int, rows: float | int | None, skip_rows: float, seed: int, draw: int, last_rows: int = 0
) -> Tensor:
    """The query-block rows of one batch: a random subset, ascending, int64 ``[R]`` on the CPU.

    Args:
        num_blocks: blocks of the padded batch.
        rows: share (float), count (int) or all (None) of the rows that are left after ``skip_rows``.
        skip_rows: share of the rows at the start that is never drawn.
        seed, draw: together they decide the subset; nothing else does, so every process of a run draws the same rows
            and a resumed run needs no generator state.
        last_rows: how many of the last rows are always among them.
    """
    first = int(num_blocks * skip_rows)
    candidates = num_blocks - first
    if rows is None:
        return torch.arange(first, num_blocks)
    count = rows if isinstance(rows, int) else max(1, round(rows * candidates))
    if count >= candidates:
        return torch.arange(first, num_blocks)
    # Distinct draws must give distinct generator seeds; an odd multiplier spreads the seed over 63 bits.
    generator = torch.Generator().manual_seed((seed * 0x9E3779B97F4A7C15 + draw) & (2**63 - 1))
    last = min(last_rows, count)
    drawn = torch.randperm(candidates - last, generator=generator)[: count - last].sort().values
    return first + torch.cat((drawn, torch.arange(candidates - last, candidates)))
