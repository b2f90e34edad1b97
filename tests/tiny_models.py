"""Tiny random models of every supported family."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    Gemma3TextConfig,
    Glm4Config,
    GraniteConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
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
    "gemma3_text": Gemma3TextConfig,
    "glm4": Glm4Config,
    "granite": GraniteConfig,
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "olmo2": Olmo2Config,
    "phi3": Phi3Config,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "qwen3_moe": Qwen3MoeConfig,
}
HEAD_DIMS = {
    "gemma3_text": 32,
    "glm4": 32,
    "granite": 16,
    "llama": 16,
    "mistral": 32,
    "olmo2": 16,
    "phi3": 16,
    "qwen2": 16,
    "qwen3": 32,
    "qwen3_moe": 32,
}
# Where head_dim follows from hidden_size.
DERIVED_HEAD_DIM = ("granite", "olmo2", "phi3", "qwen2")
# What a family has besides, unlike the defaults of its config where these would hide a mistake.
OWN = {
    # Two layers with gates, as in the others, and one with a window, which stays dense.
    "gemma3_text": {
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        "sliding_window": 48,
        "query_pre_attn_scalar": 40,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
        },
    },
    "glm4": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
    "granite": {
        "attention_multiplier": 0.4,
        "embedding_multiplier": 2.0,
        "logits_scaling": 4.0,
        "residual_multiplier": 0.7,
    },
    "qwen3_moe": {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2},
}


def make_model(family: str = "llama", *, seed: int = 0, dtype: torch.dtype = torch.float32, **options) -> nn.Module:
    """A random model in eval mode; ``options`` are entries of its config."""
    head_dim = {} if family in DERIVED_HEAD_DIM else {"head_dim": HEAD_DIMS[family]}
    own = copy.deepcopy(OWN.get(family, {}))  # some configs edit theirs
    torch.manual_seed(seed)
    config = CONFIGS[family](**{**_SHARED, **head_dim, **own, **options})
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
