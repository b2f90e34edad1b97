"""Dense attention as transformers computes it, in the terms in which transformers asks for it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ..ops.dense import dense_attention_with_lse


class Arguments(NamedTuple):
    """What transformers hands to an attention function.

    Attributes:
        module: the attention module.
        query: ``[B, Hq, Tq, D]`` after RoPE.
        key, value: ``[B, Hkv, Tk, D]``, the cache included.
        mask: what ``attention.seer_mask`` made.
        dropout: probability, 0 outside of training.
        scaling: of the scores; None: ``D ** -0.5``.
        options: everything else.
    """

    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    dropout: float
    scaling: float | None
    options: dict[str, Any]

    @property
    def scale(self) -> float:
        """The scaling that counts."""
        return float(self.scaling) if self.scaling is not None else self.query.shape[-1] ** -0.5

    @property
    def wants_weights(self) -> bool:
        """Whether the attention probabilities are asked for, in the call or in the model's config."""
        asked = self.options.get("output_attentions")
        return bool(getattr(self.module.config, "output_attentions", False) if asked is None else asked)


def attend_densely(arguments: Arguments) -> tuple[Tensor, Tensor | None]:
    """transformers' own dense attention, given the mask that it would have got.

    Returns:
        ``[B, Tq, Hq, D]``, and the attention probabilities ``[B, Hq, Tq, Tk]`` where they were asked for, else None.
    """
    mask = arguments.mask
    if mask is not None and mask.dim() == 2:
        length = mask.shape[-1]
        causal = torch.ones(length, length, dtype=torch.bool, device=mask.device).tril()
        mask = causal & mask[:, None, None, :]
    if arguments.wants_weights:
        return _with_weights(arguments, mask)
    return AttentionInterface()["sdpa"](
        arguments.module,
        arguments.query,
        arguments.key,
        arguments.value,
        mask,
        dropout=arguments.dropout,
        scaling=arguments.scaling,
        **arguments.options,
    )


def attend_densely_with_lse(arguments: Arguments) -> tuple[tuple[Tensor, Tensor | None], Tensor | None]:
    """:func:`attend_densely` of a whole prompt under causal attention, and its log-sum-exp ``[B, Hq, Tq]`` where sdpa's
    kernel gives one.

    There is none with padding, dropout or gradients, nor where the map itself is asked for.
    """
    plain = arguments.mask is None and arguments.dropout == 0 and not arguments.wants_weights
    plain = plain and AttentionInterface()["sdpa"] is sdpa_attention_forward
    plain = plain and arguments.options.get("position_bias") is None
    q, k, v = arguments.query, arguments.key, arguments.value
    if plain and not (torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))):
        found = dense_attention_with_lse(q, k, v, scale=arguments.scaling)
        if found is not None:
            return (found[0].transpose(1, 2).contiguous(), None), found[1]
    return attend_densely(arguments), None


def _with_weights(arguments: Arguments, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Dense attention written out, for ``output_attentions=True``."""
    query, group = arguments.query, arguments.query.shape[1] // arguments.key.shape[1]
    key, value = arguments.key.repeat_interleave(group, 1), arguments.value.repeat_interleave(group, 1)
    scores = query @ key.transpose(-1, -2) * arguments.scale
    if mask is None:
        rows, columns = scores.shape[-2:]
        mask = torch.ones(rows, columns, dtype=torch.bool, device=scores.device).tril(columns - rows)
    if mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    else:
        scores = scores + mask
    weights = torch.nn.functional.dropout(scores.softmax(-1, dtype=torch.float32).to(query.dtype), arguments.dropout)
    return (weights @ value).transpose(1, 2).contiguous(), weights
