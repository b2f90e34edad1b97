"""Tiny folders of gates of both layouts, and training states, as the package and the published code write them."""

from __future__ import annotations

import json
from pathlib import Path

import torch

import seerattention as seer
from seerattention.distillation.saved import load_state, save_state
from seerattention.gates import build_gate
from seerattention.gates.checkpoint import GateCheckpoint, gate_tensors, write_checkpoint
from seerattention.gates.sources import load_gates

SHAPE = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16}
CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "hidden_size": 64,
    "rope_theta": 10000.0,
}


def make_gates(config: seer.GateConfig, phase: str = "prefill") -> dict[int, torch.nn.Module]:
    return {layer: build_gate(config.spec_of(phase), **SHAPE) for layer in range(2)}


def write_own(folder: Path, decode: seer.DecodeGateConfig | None = None) -> None:
    torch.manual_seed(0)
    config = seer.GateConfig(block_size=32, decode=decode)
    weights = {}
    for phase in config.phases:
        tensors = gate_tensors(make_gates(config, phase), phase)
        weights.update({name: value.detach() for name, value in tensors.items()})
    base = {"name": "base", "revision": None, **{k: v for k, v in CONFIG.items() if k != "hidden_size"}}
    policies = {"policy": seer.TopK(0.25), "decode_policy": None if decode is None else seer.TokenBudget(64)}
    write_checkpoint(folder, GateCheckpoint(config, base_model=base, weights=weights, source=str(folder), **policies))


def write_own_of_both_phases(folder: Path) -> None:
    write_own(folder, seer.DecodeGateConfig(block_size=16))


def write_published(folder: Path) -> None:
    torch.manual_seed(0)
    folder.mkdir()
    config = {
        **CONFIG,
        "base_model": "owner/base",
        "seerattn_gate_block_size": 64,
        "seerattn_gate_hidden_size": 16,
        "seerattn_gate_type": "Qavg_Kmaxminavg",
        "seerattn_gate_force_double": False,
        "seerattn_sparsity_method": "threshold",
        "seerattn_threshold": 5e-4,
        "seerattn_nz_ratio": 0.5,
        "seerattn_last_block_dense": True,
    }
    (folder / "config.json").write_text(json.dumps(config))
    key = "model.layers.{}.self_attn.attn_gate.mask_linear_k.weight"
    torch.save({key.format(i): torch.randn(4, 48, 16).bfloat16() for i in range(2)}, folder / "attn_gate_weights.pth")


DECODE_ENTRIES = {
    "base_model": "owner/base",
    "seerattn_q_head_pooling_type": "Qproj",
    "seerattn_k_seq_pooling_type": "Kmaxminavg",
    "seerattn_gate_block_size": 16,
    "seerattn_gate_hidden_size": 16,
    "seerattn_loss_slice_ratio": 0.5,
    "seerattn_use_qk_norm": True,
    "seerattn_use_rope": True,
}
DECODE_PREFIX = "model.layers.{}.self_attn.attn_gate.attngate_"


def published_decode_weights(*, qk_norm: bool = True, k_parts: int = 3) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    weights = {}
    for layer in range(2):
        prefix = DECODE_PREFIX.format(layer)
        weights[prefix + "linear_q.weight"] = torch.randn(2, 2, 16, 16).bfloat16()
        weights[prefix + "linear_k.weight"] = torch.randn(2, 16 * k_parts, 16).bfloat16()
        if qk_norm:
            weights[prefix + "qnorm.weight"] = torch.rand(16).bfloat16()
            weights[prefix + "knorm.weight"] = torch.rand(16).bfloat16()
    return weights


def write_published_decode(folder: Path, weights: dict[str, torch.Tensor] | None = None, **entries) -> Path:
    """Decode gates as the published code writes them; entries of None are left out."""
    folder.mkdir()
    data = {key: value for key, value in {**CONFIG, **DECODE_ENTRIES, **entries}.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(data))
    torch.save(published_decode_weights() if weights is None else weights, folder / "attn_gate_weights.pth")
    return folder


def write_states(folder: Path) -> None:
    folder.mkdir()
    tensors = {"gate/layers.0.k": torch.randn(4, 8), "rng/torch": torch.arange(9).byte()}
    meta = {"settings": {"lr": 1e-3, "rows": None}, "step": 3, "history": [1.5, 1.25]}
    save_state(folder / "state.safetensors", tensors | {"optimizer/step/a": torch.tensor(3.0)}, meta)


def load_checkpoint(folder: Path):
    """Everything that decides what the gates compute."""
    checkpoint = load_gates(folder, CONFIG)
    weights = {}
    for phase in checkpoint.gate_config.phases:
        gates = make_gates(checkpoint.gate_config, phase)
        checkpoint.load_into(gates, phase)
        weights.update({name: value.detach() for name, value in gate_tensors(gates, phase).items()})
    return checkpoint.gate_config, (checkpoint.policy, checkpoint.decode_policy), weights


def load_training(folder: Path):
    tensors, meta = load_state(folder / "state.safetensors")
    return json.dumps(meta), None, tensors
