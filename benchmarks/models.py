"""Models in the shape of published ones with random weights: nothing is downloaded, and nothing passes the host."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    LlamaConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from seerattention.evaluate.kernels import dense_kernels

_MAX_TOKENS = 131072
# Attention of random weights averages nearly everything away. Enlarged, it weighs as much as the MLP, so that checks of
# the whole model see what it does; speed does not depend on it.
_ATTENTION_GAIN = 4.0


@dataclass(frozen=True)
class ModelShape:
    """A model's config class and entries, as published; context lengths are raised to 128K where they are shorter."""

    config_class: type[PretrainedConfig]
    entries: dict[str, Any]

    def config(self, layers: int | None = None) -> Any:
        """The config, with fewer layers if asked for."""
        entries = dict(self.entries)
        if layers is not None:
            entries["num_hidden_layers"] = layers
        make: Any = self.config_class
        return make(max_position_embeddings=_MAX_TOKENS, use_cache=False, **entries)


def _qwen2(hidden: int, mlp: int, layers: int, heads: int, kv_heads: int, head_dim: int) -> dict[str, Any]:
    """Entries of a Qwen2.5 model."""
    return {
        "vocab_size": 151936,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        "tie_word_embeddings": True,
    }


MODELS = {
    "llama-3.1-8b": ModelShape(
        LlamaConfig,
        {
            "vocab_size": 128256,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        },
    ),
    "qwen3-4b": ModelShape(
        Qwen3Config,
        {
            "vocab_size": 151936,
            "hidden_size": 2560,
            "intermediate_size": 9728,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
            "tie_word_embeddings": True,
        },
    ),
    "smollm2-135m": ModelShape(
        LlamaConfig,
        {
            "vocab_size": 49152,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "head_dim": 64,
            "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
            "tie_word_embeddings": True,
        },
    ),
    "qwen2.5-0.5b": ModelShape(Qwen2Config, _qwen2(896, 4864, 24, 14, 2, 64)),
    "qwen2.5-1.5b": ModelShape(Qwen2Config, _qwen2(1536, 8960, 28, 12, 2, 128)),
    "tiny": ModelShape(
        LlamaConfig,
        {
            "vocab_size": 256,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "initializer_range": 0.1,  # queries and keys of size 1, as the others' wider layers give
        },
    ),
}


def build_model(name: str, layers: int, device: torch.device, dtype: torch.dtype) -> Any:
    """The model with random weights from a fixed seed, made on the device, in evaluation mode."""
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(MODELS[name].config(layers), dtype=dtype)
    model.eval().requires_grad_(False)
    for layer in model.get_decoder().layers:
        layer.self_attn.o_proj.weight.mul_(_ATTENTION_GAIN)
    return model


def lower_right() -> str:
    """The name of an attention implementation for chunks on a cache, without a mask in memory: cuDNN's attention, to
    the cached keys and to the chunk's own apart (of head_dim**-0.5, as the models here scale)."""

    def attend(module: nn.Module, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> tuple[Any, None]:
        kernels = dense_kernels(query, key, value)
        names = [name for name in kernels if name.startswith("cuDNN")] or list(kernels)
        return kernels[names[0]]().transpose(1, 2), None

    AttentionInterface.register("lower_right", attend)
    return "lower_right"


def unmasked() -> str:
    """The name of torch's attention for whole prompts, without a mask in memory.

    While CUDA records a graph transformers makes a mask, also where the causal one would do, and torch's attention then
    takes a kernel half as fast: no fair opponent.
    """
    AttentionInterface.register("unmasked", sdpa_attention_forward)
    AttentionMaskInterface.register("unmasked", lambda *args, **kwargs: None)
    return "unmasked"


def num_layers(name: str) -> int:
    """Layers of the whole model."""
    return int(MODELS[name].entries["num_hidden_layers"])


def random_tokens(name: str, length: int, count: int = 1) -> torch.Tensor:
    """Prompts ``[count, length]`` of random tokens."""
    vocabulary = int(MODELS[name].entries["vocab_size"])
    return torch.randint(0, vocabulary, (count, length), generator=torch.Generator().manual_seed(1))


@contextmanager
def without_layers(model: nn.Module) -> Iterator[None]:
    """The model as embeddings and head alone: what does not grow with the number of layers."""
    config: Any = model.config
    layers = config.num_hidden_layers
    config.num_hidden_layers = 0  # decoders of transformers walk through this many of their layers
    try:
        yield
    finally:
        config.num_hidden_layers = layers
