"""Public function of gate scores: argument checks and the choice of an implementation."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import dispatch
from ..indices import num_blocks
from . import reference

__all__ = ["gate_scores"]

OP = "gate_scores"
IMPLEMENTATIONS = ("reference", "triton")
# Rows of the result begin at multiples of this many elements, so that those who read it may load whole vectors.
ROW_ALIGNMENT = 16
# A Triton program holds whole projected vectors.
MAX_TRITON_WIDTH = 256


def gate_scores(
    pooled_q: Tensor,
    pooled_k: Tensor,
    k_linear: Tensor,
    q_linear: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    block_size: int = 64,
    scale: float = 1.0,
    rows: Tensor | None = None,
    masked: bool = True,
    implementation: str | None = None,
) -> Tensor:
    """Project pooled queries and keys, rotate them at the positions of their blocks, and multiply.

    The gate of the SeerAttention paper (arXiv 2410.13276, section 3.1) after its pooling. G = Hq / Hkv query heads
    share a KV head.

    Args:
        pooled_q: ``[B, Hq, N, C_q]``; float32, float16 or bfloat16 (the reference takes float64, too).
        pooled_k: ``[B, Hkv, N, C_k]``, dtype of pooled_q.
        k_linear: ``[Hq or Hkv, C_k, W]``, one key projection per query head or one per KV head, dtype of pooled_q.
        q_linear: ``[Hq, C_q, W]``, dtype of pooled_q; None: queries are not projected, and C_q is W.
        cos, sin: ``[B or 1, T, rotary_dim]`` with N = ceil(T / block_size), the rotary table at the tokens' positions,
            halves repeated as Hugging Face lays it out; blocks are rotated at their first token. A table wider than W
            is read at every (rotary_dim / W)-th channel. None: no rotation.
        block_size: tokens a block.
        scale: factor of the products.
        rows: int64 ``[R]``, query blocks to score (None: all N).
        masked: False: what lies above the block diagonal may be left undefined, which saves writing it.
        implementation: ``"reference"``, ``"triton"`` or None (automatic: Triton on CUDA devices, in float16 and
            bfloat16, for all rows, where no gradient is asked for).

    The reference projects in the dtype of its arguments and computes in float32 from there, differentiably. Triton
    multiplies on tensor cores: projections stay float32 through the rotation, then queries and keys are rounded to the
    dtype of the arguments, as the attention itself does with its own after RoPE, and products are added in float32.

    Returns:
        float32 ``[B, Hq, R, N]``, -inf above the block diagonal. Rows may be padded in memory.

    Raises:
        ValueError: shapes that do not fit each other; ``"triton"`` asked for with ``rows`` or with W above 256.
        TypeError: dtypes that differ.
    """
    _check(pooled_q, pooled_k, k_linear, q_linear, cos, sin, block_size)
    tensors = (pooled_q, pooled_k, k_linear, q_linear, cos, sin)
    if _opaque(implementation, rows, *tensors):
        return _gate_scores(*tensors, block_size, float(scale), masked, implementation)
    return reference.gate_scores(*tensors, block_size=block_size, scale=scale, rows=rows)


def _fake(pooled_q: Tensor) -> Tensor:
    return empty_scores(pooled_q)


@dispatch.custom_op(_fake)
def _gate_scores(
    pooled_q: Tensor,
    pooled_k: Tensor,
    k_linear: Tensor,
    q_linear: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    block_size: int,
    scale: float,
    masked: bool,
    implementation: str | None,
) -> Tensor:
    """What needs no gradient; with one, tracers are to see the reference."""
    tensors = (pooled_q, pooled_k, k_linear, q_linear, cos, sin)
    scores = empty_scores(pooled_q)
    if dispatch.choose_implementation(OP, implementation, pooled_q.device, names=IMPLEMENTATIONS) == "triton":
        from . import triton  # imported late: triton is an optional dependency

        triton.gate_scores(*tensors, scores, block_size=block_size, scale=scale, masked=masked)
    else:
        scores.copy_(reference.gate_scores(*tensors, block_size=block_size, scale=scale))
    return scores


def empty_scores(pooled_q: Tensor) -> Tensor:
    """Uninitialised float32 ``[B, Hq, N, N]`` with padded rows."""
    batch, heads, num, _ = pooled_q.shape
    pitch = num_blocks(num, ROW_ALIGNMENT) * ROW_ALIGNMENT
    return pooled_q.new_empty(batch, heads, num, pitch, dtype=torch.float32)[..., :num]


def _opaque(implementation: str | None, rows: Tensor | None, *tensors: Tensor | None) -> bool:
    """Whether the kernels are to run, so far as arguments tell; this is traced, so triton must not be looked for."""
    pooled_q, k_linear = tensors[0], tensors[2]
    assert pooled_q is not None
    assert k_linear is not None
    width = k_linear.shape[-1]
    if implementation is not None:
        if implementation == "triton" and (rows is not None or width > MAX_TRITON_WIDTH):
            raise ValueError(
                f"{OP}: the Triton kernels score all rows, of a width up to {MAX_TRITON_WIDTH}, got rows="
                f"{None if rows is None else tuple(rows.shape)} and width {width}; pass implementation=None"
            )
        return implementation != "reference"
    if rows is not None or width > MAX_TRITON_WIDTH or pooled_q.device.type != "cuda":
        return False
    wants_gradient = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    return pooled_q.dtype in (torch.float16, torch.bfloat16) and not wants_gradient


def _check(
    pooled_q: Tensor,
    pooled_k: Tensor,
    k_linear: Tensor,
    q_linear: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    block_size: int,
) -> None:
    """Raise where shapes or dtypes do not fit each other."""
    for name, x in (("pooled_k", pooled_k), ("k_linear", k_linear), ("q_linear", q_linear)):
        if x is not None and x.dtype != pooled_q.dtype:
            raise TypeError(f"{OP}: {name} is {x.dtype} but pooled_q is {pooled_q.dtype}; convert one of them")
    if pooled_q.dim() != 4 or pooled_k.dim() != 4 or k_linear.dim() != 3:
        raise ValueError(
            f"{OP}: pooled_q must be [B, Hq, N, C_q], pooled_k [B, Hkv, N, C_k] and k_linear [heads, C_k, W], got "
            f"{tuple(pooled_q.shape)}, {tuple(pooled_k.shape)} and {tuple(k_linear.shape)}"
        )
    batch, heads, num, channels = pooled_q.shape
    kv_heads, width = pooled_k.shape[1], k_linear.shape[2]
    if pooled_k.shape[0] != batch or pooled_k.shape[2] != num or not kv_heads or heads % kv_heads:
        raise ValueError(
            f"{OP}: pooled_k must be [{batch}, heads that divide {heads}, {num}, C_k], got {tuple(pooled_k.shape)}"
        )
    if k_linear.shape[0] not in (heads, kv_heads) or k_linear.shape[1] != pooled_k.shape[3]:
        raise ValueError(
            f"{OP}: k_linear must be [{heads} or {kv_heads}, {pooled_k.shape[3]}, W], got {tuple(k_linear.shape)}"
        )
    if (channels != width) if q_linear is None else (tuple(q_linear.shape) != (heads, channels, width)):
        raise ValueError(
            f"{OP}: queries of {channels} channels need q_linear [{heads}, {channels}, {width}], got "
            f"{None if q_linear is None else tuple(q_linear.shape)}"
        )
    if (cos is None) != (sin is None):
        raise ValueError(f"{OP}: pass both cos and sin, or neither")
    if cos is None or sin is None:
        return
    length = cos.shape[1] if cos.dim() == 3 else 0
    if cos.shape != sin.shape or num_blocks(length, block_size) != num or cos.shape[0] not in (1, batch):
        raise ValueError(
            f"{OP}: cos and sin must be [{batch} or 1, T, rotary_dim] with {num} blocks of {block_size} tokens, got "
            f"{tuple(cos.shape)} and {tuple(sin.shape)}"
        )
    if cos.shape[2] > width and cos.shape[2] % width:
        raise ValueError(f"{OP}: a rotary table of {cos.shape[2]} channels fits no vectors of width {width}")
