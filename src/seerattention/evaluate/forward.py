"""One forward of a whole prompt, and logits only where they are needed.

A prompt of 128K tokens and a vocabulary of 128K would need 64 GiB of float32 logits; every evaluation here runs the
decoder once and applies the LM head to a few positions at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

__all__ = ["decoder_states", "iterate_token_losses", "token_logits"]

# Output transformations that families apply after the LM head; this package's families have none of them.
_UNSUPPORTED_HEADS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")
_CHUNK_ELEMENTS = 1 << 26  # logits held at a time: 256 MiB in float32


def decoder_states(model: nn.Module, input_ids: Tensor) -> Tensor:
    """Last hidden states ``[B, T, hidden]`` of a whole prompt ``input_ids [B, T]``, through the model's own attention.

    Raises:
        NotImplementedError: the model transforms its logits after the LM head (softcapping, scaling).
    """
    config: Any = model.config.get_text_config()  # type: ignore[union-attr, operator]
    for name in _UNSUPPORTED_HEADS:
        if getattr(config, name, None) not in (None, 1, 1.0, False):
            raise NotImplementedError(
                f"{type(model).__name__} changes its logits after the LM head ({name}={getattr(config, name)}), which "
                "evaluation "
                "does not reproduce; supported are models whose logits are the LM head of the last hidden states"
            )
    decoder = model.get_decoder()  # type: ignore[operator]
    return decoder(input_ids=input_ids, use_cache=False).last_hidden_state


def token_logits(model: nn.Module, states: Tensor) -> Tensor:
    """Float32 logits ``[..., vocabulary]`` of hidden states ``[..., hidden]``."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    return head(states.to(head.weight.dtype)).float()


def iterate_token_losses(model: nn.Module, input_ids: Tensor) -> Iterator[Tensor]:
    """Cross entropy in nats of tokens 1..T-1 given their prefixes, float32 ``[B, chunk]`` at a time, in order."""
    states = decoder_states(model, input_ids)
    vocabulary = model.get_output_embeddings().weight.shape[0]  # type: ignore[operator]
    chunk = max(1, _CHUNK_ELEMENTS // (vocabulary * input_ids.shape[0]))
    for start in range(0, input_ids.shape[1] - 1, chunk):
        stop = min(start + chunk, input_ids.shape[1] - 1)
        logits = token_logits(model, states[:, start:stop])
        targets = input_ids[:, start + 1 : stop + 1].to(logits.device)
        yield nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)
        del logits
