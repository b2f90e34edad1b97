"""Encoding and scores of query tokens in plain torch: the definition, and the path of the CPU."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..gate_scores import encode_blocks


class Row(NamedTuple):
    """What one row of scores is made of.

    Attributes:
        columns: key blocks of the row, complete or not.
        parts: encoded keys a block.
        scale: factor of the products.
        together: whether the queries are those of a window, which have one row together.
    """

    columns: int
    parts: int
    scale: float
    together: bool


def encode_tokens(
    q: Tensor, linear: Tensor, norm: Tensor | None, cos: Tensor | None, sin: Tensor | None, eps: float
) -> Tensor:
    """See ``interface.encode_tokens``: the linear layer in its own dtype, norm and rotation in float32."""
    batch, _, tokens, _ = q.shape
    heads, channels, width = linear.shape
    # [B, H, T, C], with the query heads that are merged side by side
    x = q.unflatten(1, (heads, -1)).transpose(2, 3).reshape(batch, heads, tokens, channels).to(linear.dtype)
    kind = {"implementation": "reference"}
    if norm is None:
        return encode_blocks(x, linear, cos, sin, **kind).to(linear.dtype)  # type: ignore[arg-type]
    projected = encode_blocks(x, linear, **kind).float()  # type: ignore[arg-type]
    projected = torch.nn.functional.rms_norm(projected, (width,), norm.float(), eps)
    return encode_blocks(projected, None, cos, sin, **kind).to(linear.dtype)  # type: ignore[arg-type]


def token_scores(queries: Tensor, keys: Tensor, row: Row) -> Tensor:
    """See ``interface.token_scores``."""
    batch, kv_heads, count, width = keys.shape
    num = count // row.parts
    grouped = queries.float().reshape(batch, kv_heads, -1, width)  # [B, Hkv, G * R, W]
    whole = keys[:, :, : num * row.parts].float()
    products = (grouped @ whole.transpose(-1, -2)).unflatten(-1, (num, row.parts)).amax(-1) * row.scale
    scores = products.unflatten(2, (-1, queries.shape[2])).amax(2)  # [B, Hkv, R, num]
    if row.together:
        scores = scores.log_softmax(-1).amax(2, keepdim=True)
    return torch.nn.functional.pad(scores, (0, row.columns - num), value=float("-inf"))
