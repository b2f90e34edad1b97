"""Block selection in plain torch: the definition that the Triton kernels must equal bit for bit.

Every function makes a bool mask of wanted blocks and packs it. All comparisons are on float32 values, ties go to the
lower block index, and the sums of :func:`select_topp` are taken over integers, so no result depends on the order of
summation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..indices import BlockIndices, causal_block_mask, ordered_lists, read_lists

# Probabilities are counted in units of 2^-40: float32 probabilities above 2^-16 are exact in it, and sums of 2^22
# blocks still fit int64.
PROBABILITY_UNITS = 1 << 40


def causal_softmax(logits: Tensor) -> Tensor:
    """Softmax over the causal key blocks of each row.

    Args:
        logits: ``[B, H, Nq, Nk]``; query blocks are the last Nq of the Nk key blocks.

    Returns:
        float32 ``[B, H, Nq, Nk]``, exactly 0 above the block diagonal.
    """
    num_rows, num_keys = logits.shape[-2:]
    causal = causal_block_mask(num_rows, num_keys, num_keys - num_rows, logits.device)
    return logits.float().masked_fill(~causal, float("-inf")).softmax(-1)


def select_threshold(
    scores: Tensor,
    threshold: float,
    *,
    block_size: int,
    lengths: Tensor | None,
    last_blocks_dense: int,
    softmax: bool = False,
) -> BlockIndices:
    probabilities = causal_softmax(scores) if softmax else scores
    return _finish(probabilities.float() > threshold, block_size, lengths, last_blocks_dense)


def select_topk(
    scores: Tensor,
    keep: Tensor,
    *,
    block_size: int,
    lengths: Tensor | None,
    last_blocks_dense: int,
    diagonal_extra: bool,
    capacity: int,
) -> BlockIndices:
    """``keep`` is int64 ``[1 or B, Nq]`` on the device of the scores, at least 1."""
    num_rows, num_keys = scores.shape[-2:]
    first_row = num_keys - num_rows
    rows = torch.arange(first_row, num_keys, device=scores.device)
    # Without diagonal_extra the diagonal is one of the k, and the other k - 1 compete below it. Cutting k to the
    # number of candidates keeps masked blocks, which sort last, off the list.
    candidates = causal_block_mask(num_rows, num_keys, first_row if diagonal_extra else first_row - 1, scores.device)
    wanted = torch.minimum(keep, rows + 1) if diagonal_extra else torch.minimum(keep - 1, rows)
    values = scores.float()
    values = torch.where(candidates & ~values.isnan(), values, float("-inf"))
    order = values.sort(dim=-1, descending=True, stable=True).indices
    ranks_wanted = torch.arange(num_keys, device=scores.device) < wanted[:, None, :, None]
    mask = torch.zeros_like(values, dtype=torch.bool).scatter_(-1, order, ranks_wanted.expand(values.shape))
    indices, counts = read_lists(_finish(mask, block_size, lengths, last_blocks_dense))
    return ordered_lists(indices[..., :capacity].contiguous(), counts, num_keys, block_size)


def select_topp(
    scores: Tensor, p: float, *, block_size: int, lengths: Tensor | None, last_blocks_dense: int, softmax: bool = False
) -> BlockIndices:
    probabilities = causal_softmax(scores) if softmax else scores
    num_rows, num_keys = probabilities.shape[-2:]
    first_row = num_keys - num_rows
    values = probabilities.float().nan_to_num(0.0, 1.0, 0.0).clamp(0.0, 1.0)
    # The diagonal is taken first and its mass counts; the blocks below it make up the rest.
    diagonal = (values.diagonal(first_row, -2, -1).double() * PROBABILITY_UNITS).long()
    candidates = causal_block_mask(num_rows, num_keys, first_row - 1, probabilities.device)
    values = torch.where(candidates, values, -1.0)  # sorts after every candidate
    ordered, order = values.sort(dim=-1, descending=True, stable=True)
    units = (ordered.clamp(min=0.0).double() * PROBABILITY_UNITS).long()
    mass_before = diagonal[..., None] + units.cumsum(-1) - units
    mask = torch.zeros_like(values, dtype=torch.bool).scatter_(-1, order, mass_before < topp_target(p))
    return _finish(mask, block_size, lengths, last_blocks_dense)


def topp_target(p: float) -> int:
    """The mass to reach, in units of 2^-40. p = 1 asks for every block, however the probabilities were rounded."""
    return int(p * PROBABILITY_UNITS) if p < 1.0 else (1 << 62)


def num_blocks_of(lengths: Tensor, block_size: int) -> Tensor:
    return (lengths + (block_size - 1)) // block_size


def dense_indices(
    batch: int,
    heads: int,
    num_rows: int,
    num_key_blocks: int,
    *,
    block_size: int,
    lengths: Tensor | None = None,
    device: torch.device | str | None = None,
) -> BlockIndices:
    """Lists of all causal blocks. ``indices`` is one expanded row: it takes no memory, so do not write into it.

    Args:
        batch, heads, num_rows, num_key_blocks: B, H, Nq and Nk; query blocks are the last Nq of the Nk key blocks.
        block_size: tokens a block.
        lengths: int64 ``[B]``, valid tokens of each right-padded row; rows of wholly padded blocks get count 0.
        device: where to make them.
    """
    indices = torch.arange(num_key_blocks, dtype=torch.int32, device=device).expand(batch, heads, num_rows, -1)
    rows = torch.arange(num_key_blocks - num_rows, num_key_blocks, dtype=torch.int32, device=device)
    counts = (rows + 1).expand(batch, 1, -1)
    if lengths is not None:
        valid = rows < num_blocks_of(lengths.to(rows.device), block_size)[:, None, None]
        counts = torch.where(valid, counts, 0)
    return ordered_lists(indices, counts.expand(batch, heads, -1).contiguous(), num_key_blocks, block_size)


def _finish(mask: Tensor, block_size: int, lengths: Tensor | None, last_blocks_dense: int) -> BlockIndices:
    """Add what every selection shares (the diagonal, dense last rows, no padded rows) and pack."""
    num_rows, num_keys = mask.shape[-2:]
    rows = torch.arange(num_keys - num_rows, num_keys, device=mask.device)
    mask = mask | (torch.arange(num_keys, device=mask.device) == rows[:, None])
    if lengths is None:
        if last_blocks_dense:
            mask = mask | (rows >= num_keys - last_blocks_dense)[:, None]
    else:
        end = num_blocks_of(lengths, block_size)[:, None, None, None]
        mask = (mask | (rows[:, None] >= end - last_blocks_dense)) & (rows[:, None] < end)
    return BlockIndices.from_mask(mask, block_size)  # drops what is not causal
