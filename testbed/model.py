"""A Llama that trains fast on one GPU: linear parts compiled once for all shapes of one token count, cuDNN attention.

Mathematically the same as ``LlamaForCausalLM`` (a test compares them); :func:`export` writes it in that format.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class ModelConfig:
    vocab_size: int = 8192
    width: int = 384
    layers: int = 8
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 64
    mlp_width: int = 960
    rope_theta: float = 5e5
    norm_eps: float = 1e-5
    max_context: int = 32768


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight.to(x.dtype), eps)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


def _qkv(x: Tensor, norm: Tensor, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, eps: float, head_dim: int):
    h = _norm(x, norm, eps)
    n = x.shape[0]
    queries, keys, values = (F.linear(h, w.to(x.dtype)).view(n, -1, head_dim) for w in (q, k, v))
    cos, sin = cos[:, None], sin[:, None]
    return _rotate(queries, cos, sin).to(x.dtype), _rotate(keys, cos, sin).to(x.dtype), values


def _mlp(x: Tensor, attended: Tensor, o: Tensor, norm: Tensor, gate: Tensor, up: Tensor, down: Tensor, eps: float) -> Tensor:
    x = x + F.linear(attended, o.to(x.dtype))
    h = _norm(x, norm, eps)
    return x + F.linear(F.silu(F.linear(h, gate.to(x.dtype))) * F.linear(h, up.to(x.dtype)), down.to(x.dtype))


def _loss(x: Tensor, norm: Tensor, embedding: Tensor, labels: Tensor, weights: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    logits = F.linear(_norm(x, norm, eps), embedding.to(x.dtype)).float()
    each = F.cross_entropy(logits, labels, reduction="none")
    return (each * weights).sum() / weights.sum(), each.detach()


class _Layer(nn.Module):
    def __init__(self, c: ModelConfig) -> None:
        super().__init__()

        def matrix(out: int, width: int, scale: float = 1.0) -> nn.Parameter:
            return nn.Parameter(torch.randn(out, width) * 0.02 * scale)

        residual = 1 / math.sqrt(2 * c.layers)
        self.norm1 = nn.Parameter(torch.ones(c.width))
        self.norm2 = nn.Parameter(torch.ones(c.width))
        self.q = matrix(c.heads * c.head_dim, c.width)
        self.k = matrix(c.kv_heads * c.head_dim, c.width)
        self.v = matrix(c.kv_heads * c.head_dim, c.width)
        self.o = matrix(c.width, c.heads * c.head_dim, residual)
        self.gate = matrix(c.mlp_width, c.width)
        self.up = matrix(c.mlp_width, c.width)
        self.down = matrix(c.width, c.mlp_width, residual)


class FastLlama(nn.Module):
    """Args: config; dtype: of the activations (parameters are float32)."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.config, self.dtype = config, dtype
        self.embedding = nn.Parameter(torch.randn(config.vocab_size, config.width) * 0.02)
        self.norm = nn.Parameter(torch.ones(config.width))
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.layers))
        self._parts: tuple[Any, Any, Any] = (_qkv, _mlp, _loss)

    def compile_parts(self) -> None:
        """Compile everything but attention; shapes depend on tokens a step only, so each token count compiles once."""
        self._parts = tuple(torch.compile(part, dynamic=False) for part in (_qkv, _mlp, _loss))  # type: ignore[assignment]

    def forward(self, ids: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Weighted mean loss, and the loss of each token ``[B * T]``, for ids, labels, weights ``[B, T]``."""
        c = self.config
        batch, length = ids.shape
        qkv, mlp, loss = self._parts
        inverse = 1.0 / (c.rope_theta ** (torch.arange(0, c.head_dim, 2, device=ids.device).float() / c.head_dim))
        angles = torch.arange(length, device=ids.device).repeat(batch).float()[:, None] * inverse[None]
        angles = torch.cat([angles, angles], 1)
        cos, sin = angles.cos(), angles.sin()
        x = self.embedding[ids.reshape(-1)].to(self.dtype)
        for layer in self.layers:
            q, k, v = (
                t.view(batch, length, -1, c.head_dim).transpose(1, 2)
                for t in qkv(x, layer.norm1, layer.q, layer.k, layer.v, cos, sin, c.norm_eps, c.head_dim)
            )
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            attended = attended.transpose(1, 2).reshape(batch * length, -1)
            x = mlp(x, attended, layer.o, layer.norm2, layer.gate, layer.up, layer.down, c.norm_eps)
        return loss(x, self.norm, self.embedding, labels.reshape(-1), weights.reshape(-1), c.norm_eps)


def export(model: FastLlama, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write ``config.json`` and ``model.safetensors`` that ``AutoModelForCausalLM`` loads."""
    from transformers import LlamaConfig, LlamaForCausalLM

    c = model.config
    config = LlamaConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.width,
        intermediate_size=c.mlp_width,
        num_hidden_layers=c.layers,
        num_attention_heads=c.heads,
        num_key_value_heads=c.kv_heads,
        head_dim=c.head_dim,
        max_position_embeddings=c.max_context,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
        rms_norm_eps=c.norm_eps,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
    )
    names = {"norm1": "input_layernorm", "norm2": "post_attention_layernorm"}
    names |= {x: f"self_attn.{x}_proj" for x in "qkvo"} | {x: f"mlp.{x}_proj" for x in ("gate", "up", "down")}
    weights = {"model.embed_tokens.weight": model.embedding, "lm_head.weight": model.embedding, "model.norm.weight": model.norm}
    for i, layer in enumerate(model.layers):
        weights |= {f"model.layers.{i}.{names[name]}.weight": p for name, p in layer.named_parameters()}
    target = LlamaForCausalLM(config)
    target.load_state_dict({name: tensor.detach().float().cpu() for name, tensor in weights.items()})
    target.to(dtype).save_pretrained(folder)
