"""Layers that differ: heads, windows, rotary tables, scales; fused projections; fingerprints that follow."""

from __future__ import annotations

import inspect
import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb as apply_partial_rotary_pos_emb

import seerattention as seer
from seerattention.gates.geometry import Geometry, fingerprint
from seerattention.hf import FAMILIES, Family, gates_of
from seerattention.hf.state import state_of

PLAIN = {
    "model_type": "llama",
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "hidden_size": 64,
    "rope_theta": 10000.0,
}


@torch.inference_mode()
def probe(model, ids, **inputs):
    seen = []
    with seer.observe(model, lambda layer_inputs, blocks: seen.append((layer_inputs, blocks))):
        logits = model(ids, **inputs).logits
    return logits, seen


# ---- a toy family: fused projections per group, heads, rotary width and scale of its own ---------------------------


def older_arguments(length):
    """What older versions of transformers ask for besides."""
    asked = inspect.signature(create_causal_mask).parameters
    return {"cache_position": torch.arange(length)} if "cache_position" in asked else {}


class ToyConfig(PreTrainedConfig):
    model_type = "toy"

    def __init__(self, **options):
        self.num_hidden_layers, self.hidden_size, self.head_dim = 2, 64, 16
        self.num_attention_heads, self.num_key_value_heads = [4, 8], [2, 4]
        self.partial_rotary_factor, self.vocab_size = 0.5, 97
        super().__init__(**options)


class ToyAttention(nn.Module):
    def __init__(self, config, index):
        super().__init__()
        self.config, self.layer_idx, self.is_causal, self.head_dim = config, index, True, config.head_dim
        self.heads, self.kv_heads = config.num_attention_heads[index], config.num_key_value_heads[index]
        self.num_key_value_groups, self.scaling = self.heads // self.kv_heads, (0.1, 0.6)[index]
        self.wqkv = nn.Linear(64, (self.heads + 2 * self.kv_heads) * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.head_dim, 64, bias=False)

    def forward(self, hidden_states, position_embeddings, attention_mask=None, **options):
        grouped = self.wqkv(hidden_states).unflatten(-1, (self.kv_heads, -1, self.head_dim))
        query = grouped[..., :-2, :].flatten(2, 3).transpose(1, 2)
        key, value = grouped[..., -2, :].transpose(1, 2), grouped[..., -1, :].transpose(1, 2)
        query, key = apply_partial_rotary_pos_emb(query, key, *position_embeddings)
        attend = AttentionInterface()[self.config._attn_implementation]
        attended = attend(self, query, key, value, attention_mask, scaling=self.scaling, **options)[0]
        return self.o_proj(attended.flatten(2))


class ToyLayer(nn.Module):
    def __init__(self, config, index):
        super().__init__()
        self.self_attn = ToyAttention(config, index)

    def forward(self, hidden, **options):
        return hidden + self.self_attn(hidden_states=F.rms_norm(hidden, (64,)), **options)


class ToyModel(PreTrainedModel):
    config_class = ToyConfig
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens, self.lm_head = nn.Embedding(97, 64), nn.Linear(64, 97, bias=False)
        self.layers = nn.ModuleList(ToyLayer(config, index) for index in range(2))
        self.post_init()

    @classmethod
    def _can_set_attn_implementation(cls):
        return True  # transformers looks for its own words in the file

    def _init_weights(self, module):
        if isinstance(module, nn.Linear | nn.Embedding):
            module.weight.data.normal_(std=0.15)

    def forward(self, input_ids, attention_mask=None, position_ids=None):
        hidden = self.embed_tokens(input_ids)
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1])[None]
        angles = position_ids[..., None] / 100 ** (torch.arange(4) / 4)
        table = torch.cat((angles, angles), -1)
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=hidden,
            attention_mask=attention_mask,
            past_key_values=None,
            position_ids=position_ids,
            **older_arguments(input_ids.shape[1]),
        )
        for layer in self.layers:
            options = {"position_ids": position_ids, "position_embeddings": (table.cos(), table.sin())}
            hidden = layer(hidden, attention_mask=mask, **options)
        return SimpleNamespace(logits=self.lm_head(hidden))


def by_group(query, key, geometry):
    """``[B, T, Hkv * (G + 2) * D]``: the queries of a group, their key, their value."""
    query, key = (x.unflatten(-1, (geometry.num_kv_heads, -1, geometry.head_dim)) for x in (query, key))
    return query[..., :-2, :].flatten(2, 3).transpose(1, 2), key[..., -2, :].transpose(1, 2)


@pytest.fixture
def toy(monkeypatch):
    """One line is what a family takes."""
    monkeypatch.setitem(FAMILIES, "toy", Family("wqkv", "wqkv", by_group))
    torch.manual_seed(0)
    return ToyModel(ToyConfig()).eval()


def test_a_toy_family_of_fused_projections_and_unlike_layers(toy, ids_of):
    ids = ids_of(150, batch=2)
    expected = toy(ids).logits
    seer.attach(toy, seer.GateConfig(block_size=32), prefill=seer.TopK(1.0), min_context=0)
    logits, seen = probe(toy, ids)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert [blocks.density() for _, blocks in seen] == [1.0, 1.0]
    for inputs, _ in seen:
        q, k = apply_partial_rotary_pos_emb(inputs.q_pre, inputs.k_pre, inputs.cos, inputs.sin)
        assert torch.equal(q, inputs.q)
        assert torch.equal(k, inputs.k)
    assert [(inputs.q.shape[1], inputs.k.shape[1]) for inputs, _ in seen] == [(4, 2), (8, 4)]
    assert [inputs.scale for inputs, _ in seen] == [0.1, 0.6]
    assert [(gate.num_heads, gate.num_kv_heads) for gate in gates_of(toy)] == [(4, 2), (8, 4)]
    assert [layer.geometry.rotary_dim for layer in state_of(toy).layers] == [8, 8]
    seer.set_policy(toy, seer.TokenBudget(32))
    assert not torch.equal(probe(toy, ids)[0], logits)
    seer.detach(toy)
    assert torch.equal(toy(ids).logits, expected)


def test_a_padded_row_of_a_toy_family_is_the_row_alone(toy, ids_of):
    ids, mask = ids_of(150, batch=2), torch.ones(2, 150, dtype=torch.long)
    mask[0, :61] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    seer.attach(toy, seer.GateConfig(block_size=32), prefill=seer.TopK(0.4), min_context=0)
    padded, _ = probe(toy, ids, attention_mask=mask, position_ids=positions)
    alone, _ = probe(toy, ids[:1, 61:])
    torch.testing.assert_close(padded[:1, 61:], alone, rtol=1e-4, atol=1e-4)


def test_gates_of_unlike_layers_are_saved_and_know_their_model(toy, tmp_path):
    seer.attach(toy, seer.GateConfig(block_size=32))
    seer.save_gates(toy, tmp_path)
    base = json.loads((tmp_path / "gate_config.json").read_text())["base_model"]
    assert base["num_attention_heads"] == "4, 8"
    assert base["num_key_value_heads"] == "2, 4"
    assert base["head_dim"] == 16
    assert base["rotary_dim"] == 8
    weights = [gate.k_linear.detach().clone() for gate in gates_of(toy)]
    seer.detach(toy)
    seer.attach(toy, tmp_path)
    assert all(torch.equal(gate.k_linear, weight) for gate, weight in zip(gates_of(toy), weights, strict=True))
    other = ToyModel(ToyConfig(num_attention_heads=[8, 8])).eval()
    with pytest.raises(ValueError, match="num_attention_heads: the gates are for 4, 8, the model has 8"):
        seer.attach(other, tmp_path)


# ---- a family as it comes: layer types with rotary tables of their own ---------------------------------------------


def test_rotary_tables_by_layer_type(ids_of):
    """Gemma 3: windows in most layers, two rotary tables, norms that give heads first, a scale of its own."""
    config = Gemma3TextConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=16,
        query_pre_attn_scalar=40,
        sliding_window=40,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
        },
        initializer_range=0.3,
    )
    torch.manual_seed(0)
    model, ids = Gemma3ForCausalLM(config).eval(), ids_of(150, batch=2)
    with torch.inference_mode():
        expected = model(ids).logits
    seer.attach(model, seer.GateConfig(block_size=32), prefill=seer.TopK(1.0), min_context=0)
    logits, seen = probe(model, ids)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert [gate is None for gate in gates_of(model)] == [True, False, True]
    assert [layer.geometry.window for layer in state_of(model).layers] == [40, None, 40]
    [(inputs, blocks)] = seen
    assert (inputs.layer, inputs.scale) == (1, pytest.approx(40**-0.5))
    assert blocks.density() == 1.0
    q, k = apply_rotary_pos_emb(inputs.q_pre, inputs.k_pre, inputs.cos, inputs.sin)
    assert torch.equal(q, inputs.q)
    assert torch.equal(k, inputs.k)
    assert fingerprint(config)["rope_theta"] == "10000.0, 1000000.0, 10000.0"
    seer.set_policy(model, seer.TokenBudget(32))
    assert not torch.equal(probe(model, ids)[0], logits)
    generated = model.generate(ids, max_new_tokens=3, do_sample=False)
    assert generated.shape == (2, 153)


# ---- shapes and fingerprints of configs ----------------------------------------------------------------------------


def test_the_fingerprint_of_like_layers_is_what_it_was():
    """Gates and training states that were saved before still find their model."""
    assert fingerprint(PLAIN) == {
        "model_type": "llama",
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "rope_theta": 10000.0,
    }


@pytest.mark.parametrize(
    ("entries", "name", "expected"),
    [
        ({"num_attention_heads": [8, 8, 4], "head_dim": 8}, "num_attention_heads", "2x 8, 4"),
        ({"num_attention_heads_per_layer": [4, 8, 8]}, "num_attention_heads", "4, 2x 8"),
        ({"num_key_value_heads": [2, 2, 2]}, "num_key_value_heads", 2),
        ({"head_dim": [16, 32, 16]}, "head_dim", "16, 32, 16"),
        ({"rope_parameters": {"rope_theta": 5}}, "rope_theta", 5.0),
        ({"rope_parameters": {"partial_rotary_factor": 0.25}, "head_dim": 32}, "rotary_dim", 8),
        ({"partial_rotary_factor": 0.5}, "rotary_dim", 4),
        ({"partial_rotary_factor": 1.0}, "rotary_dim", None),
        (
            {
                "layer_types": ["a", "b", "b"],
                "rope_parameters": {"a": {"rope_theta": 1}, "b": {"rope_theta": 2, "partial_rotary_factor": 0.5}},
            },
            "rope_theta",
            "1.0, 2x 2.0",
        ),
    ],
)
def test_fingerprints_follow_layers(entries, name, expected):
    for config in ({**PLAIN, **entries}, SimpleNamespace(**{**PLAIN, **entries})):
        assert fingerprint(config).get(name) == expected


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"num_attention_heads": [8, 8]}, "num_attention_heads must have an entry for each layer, got 2"),
        ({"num_attention_heads": [8, 0, 8], "head_dim": 8}, "no valid num_attention_heads: got 0"),
        ({"head_dim": [8, "16", 8]}, "no valid head_dim"),
        ({"rope_parameters": {"a": {"rope_theta": "x"}}, "layer_types": ["a"] * 3}, "rope_theta must be a number"),
        ({"rope_parameters": 3}, "rope_parameters must be a mapping"),
    ],
)
def test_bad_configs(entries, message):
    with pytest.raises(ValueError, match=message):
        fingerprint({**PLAIN, **entries})


def test_shape_of_a_layer():
    config = {**PLAIN, "num_key_value_heads": [2, 4, 8], "head_dim": 16}
    assert [Geometry.of(config, layer) for layer in range(3)] == [Geometry(8, n, 16) for n in (2, 4, 8)]
    assert Geometry.of(PLAIN) == Geometry(8, 2, 8)


@pytest.mark.parametrize("saved_partial", [True, False])
def test_gates_of_another_rotary_width_are_refused(model_of, tmp_path, saved_partial):
    partial = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    whole = {"rope_type": "default", "rope_theta": 10000.0}
    saved, present = (partial, whole) if saved_partial else (whole, partial)
    model = seer.attach(model_of("phi3", rope_parameters=dict(saved)), seer.GateConfig())
    seer.save_gates(model, tmp_path)
    seer.attach(model_of("phi3", rope_parameters=dict(saved)), tmp_path)
    if saved_partial:
        with pytest.raises(ValueError, match="rotary_dim: the gates are for 8"):
            seer.attach(model_of("phi3", rope_parameters=dict(present)), tmp_path)
    else:  # nothing was said of it by earlier versions either
        seer.attach(model_of("phi3", rope_parameters=dict(present)), tmp_path)
