"""Dense attention as the untouched model computes it, in the terms in which transformers asks for it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ..ops.dense import dense_attention_with_lse
from .implementation import original_of
from .masks import SeerMask


class Arguments(NamedTuple):
    """What transformers hands to an attention function.

    Attributes:
        module: the attention module.
        query: ``[B, Hq, Tq, D]`` after RoPE.
        key, value: ``[B, Hkv, Tk, D]``, the cache included.
        mask: what ``masks.seer_mask`` made.
        dropout: probability, 0 outside of training.
        scaling: of the scores; None: ``D ** -0.5``.
        options: everything else.
    """

    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Any
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

    def of_first_keys(self, keys: int | None) -> Arguments:
        """Without the room that a static cache has behind its tokens (None: there is none). The mask stays: what it
        says is of tokens only."""
        if keys is None or keys >= self.key.shape[2]:
            return self
        return self._replace(key=self.key[:, :, :keys], value=self.value[:, :, :keys])


def attend_densely(arguments: Arguments) -> tuple[Tensor, Tensor | None]:
    """What the implementation that the model came with computes, given the mask that it would have got.

    Returns:
        ``[B, Tq, Hq, D]``, and the attention probabilities ``[B, Hq, Tq, Tk]`` from implementations that give them.
    """
    module = arguments.module
    original = original_of(module.config)
    attend = dense_function(module, original)
    if original not in ("sdpa", "eager"):
        module = _under_its_own_name(module, original)  # FlashAttention chooses its kernel by the name in the config
    return attend_by(attend, *arguments._replace(module=module))


def attend_by(
    function: Callable[..., Any],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    dropout: float,
    scaling: float | None,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """What an attention function of the untouched model gives, with the mask that it would have got. Arguments by
    themselves: short prompts, in which every call is felt, have no object of them."""
    if mask is not None and isinstance(mask, SeerMask):
        mask = mask.original()
    return function(module, query, key, value, mask, dropout=dropout, scaling=scaling, **options)


def dense_function(module: nn.Module, original: str | None) -> Callable[..., Any]:
    """The function that the module's own forward would have called; "eager" is one of its modelling file."""
    if original == "sdpa":
        return AttentionInterface()[original]
    for kind in type(module).__mro__:
        eager = getattr(sys.modules.get(kind.__module__), "eager_attention_forward", None)
        if eager is not None:
            return AttentionInterface().get_interface(original, eager)  # type: ignore[arg-type]
    return AttentionInterface()[original]


class _Overlay:
    """An object with other values of some attributes; what is set goes to the object."""

    def __init__(self, below: Any, **values: Any):
        self.__dict__.update(values, _below=below)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._below, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._below, name, value)


def _under_its_own_name(module: nn.Module, original: str | None) -> Any:
    """The module as it was before: with ``original`` as the attention implementation in its config."""
    return _Overlay(module, config=_Overlay(module.config, _attn_implementation=original))


def attend_densely_with_lse(arguments: Arguments) -> tuple[tuple[Tensor, Tensor | None], Tensor | None]:
    """:func:`attend_densely` of a whole prompt under causal attention, and its log-sum-exp ``[B, Hq, Tq]`` where sdpa's
    kernel gives one.

    There is none with padding, dropout or gradients, nor where the map itself is asked for, nor for models that came
    with another implementation.
    """
    plain = arguments.mask is None and arguments.dropout == 0 and not arguments.wants_weights
    plain = plain and original_of(arguments.module.config) == "sdpa"
    plain = plain and AttentionInterface()["sdpa"] is sdpa_attention_forward
    plain = plain and arguments.options.get("position_bias") is None
    q, k, v = arguments.query, arguments.key, arguments.value
    if plain and not (torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))):
        found = dense_attention_with_lse(q, k, v, scale=arguments.scaling)
        if found is not None:
            return (found[0].transpose(1, 2).contiguous(), None), found[1]
    return attend_densely(arguments), None
