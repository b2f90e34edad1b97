"""What the two ops of attention on lists share."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from . import dispatch
from .indices import BlockIndices, in_order
from .span import Span


def attend(
    function: Callable[..., tuple[Tensor, Tensor | None]],
    tensors: tuple[Tensor, Tensor, Tensor],
    blocks: BlockIndices,
    span: Span,
    scale: float,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    """Run an implementation of attention on q, k and v as an op gives its results: the second is empty without lse."""
    q = tensors[0]
    with torch.no_grad(), dispatch.without_autocast(q.device.type):
        if 0 in q.shape or span.keys == 0:
            shape = q.shape[:3] if return_lse else (0,)
            return torch.zeros_like(q), torch.full(shape, -math.inf, dtype=torch.float32, device=q.device)
        out, lse = function(*tensors, in_order(blocks, span), scale, return_lse)
        return out, lse if return_lse and lse is not None else q.new_empty(0, dtype=torch.float32)


def empty_results(q: Tensor, return_lse: bool) -> tuple[Tensor, Tensor]:
    """What :func:`attend` returns, without values: for tracers."""
    return torch.empty_like(q), q.new_empty(q.shape[:3] if return_lse else (0,), dtype=torch.float32)
