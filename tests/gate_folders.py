"""Tiny folders of gates of both layouts, and training states, as the package and the published code write them."""

from __future__ import annotations

import json
from pathlib import Path

import torch

import seerattention as seer
from seerattention.distillation.saved import load_state, save_state
from seerattention.gates import build_gate
from seerattention.gates.checkpoint import GateCheckpoint, write_checkpoint
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


def make_gates(config: seer.GateConfig) -> dict[int, torch.nn.Module]:
    return {layer: build_gate(config.prefill, block_size=config.block_size, **SHAPE) for layer in range(2)}


def write_own(folder: Path) -> None:
    torch.manual_seed(0)
    config = seer.GateConfig(block_size=32)
    weights = {
        f"layers.{layer}.prefill.{name}": value.detach()
        for layer, gate in make_gates(config).items()
        for name, value in gate.named_parameters()
    }
    base = {"name": "base", "revision": None, **{k: v for k, v in CONFIG.items() if k != "hidden_size"}}
    write_checkpoint(folder, GateCheckpoint(config, seer.TopK(0.25), base, weights, str(folder)))


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


def write_states(folder: Path) -> None:
    folder.mkdir()
    tensors = {"gate/layers.0.k": torch.randn(4, 8), "rng/torch": torch.arange(9).byte()}
    meta = {"settings": {"lr": 1e-3, "rows": None}, "step": 3, "history": [1.5, 1.25]}
    save_state(folder / "state.safetensors", tensors | {"optimizer/step/a": torch.tensor(3.0)}, meta)


def load_checkpoint(folder: Path):
    """Everything that decides what the gates compute."""
    checkpoint = load_gates(folder, CONFIG)
    gates = make_gates(checkpoint.gate_config)
    checkpoint.load_into(gates)
    weights = {(i, name): value.detach() for i, gate in gates.items() for name, value in gate.named_parameters()}
    return checkpoint.gate_config, checkpoint.policy, weights


def load_training(folder: Path):
    tensors, meta = load_state(folder / "state.safetensors")
    return json.dumps(meta), None, tensors
