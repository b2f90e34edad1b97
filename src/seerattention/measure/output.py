"""How much sparse attention changes what a model says next: the divergence from its own dense output."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..hf.contexts import dense
from ..hf.head import logit_changes, token_logits
from ..hf.prompts import last_hidden_states
from .stats import Statistics, record

# Positions of a prompt whose next token is looked at, evenly spread, and logits that exist at a time: 128 MB.
_POSITIONS, _CHUNK = 512, 1 << 25


class DenseOutput:
    """What a model says next at some positions of prompts when its attention is dense, to compare with.

    The hidden states are kept, not the distributions, which are a hundred times larger.

    Args:
        model: attached, with an LM head.
        prompts: as :func:`~seerattention.hf.prompts.check_batch` gives them.
        advice: what to do where nothing can be compared, for the end of messages.

    Raises:
        ValueError: the model has no LM head, or changes its logits in a way that is not known here.
    """

    def __init__(self, model: nn.Module, prompts: Sequence[Mapping[str, Any]], advice: str = "") -> None:
        self.model, self.prompts, self.advice = model, prompts, f"; {advice}" if advice else ""
        self.head = _Head(model, self.advice)
        with dense(model):
            self.dense = list(self._states())

    @torch.no_grad()
    def changed(self) -> tuple[float, Statistics]:
        """Mean divergence of the next token's distribution, with the attention in force, from the dense one's in nats;
        and what was recorded meanwhile.

        Raises:
            ValueError: what the model says is not finite.
        """
        total = weights = 0.0
        with record(self.model) as seen:
            for (states, counts), (wanted, _) in zip(self._states(), self.dense, strict=True):
                step = max(1, _CHUNK // (self.head.vocabulary * len(states)))
                for found, target, some in zip(*(x.split(step, 1) for x in (states, wanted, counts)), strict=True):
                    dense_as, sparse_as = self.head(target), self.head(found)
                    divergence = (dense_as.exp() * (dense_as - sparse_as)).sum(-1)
                    total += float((divergence * some.to(divergence.device)).sum())
                weights += float(counts.sum())
        if not math.isfinite(total):
            raise ValueError(
                "what the model says next is not finite on these prompts, and cannot be compared; does it overflow in "
                f"float16? Load it in bfloat16 or float32{self.advice}"
            )
        return total / weights, seen

    def _states(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Of each prompt ``[B, positions, hidden]``, and which of these are tokens, float32 ``[B, positions]``."""
        for prompt in self.prompts:
            states = last_hidden_states(self.model, prompt)
            length = states.shape[1]
            index = torch.linspace(0, length - 1, min(length, _POSITIONS)).round().long()
            mask = prompt.get("attention_mask")
            counts = torch.ones(states.shape[0], length) if mask is None else mask.float()
            yield states[:, index.to(states.device)], counts[:, index.to(counts.device)].to(states.device)


class _Head:
    """Logarithms of the next token's probabilities, float32 ``[..., vocabulary]``, from states ``[..., hidden]``."""

    def __init__(self, model: nn.Module, advice: str) -> None:
        head: Any = getattr(model, "get_output_embeddings", lambda: None)()
        config: Any = getattr(model, "config", None)
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        changes = logit_changes(config)
        self.scale = float(changes.pop("logits_scaling", 1))
        self.cap = changes.pop("final_logit_softcapping", None)
        if head is None or changes:
            what = f"changes its logits ({', '.join(changes)})" if changes else "has no LM head"
            raise ValueError(
                "what the model says next cannot be compared with its dense output: "
                f"{type(model).__name__} {what}{advice}"
            )
        self.model, self.vocabulary = model, int(head.weight.shape[0])

    def __call__(self, states: Tensor) -> Tensor:
        logits = token_logits(self.model, states) / self.scale
        if self.cap:
            logits = (logits / self.cap).tanh() * self.cap
        return logits.log_softmax(-1)
