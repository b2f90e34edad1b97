"""The public function: argument checks and the choice of an implementation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import dispatch
from ..block_pooling import block_pooling
from ..block_pooling.interface import check_pooling

OP = "inverse_rope"
# Numbers that a Triton program pools.
MOST_POOLED = 1 << 14
IMPLEMENTATIONS = {name: dispatch.Implementation(name) for name in ("triton", "reference")}


@torch.no_grad()
def inverse_rope(
    x: Tensor, cos: Tensor, sin: Tensor, *,
    recent: Tensor | None = None, out: Tensor | None = None, implementation: str | None = None,
) -> Tensor:  # fmt: skip
    """Undo the rotary embedding: x from ``x * cos + rotate_half(x) * sin``, computed in float32.

    What a gate needs of the keys in a cache: gates pool keys before RoPE (SeerAttention, arXiv 2410.13276, section
    3.1). Tables that scale (YaRN) are taken back too; rounding of x after its rotation is not.

    Args:
        x: ``[B, H, T, D]`` after RoPE, floating point.
        cos, sin: ``[B or 1, T, rotary_dim]``, halves repeated as Hugging Face lays the table out; channels from
            rotary_dim on are not rotated.
        recent: ``[B, H, R, D]`` of the dtype of x with R up to T: the last R tokens as they were before RoPE, which are
            taken as they are. Those of x are not read. None: all of x is turned back.
        out: ``[B, H, T, D]`` of the dtype of x, channels side by side in memory; None: new memory.
        implementation: ``"reference"``, ``"triton"`` or None (automatic: the kernel on GPUs).

    Returns:
        ``out``.

    Raises:
        ValueError: shapes or dtypes that do not fit, or an implementation that cannot run here.
        TypeError: x is not floating point.
    """
    _check(x, cos, sin, recent)
    if out is None:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    elif out.shape != x.shape or out.dtype != x.dtype or (out.numel() and out.stride(-1) != 1):
        raise ValueError(
            f"{OP}: out must be {x.dtype} {tuple(x.shape)} with channels side by side, got {out.dtype} "
            f"{tuple(out.shape)} with strides {out.stride()}"
        )
    name = dispatch.choose_implementation(OP, implementation, x.device, IMPLEMENTATIONS)
    dispatch.load(__package__, IMPLEMENTATIONS[name].module, OP)(x, cos, sin, recent, out)
    return out


@torch.no_grad()
def pooled_inverse_rope(
    x: Tensor, cos: Tensor, sin: Tensor, kinds: Sequence[str], *,
    block_size: int = 64, recent: Tensor | None = None, implementation: str | None = None,
) -> Tensor:  # fmt: skip
    """Pooled blocks of what :func:`inverse_rope` gives: ``block_pooling(inverse_rope(x, ...), kinds, ...)``.

    The kernel reads the keys of a cache once and writes nothing of their length; averages may differ in the last bits.

    Args:
        x, cos, sin, recent: as in :func:`inverse_rope`.
        kinds, block_size: as in :func:`block_pooling`. Blocks of another number of tokens than a power of two take two
            steps, and so do blocks of 128 tokens of more than 128 channels.
        implementation: ``"reference"`` (two steps), ``"triton"`` or None (automatic: the kernel on GPUs).

    Returns:
        ``[B, H, ceil(T / block_size), len(kinds) * D]``, dtype of x.

    Raises:
        ValueError, TypeError: as the two.
    """
    _check(x, cos, sin, recent)
    name = dispatch.choose_implementation(OP, implementation, x.device, IMPLEMENTATIONS)
    many = max(64, block_size) * x.shape[3] > MOST_POOLED
    if name == "reference" or many or block_size & (block_size - 1) or not x.shape[2]:
        back = inverse_rope(x, cos, sin, recent=recent, implementation=implementation)
        return block_pooling(back, kinds, block_size=block_size, implementation=implementation)
    kinds = check_pooling(kinds, block_size)
    function = dispatch.load(__package__, IMPLEMENTATIONS[name].module, "pooled_inverse_rope")
    return function(x, cos, sin, recent, kinds, block_size)


def _check(x: Tensor, cos: Tensor, sin: Tensor, recent: Tensor | None) -> None:
    """Raise where what is to be turned back and its table do not fit each other."""
    dispatch.check_floating(OP, x=x)
    if x.dim() != 4:
        raise ValueError(f"{OP}: x must be [B, H, T, D], got {tuple(x.shape)}")
    batch, heads, length, head_dim = x.shape
    fits = cos.dim() == 3 and cos.shape == sin.shape and cos.shape[0] in (1, batch) and cos.shape[1] == length
    if not fits or cos.shape[2] % 2 or not 0 < cos.shape[2] <= head_dim:
        raise ValueError(
            f"{OP}: cos and sin must be [{batch} or 1, {length}, rotary_dim] with an even rotary_dim up to {head_dim}, "
            f"got {tuple(cos.shape)} and {tuple(sin.shape)}"
        )
    if recent is None:
        return
    fits = recent.dim() == 4 and (*recent.shape[:2], recent.shape[3]) == (batch, heads, head_dim)
    if not fits or recent.shape[2] > length or recent.dtype != x.dtype or recent.device != x.device:
        raise ValueError(
            f"{OP}: recent must be {x.dtype} [{batch}, {heads}, up to {length}, {head_dim}] on {x.device}, got "
            f"{recent.dtype} {tuple(recent.shape)} on {recent.device}"
        )
