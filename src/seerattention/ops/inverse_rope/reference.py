"""The inverse rotation in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

# Tokens at a time, so that the float32 copies stay small.
PIECE = 1 << 14


def inverse_rope(x: Tensor, cos: Tensor, sin: Tensor, recent: Tensor | None, out: Tensor) -> None:
    old = x.shape[2]
    if recent is not None:
        old -= recent.shape[2]
        out[:, :, old:] = recent
    for start in range(0, old, PIECE):
        piece = slice(start, min(start + PIECE, old))
        out[:, :, piece] = _turn_back(x[:, :, piece], cos[:, None, piece].float(), sin[:, None, piece].float())


def _turn_back(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    width = cos.shape[-1]
    turned, rest = x[..., :width].float(), x[..., width:]
    halves = torch.cat((-turned[..., width // 2 :], turned[..., : width // 2]), -1)
    back = ((turned * cos - halves * sin) / (cos * cos + sin * sin)).to(x.dtype)
    return torch.cat((back, rest), -1) if rest.shape[-1] else back
