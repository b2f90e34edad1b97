"""A Llama that trains fast on one GPU: linear parts compiled once for all shapes of one token count, cuDNN attention.

Mathematically the same as ``LlamaForCausalLM`` (a test compares them); :func:`export` writes it in that format.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: Tokens of a piece: where a layer is kept near, a token sees its own piece and the one before.
PIECE = 16


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


def _qkv(x: Tensor, norm: Tensor, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, eps: float):
    h = _norm(x, norm, eps)
    n, head_dim = x.shape[0], cos.shape[-1]
    queries, keys, values = (F.linear(h, w.to(x.dtype)).view(n, -1, head_dim) for w in (q, k, v))
    cos, sin = cos[:, None], sin[:, None]
    return _rotate(queries, cos, sin).to(x.dtype), _rotate(keys, cos, sin).to(x.dtype), values


def _near(q: Tensor, k: Tensor, v: Tensor, opens: Tensor) -> Tensor:
    """Attention ``[N, H * D]`` of tokens ``[N, H, D]`` to their own piece, causally, and to the whole one before.

    ``opens`` ``[N / PIECE]``: pieces that begin a sequence, and so have none before.
    """
    pieces, kv_heads, head_dim = len(opens), k.shape[1], q.shape[2]
    q = q.reshape(pieces, PIECE, kv_heads, -1, head_dim)
    k, v = (x.reshape(pieces, PIECE, kv_heads, head_dim) for x in (k, v))
    k, v = (torch.cat([x.roll(1, 0), x], 1) for x in (k, v))
    key = torch.arange(2 * PIECE, device=q.device)
    seen = key <= torch.arange(PIECE, device=q.device)[:, None] + PIECE
    seen = seen & ((key >= PIECE) | ~opens[:, None])[:, None]
    scores = torch.einsum("pqhgd,pkhd->phgqk", q, k).float() / math.sqrt(head_dim)
    shares = scores.masked_fill(~seen[:, None, None], float("-inf")).softmax(-1).to(v.dtype)
    return torch.einsum("phgqk,pkhd->pqhgd", shares, v).reshape(pieces * PIECE, -1)


def _mlp(
    x: Tensor, attended: Tensor, o: Tensor, norm: Tensor, gate: Tensor, up: Tensor, down: Tensor, eps: float
) -> Tensor:
    x = x + F.linear(attended, o.to(x.dtype))
    h = _norm(x, norm, eps)
    return x + F.linear(F.silu(F.linear(h, gate.to(x.dtype))) * F.linear(h, up.to(x.dtype)), down.to(x.dtype))


def _loss(
    x: Tensor, norm: Tensor, embedding: Tensor, labels: Tensor, weights: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
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
        self._parts: tuple[Any, Any, Any, Any] = (_qkv, _near, _mlp, _loss)

    def compile_parts(self) -> None:
        """Compile everything but attention; shapes depend on tokens a step only, so each token count compiles once."""
        self._parts = tuple(torch.compile(part, dynamic=False) for part in (_qkv, _near, _mlp, _loss))  # type: ignore[assignment]

    def forward(
        self,
        ids: Tensor,
        labels: Tensor,
        weights: Tensor,
        positions: Tensor | None = None,
        far: Collection[int] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Weighted mean loss, and the loss of each token ``[B * T]``, for ids, labels, weights ``[B, T]``.

        ``positions`` (int64 ``[B, T]``, increasing) are those of RoPE; None: 0, 1, ... in every row. ``far``: the
        layers that see all tokens before; the others see those near by (``PIECE``, of which T is a multiple). None: all
        layers do, as the exported model's.
        """
        c = self.config
        batch, length = ids.shape
        qkv, near, mlp, loss = self._parts
        if far is not None:
            opens = torch.arange(batch * length // PIECE, device=ids.device) % (length // PIECE) == 0
        inverse = 1.0 / (c.rope_theta ** (torch.arange(0, c.head_dim, 2, device=ids.device).float() / c.head_dim))
        places = torch.arange(length, device=ids.device).repeat(batch) if positions is None else positions.reshape(-1)
        angles = places.float()[:, None] * inverse[None]
        angles = torch.cat([angles, angles], 1)
        cos, sin = angles.cos(), angles.sin()
        x = self.embedding[ids.reshape(-1)].to(self.dtype)
        for i, layer in enumerate(self.layers):
            q, k, v = qkv(x, layer.norm1, layer.q, layer.k, layer.v, cos, sin, c.norm_eps)
            if far is None or i in far:
                q, k, v = (t.view(batch, length, -1, c.head_dim).transpose(1, 2) for t in (q, k, v))
                attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
                attended = attended.transpose(1, 2).reshape(batch * length, -1)
            else:
                attended = near(q, k, v, opens)
            x = mlp(x, attended, layer.o, layer.norm2, layer.gate, layer.up, layer.down, c.norm_eps)
        return loss(x, self.norm, self.embedding, labels.reshape(-1), weights.reshape(-1), c.norm_eps)


def spread(batch: int, length: int, reach: int, device: str, *, most_jumps: int = 12) -> Tensor:
    """Positions ``[B, T]`` that run on by one, but for a few random jumps, and end before ``reach``.

    Look-up over long distances is learnt from short sequences that way, at their cost: a jump stands for text that was
    left out. One row in three has no jump.
    """
    jumps = torch.zeros(batch, length, device=device)
    places = torch.randint(1, length, (batch, most_jumps), device=device)
    used = torch.arange(most_jumps, device=device) < torch.randint(1, most_jumps + 1, (batch, 1), device=device)
    shares = torch.rand(batch, most_jumps, device=device).log() * used
    shares = shares / shares.sum(1, keepdim=True).clamp(max=-1e-9)
    gone = torch.rand(batch, 1, device=device) * max(0, reach - length) * (torch.rand(batch, 1, device=device) < 2 / 3)
    jumps.scatter_add_(1, places, shares * gone)
    return torch.arange(length, device=device) + jumps.cumsum(1).long()


# Fields of ModelConfig, and what LlamaConfig calls them.
_HF_FIELDS = {
    "vocab_size": "vocab_size",
    "width": "hidden_size",
    "mlp_width": "intermediate_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "max_context": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
}


def export(model: FastLlama, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write ``config.json`` and ``model.safetensors`` that ``AutoModelForCausalLM`` loads."""
    from transformers import LlamaConfig, LlamaForCausalLM

    c = model.config
    config = LlamaConfig(
        **{theirs: getattr(c, ours) for ours, theirs in _HF_FIELDS.items()},
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
    )
    target: Any = LlamaForCausalLM(config)
    weights = {name: p.detach().float().cpu() for name, p in _hf_names(model).items()}
    target.load_state_dict(weights | {"lm_head.weight": weights["model.embed_tokens.weight"]})
    target.to(dtype).save_pretrained(folder)


def read(folder: Path, dtype: torch.dtype = torch.bfloat16) -> FastLlama:
    """The model that :func:`export` wrote to ``folder``, to be trained on; activations in ``dtype``."""
    from transformers import AutoModelForCausalLM

    source: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    c = source.config
    fields = {ours: getattr(c, theirs) for ours, theirs in _HF_FIELDS.items()}
    config = ModelConfig(**fields, rope_theta=c.rope_parameters["rope_theta"])
    model, weights = FastLlama(config, dtype), source.state_dict()
    with torch.no_grad():
        for name, parameter in _hf_names(model).items():
            parameter.copy_(weights[name])
    return model


def _hf_names(model: FastLlama) -> dict[str, nn.Parameter]:
    """The parameters under the names that ``LlamaForCausalLM`` gives them."""
    names = {"norm1": "input_layernorm", "norm2": "post_attention_layernorm"}
    names |= {x: f"self_attn.{x}_proj" for x in "qkvo"} | {x: f"mlp.{x}_proj" for x in ("gate", "up", "down")}
    parameters = {"model.embed_tokens.weight": model.embedding, "model.norm.weight": model.norm}
    for i, layer in enumerate(model.layers):
        parameters |= {f"model.layers.{i}.{names[name]}.weight": p for name, p in layer.named_parameters()}
    return parameters
