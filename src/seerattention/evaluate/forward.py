"""One forward of a whole prompt, and logits only where they are needed.

A prompt of 128K tokens and a vocabulary of 128K would need 64 GiB of float32 logits; every evaluation here runs the
decoder once and applies the LM head to a few positions at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..hf import prompts
from ..hf.architectures import find_decoder
from ..hf.head import logit_changes, token_logits

__all__ = [
    "check_batch_size",
    "check_documents",
    "decoder_states",
    "iterate_token_losses",
    "prompt_device",
    "prompt_options",
    "token_logits",
]

_CHUNK_ELEMENTS = 1 << 26  # logits held at a time: 256 MiB in float32


def decoder_states(model: nn.Module, input_ids: Tensor) -> Tensor:
    """Last hidden states ``[B, T, hidden]`` of a whole prompt ``input_ids [B, T]``, through the model's own attention.

    It is the outermost module that is called: adapters, prompt tuning, compilation and offloading have their say. Of
    families that gates do not support, which can be measured densely, the decoder is called.

    Raises:
        NotImplementedError: the model transforms its logits after the LM head (softcapping, scaling).
    """
    config: Any = model.config.get_text_config()  # type: ignore[union-attr, operator]
    for name, value in logit_changes(config).items():
        raise NotImplementedError(
            f"{type(model).__name__} changes its logits after the LM head ({name}={value}), which evaluation "
            "does not reproduce; supported are models whose logits are the LM head of the last hidden states"
        )
    if _is_supported(model):
        return prompts.last_hidden_states(model, {"input_ids": input_ids})
    decoder = model.get_decoder()  # type: ignore[operator]
    return decoder(input_ids=input_ids, use_cache=False).last_hidden_state


def _is_supported(model: nn.Module) -> bool:
    try:
        find_decoder(model)
    except ValueError:
        return False
    return True


def prompt_options(model: nn.Module) -> dict[str, Any]:
    """Arguments beside ``input_ids`` of a forward that reads a whole prompt for its last token's logits."""
    if _is_supported(model):
        return prompts.prompt_options(model)
    return {"use_cache": False, "logits_to_keep": 1}


def prompt_device(model: nn.Module) -> torch.device:
    """Where prompts belong, offloaded models included."""
    if _is_supported(model):
        return prompts.input_device(model)
    return model.get_input_embeddings().weight.device  # type: ignore[operator]


def check_batch_size(batch_size: Any) -> None:
    """Raise unless it is a whole number of prompts, at least one.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
        raise ValueError(f"batch_size must be a whole number of prompts, at least 1, got {batch_size!r}")


def check_documents(documents: Any, what: str = "documents") -> None:
    """Raise unless token ids are int64 or int32 ``[documents, T]`` with T of at least 2.

    Raises:
        TypeError: no tensor, or of another dtype.
        ValueError: another shape.
    """
    if not isinstance(documents, Tensor):
        raise TypeError(f"{what} must be a tensor [{what}, T], got {type(documents).__name__}; use torch.as_tensor")
    if documents.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{what} must hold token ids, int64 or int32, got {documents.dtype}")
    if documents.dim() != 2 or documents.shape[0] < 1 or documents.shape[1] < 2:
        raise ValueError(f"{what} must be [{what}, T] with T >= 2, got {tuple(documents.shape)}")


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
