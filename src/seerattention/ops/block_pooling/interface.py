"""Public function of block pooling: argument checks and the choice of an implementation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import dispatch
from ..indices import num_blocks
from . import reference

__all__ = ["block_pooling"]

OP = "block_pooling"
IMPLEMENTATIONS = ("reference", "triton")
KINDS = ("max", "min", "avg")


@torch.no_grad()
def block_pooling(
    x: Tensor,
    kinds: Sequence[str],
    *,
    block_size: int = 64,
    lengths: Tensor | None = None,
    implementation: str | None = None,
) -> Tensor:
    """Pool each block of tokens per channel (SeerAttention paper, arXiv 2410.13276, section 3.1: the P of the gate).

    There is no gradient: queries and keys come from the frozen model.

    Args:
        x: ``[B, H, T, D]``, queries or keys before RoPE; float32, float16 or bfloat16, last dimension contiguous.
        kinds: some of ``"max"``, ``"min"``, ``"avg"`` without repeats; results are concatenated in this order.
        block_size: tokens a block: 32, 64 or 128.
        lengths: int64 ``[B]``, valid tokens of each right-padded row (None: all). Partial blocks pool their valid
            tokens only (the average divides by their number); blocks without a valid token give 0.
        implementation: ``"reference"``, ``"triton"`` or None (automatic).

    Returns:
        ``[B, H, N, len(kinds) * D]``, dtype of x (averages are taken in float32), N = ceil(T / block_size).

    Raises:
        ValueError: x that is not 4-D, unknown or repeated kinds, an unknown block size, lengths of another shape.
        TypeError: an unsupported dtype.
    """
    dispatch.check_floating(OP, x=x)
    dispatch.check_block_size(OP, block_size)
    if x.dim() != 4 or x.shape[2] == 0:
        raise ValueError(f"{OP}: x must be [B, H, T, D] with at least one token, got {tuple(x.shape)}")
    kinds = tuple(kinds)
    if not kinds or len(set(kinds)) != len(kinds) or not set(kinds) <= set(KINDS):
        raise ValueError(f"{OP}: kinds must be a non-empty choice of {KINDS} without repeats, got {kinds}")
    if lengths is not None:
        if lengths.shape != x.shape[:1] or lengths.is_floating_point():
            raise ValueError(
                f"{OP}: lengths must be integers [{x.shape[0]}], got {lengths.dtype} {tuple(lengths.shape)}"
            )
        lengths = lengths.to(x.device, torch.int64)
    return _block_pooling(x, ",".join(kinds), block_size, lengths, implementation)


def _fake(x: Tensor, kinds: str, block_size: int) -> Tensor:
    batch, heads, length, head_dim = x.shape
    return x.new_empty(batch, heads, num_blocks(length, block_size), len(kinds.split(",")) * head_dim)


@dispatch.custom_op(_fake)
def _block_pooling(
    x: Tensor, kinds: str, block_size: int, lengths: Tensor | None, implementation: str | None
) -> Tensor:
    """``kinds`` is joined by commas."""
    function = reference.block_pooling
    if dispatch.choose_implementation(OP, implementation, x.device, names=IMPLEMENTATIONS) == "triton":
        from . import triton  # imported late: triton is an optional dependency

        function = triton.block_pooling
    return function(x, kinds.split(","), block_size=block_size, lengths=lengths)
