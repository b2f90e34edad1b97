"""The LM head: from last hidden states to logits, and what families do to these afterwards."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

__all__ = ["logit_changes", "token_logits"]

_CHANGES = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")


def token_logits(model: nn.Module, states: Tensor) -> Tensor:
    """Float32 logits ``[..., vocabulary]`` of hidden states ``[..., hidden]``, as the LM head gives them."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    return head(states.to(head.weight.dtype)).float()


def logit_changes(config: Any) -> dict[str, Any]:
    """What a text config says of changes to the logits after the LM head: names and values of those in force."""
    found = {name: getattr(config, name, None) for name in _CHANGES}
    return {name: value for name, value in found.items() if value not in (None, 1, 1.0, False)}
