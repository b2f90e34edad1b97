"""Tiny random models of every supported family."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

import seerattention as seer
from seerattention.selectors import GateSelector, Selector

VOCABULARY = 97

_SHARED = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    # The default 0.02 makes attention almost uniform, and wrong blocks would go unnoticed.
    "initializer_range": 0.3,
}
CONFIGS = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "phi3": Phi3Config,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
}
HEAD_DIMS = {"llama": 16, "mistral": 32, "phi3": 16, "qwen2": 16, "qwen3": 32}


def make_model(family: str = "llama", *, seed: int = 0, dtype: torch.dtype = torch.float32, **options) -> nn.Module:
    """A random model in eval mode; ``options`` are entries of its config."""
    head_dim = {} if family in ("phi3", "qwen2") else {"head_dim": HEAD_DIMS[family]}
    torch.manual_seed(seed)
    config = CONFIGS[family](**{**_SHARED, **head_dim, **options})
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def make_vlm() -> nn.Module:
    """A random vision-language model around a Llama, in eval mode; token 96 stands for a picture."""
    text = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16}
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaConfig(
        text_config=CONFIGS["llama"](**text, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3),
        vision_config=CLIPVisionConfig(**vision, image_size=28, patch_size=14),
        image_token_index=96,
    )
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(config).eval()


def make_ids(length: int, *, batch: int = 1, seed: int = 0) -> torch.Tensor:
    """Random tokens ``[batch, length]`` without special ones."""
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def logits_of(model, ids, **inputs) -> torch.Tensor:
    """Of one forward of all tokens."""
    return model(ids, **inputs).logits


def attach(model, policy=None, **options) -> nn.Module:
    """Fresh gates for blocks of 32, the same ones every time; sparse however short the prompt is."""
    torch.manual_seed(1)
    return seer.attach(model, seer.GateConfig(block_size=32), prefill=policy, **{"min_context": 0, **options})


def gradients_of(model, ids) -> dict[str, torch.Tensor]:
    """Of the language model's loss, by parameter; the model's own are taken away."""
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    found = {name: value.grad.clone() for name, value in model.named_parameters()}
    model.zero_grad()
    return found


@dataclass(frozen=True)
class Watched(Selector, registered=False):
    """The gate's selector, which remembers what it saw and chose."""

    inner: GateSelector
    seen: list

    kind, needs_gate, takes_chunks, rowwise = "watched", True, True, True

    def select(self, inputs):
        blocks = self.inner.select(inputs)
        self.seen.append((inputs, blocks))
        return blocks
