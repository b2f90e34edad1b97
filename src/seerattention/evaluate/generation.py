"""Greedy answers to prompts of any lengths, and how likely the right answers were."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from ..hf.prompts import evaluating
from .forward import prompt_device

__all__ = ["answer_losses", "decode_greedily", "generate_answers", "left_padded"]

_OPTIONS = [name for name in GenerationConfig().to_dict() if name != "transformers_version"]


def decode_greedily(
    model: nn.Module,
    prompt: Tensor,
    count: int,
    mask: Tensor | None = None,
    stop: Sequence[int] = (),
    cache: Any = None,
    chunk: int | None = None,
) -> Tensor:
    """The ``count`` tokens that greedy decoding adds to ``prompt [B, T]``, int64 ``[B, count]``.

    Args:
        mask: int64 ``[B, T]``, 0 where a row is padded; None: no padding.
        stop: tokens at which a row ends; what follows them means nothing. If all rows end early the result is shorter.
        cache: an empty cache to decode on, which holds everything but the last token afterwards; None: a fresh one.
        chunk: tokens of the prompt that are read in one forward; None: all of them.
    """
    # What is None in a config, or left out, is filled from the model's own, which may hold penalties and tokens to stop
    # at or to suppress; arguments are not, not even those that are None. The length of an answer is known.
    options = dict.fromkeys(_OPTIONS) | {
        "max_new_tokens": count, "do_sample": False, "num_beams": 1, "num_return_sequences": 1, "use_cache": True,
        "pad_token_id": 0, "eos_token_id": list(stop) or None,
    }  # fmt: skip
    mask = torch.ones_like(prompt) if mask is None else mask
    if cache is not None:
        options["past_key_values"] = cache
    if chunk is not None:
        options["prefill_chunk_size"] = chunk
    with evaluating(model):
        out = model.generate(prompt, attention_mask=mask, **options)  # type: ignore[operator]
    return out[:, prompt.shape[1] : prompt.shape[1] + count]


def left_padded(prompts: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Prompts as rows that end together: token ids and mask, int64 ``[B, T]`` both, padded with token 0."""
    length = max(map(len, prompts))
    ids, mask = torch.zeros(2, len(prompts), length, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        ids[row, length - len(prompt) :] = torch.as_tensor(np.asarray(prompt), dtype=torch.int64)
        mask[row, length - len(prompt) :] = 1
    return ids, mask


@torch.inference_mode()
def generate_answers(
    model: nn.Module, prompts: Sequence[np.ndarray], count: int, stop: Sequence[int] = ()
) -> list[list[int]]:
    """What greedy decoding says to each prompt of a batch: at most ``count`` tokens, without the one it stops at."""
    ids, mask = left_padded(prompts)
    device = prompt_device(model)
    made = decode_greedily(model, ids.to(device), count, mask.to(device), stop).tolist()
    ends = set(stop)
    cut = [next((i for i, token in enumerate(row) if token in ends), len(row)) for row in made]
    return [row[:end] for row, end in zip(made, cut, strict=True)]


@torch.inference_mode()
def answer_losses(model: nn.Module, prompts: Sequence[np.ndarray], answers: Sequence[np.ndarray]) -> np.ndarray:
    """Mean cross entropy in nats a token of one answer to each prompt, float32 ``[prompts]``, with the model as it is.

    A prompt is read as it is before generation, and the answer goes in token by token on its cache: it takes no part in
    what the prompt reads, and counts as decoding.
    """
    device, losses = prompt_device(model), []
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.as_tensor(np.asarray(prompt), dtype=torch.int64, device=device)[None]
        wanted = torch.as_tensor(np.asarray(answer), dtype=torch.int64, device=device)
        told, cache = [], None
        with evaluating(model):
            for token in [ids, *wanted[:-1].view(-1, 1, 1)]:
                out = model(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1)
                cache = out.past_key_values
                told.append(out.logits[:, -1].float())
        losses.append(nn.functional.cross_entropy(torch.cat(told).to(device), wanted))
    return torch.stack(losses).cpu().numpy()
