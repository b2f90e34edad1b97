"""Dense causal attention that also returns its log-sum-exp, through the kernels of torch's SDPA.

SDPA computes the log-sum-exp of every query and drops it. Calling its kernels directly keeps it, at no cost but storing
it, and the output is that of the same kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

__all__ = ["dense_attention_with_lse"]


@torch.no_grad()
def dense_attention_with_lse(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, backend: SDPBackend | None = None
) -> tuple[Tensor, Tensor] | None:
    """What ``scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)`` computes, and its log-sum-exp.

    Args:
        q: ``[B, Hq, T, D]``; k, v: ``[B, Hkv, T, D]``, Hq a multiple of Hkv.
        scale: softmax scale; None is ``D ** -0.5``.
        backend: the kernel; None is the one that SDPA would choose for these tensors.

    Returns:
        The output ``[B, Hq, T, D]`` and the natural-log ``lse``, float32 ``[B, Hq, T]``; None where the kernel cannot
        give it (the caller then runs SDPA itself). There is no gradient.

    Raises:
        RuntimeError: the backend that was asked for cannot run on these tensors.
    """
    if q.dim() != 4 or k.shape != v.shape or q.shape[2] != k.shape[2] or q.shape[3] != k.shape[3] or 0 in q.shape:
        return None
    if q.device.type not in ("cpu", "cuda"):
        return None
    gqa = q.shape[1] != k.shape[1]
    if backend is None:
        choice = torch._fused_sdp_choice(q, k, v, None, 0.0, True, scale=scale, enable_gqa=gqa)
        backend = SDPBackend(choice)
    aten = torch.ops.aten
    if q.device.type == "cpu":
        if backend != SDPBackend.FLASH_ATTENTION:
            return None
        group = q.shape[1] // k.shape[1]
        if group > 1:  # as SDPA does there
            k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True, scale=scale)
    elif backend == SDPBackend.CUDNN_ATTENTION:
        out, lse = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, True, scale=scale)[:2]
    elif q.shape[3] % 8:
        return None  # SDPA would pad the heads first
    elif backend == SDPBackend.FLASH_ATTENTION:
        out, lse = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True, scale=scale)[:2]
    elif backend == SDPBackend.EFFICIENT_ATTENTION and not gqa:
        out, lse = aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, True, scale=scale)[:2]
    else:
        return None
    # cuDNN's may be [B, H, T, 1], that of the efficient kernel is padded to a multiple of 32 queries.
    lse = lse.squeeze(-1) if lse.dim() == 4 else lse
    return out, lse[..., : q.shape[2]].float()
