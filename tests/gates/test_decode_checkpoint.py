"""Decode gates on disk: the published layout, and this package's own, alone and beside prefill gates."""

from __future__ import annotations

import json

import pytest
import torch

import seerattention as seer
from gate_folders import (
    CONFIG,
    DECODE_ENTRIES,
    DECODE_PREFIX,
    make_gates,
    published_decode_weights,
    write_own,
    write_published_decode,
)
from seerattention.files import DamagedFileError
from seerattention.gates.checkpoint import GateCheckpoint, gate_tensors, read_checkpoint, write_checkpoint
from seerattention.gates.sources import convert, join, load_gates


def loaded(checkpoint, phase="decode"):
    gates = make_gates(checkpoint.gate_config, phase)
    checkpoint.load_into(gates, phase)
    return gates


def test_the_published_layout_keeps_its_bits_and_is_converted(tmp_path):
    folder = write_published_decode(tmp_path / "gate")
    checkpoint = load_gates(folder, CONFIG)
    assert checkpoint.gate_config == seer.GateConfig(
        prefill=None, decode=seer.DecodeGateConfig(width=16, block_size=16)
    )
    assert checkpoint.policy == seer.Dense()
    assert checkpoint.base_model["name"] == "owner/base"
    converted = read_checkpoint(convert(folder, tmp_path / "converted"))
    data = json.loads((tmp_path / "converted" / "gate_config.json").read_text())
    assert data["gates"]["decode"]["form"] == "seerattention_r"
    assert (converted.gate_config, converted.policy) == (checkpoint.gate_config, checkpoint.policy)
    assert converted.decode_policy == checkpoint.decode_policy == seer.TokenBudget(4096)
    names = {"linear_q": "q_linear", "linear_k": "k_linear", "qnorm": "q_norm", "knorm": "k_norm"}
    weights = published_decode_weights()
    for source in (checkpoint, converted):
        for layer, gate in loaded(source).items():
            parameters = dict(gate.named_parameters())
            assert set(parameters) == set(names.values())
            for theirs, ours in names.items():
                expected = weights[DECODE_PREFIX.format(layer) + f"{theirs}.weight"]
                assert torch.equal(source.weights[f"layers.{layer}.decode.{ours}"], expected)
                assert torch.equal(parameters[ours], expected.float())
    card = (tmp_path / "converted" / "README.md").read_text()
    assert "blocks of 16 cached keys" in card
    assert "prefill" not in card


FORMS = {
    "no norm": ({"seerattn_use_qk_norm": False}, {"qk_norm": False}, {"qk_norm": False}),
    "no rope": ({"seerattn_use_rope": False}, {"rope": False}, {}),
    "mean only": ({"seerattn_k_seq_pooling_type": "Kavg"}, {"k_pooling": ("avg",)}, {"k_parts": 1}),
    "other order": ({"seerattn_k_seq_pooling_type": "Kavgmax"}, {"k_pooling": ("avg", "max")}, {"k_parts": 2}),
    "defaults": (
        dict.fromkeys(set(DECODE_ENTRIES) - {"seerattn_q_head_pooling_type"}),
        {"width": None, "block_size": 64},
        {},
    ),
}


@pytest.mark.parametrize("case", FORMS)
def test_published_forms(tmp_path, case):
    entries, options, shape = FORMS[case]
    folder = write_published_decode(tmp_path / "gate", published_decode_weights(**shape), **entries)
    checkpoint = load_gates(folder, CONFIG)
    assert checkpoint.gate_config.decode == seer.DecodeGateConfig(**{"width": 16, "block_size": 16, **options})
    loaded(checkpoint)


POLICIES = {
    "budget": ({"seerattn_sparsity_method": "token_budget", "seerattn_token_budget": 512}, seer.TokenBudget(512)),
    "budget not given": ({"seerattn_sparsity_method": "token_budget"}, seer.TokenBudget(4096)),
    "threshold": ({"seerattn_sparsity_method": "threshold", "seerattn_threshold": 4e-3}, seer.Threshold(4e-3)),
    "threshold unnamed": ({"seerattn_threshold": 4e-3}, seer.Threshold(4e-3)),
    "placeholder": (
        {"seerattn_sparsity_method": "threshold", "seerattn_threshold": 0.0, "seerattn_token_budget": 2048},
        seer.TokenBudget(4096),
    ),
}


@pytest.mark.parametrize("case", POLICIES)
def test_published_policies(tmp_path, case):
    entries, policy = POLICIES[case]
    assert load_gates(write_published_decode(tmp_path / "gate", **entries), CONFIG).decode_policy == policy


BAD = {
    "pooling": {"seerattn_k_seq_pooling_type": "Kmedian"},
    "block size": {"seerattn_gate_block_size": 48},
    "type": {"seerattn_use_qk_norm": 1},
    "method": {"seerattn_sparsity_method": "nz_ratio"},
    "budget": {"seerattn_sparsity_method": "token_budget", "seerattn_token_budget": 0},
}


@pytest.mark.parametrize("case", BAD)
def test_published_entries_are_checked(tmp_path, case):
    with pytest.raises(DamagedFileError, match="no valid gates"):
        load_gates(write_published_decode(tmp_path / "gate", **BAD[case]), CONFIG)


def test_published_folders_that_cannot_be_read(tmp_path):
    with pytest.raises(NotImplementedError, match="Qavgproj"):
        load_gates(write_published_decode(tmp_path / "merged", seerattn_q_head_pooling_type="Qavgproj"), CONFIG)
    weights = published_decode_weights()
    weights["model.layers.0.self_attn.attn_gate.mask_linear_k.weight"] = torch.ones(2, 48, 16)
    with pytest.raises(DamagedFileError, match=r"unexpected keys: .*mask_linear_k"):
        load_gates(write_published_decode(tmp_path / "both", weights), CONFIG)
    missing = load_gates(write_published_decode(tmp_path / "norms", published_decode_weights(qk_norm=False)), CONFIG)
    with pytest.raises(DamagedFileError, match=r"missing: layers\.0\.decode\.k_norm"):
        loaded(missing)


def test_gates_of_both_phases_are_saved_together(tmp_path):
    config = seer.GateConfig(32, decode=seer.DecodeGateConfig(block_size=16))
    base = {"name": "base", "revision": None, **{k: v for k, v in CONFIG.items() if k != "hidden_size"}}
    draft = GateCheckpoint(config, seer.TopK(0.25), base, {}, "here", seer.TokenBudget(64))
    made = {phase: make_gates(config, phase) for phase in config.phases}
    for phase, gates in made.items():
        draft.weights.update({name: value.detach() for name, value in gate_tensors(gates, phase).items()})
    checkpoint = read_checkpoint(write_checkpoint(tmp_path / "gates", draft))
    assert checkpoint.gate_config == config
    assert (checkpoint.policy, checkpoint.decode_policy) == (draft.policy, draft.decode_policy)
    for phase, gates in made.items():
        for layer, gate in loaded(checkpoint, phase).items():
            for name, parameter in gate.named_parameters():
                assert torch.equal(parameter, gates[layer].get_parameter(name))
    card = (tmp_path / "gates" / "README.md").read_text()
    assert "| decode policy |" in card
    assert "32x32 blocks" in card
    data = json.loads((tmp_path / "gates" / "gate_config.json").read_text())
    data["policies"]["decode"]["tokens"] = 128
    (tmp_path / "gates" / "gate_config.json").write_text(json.dumps(data))
    assert read_checkpoint(tmp_path / "gates").decode_policy == seer.TokenBudget(128)


def test_weights_of_a_phase_without_gates_are_unexpected(tmp_path):
    checkpoint = load_gates(write_published_decode(tmp_path / "gate"), CONFIG)
    checkpoint.weights["layers.0.prefill.k_linear"] = torch.ones(1)
    with pytest.raises(DamagedFileError, match=r"unexpected: layers\.0\.prefill\.k_linear"):
        loaded(checkpoint)


def test_gates_of_both_phases_are_joined(tmp_path):
    write_own(tmp_path / "prompts")
    published = write_published_decode(tmp_path / "decoding")
    parts = {"prefill": load_gates(tmp_path / "prompts", CONFIG), "decode": load_gates(published, CONFIG)}
    joined = read_checkpoint(join(tmp_path / "prompts", published, tmp_path / "both"))
    assert joined.gate_config == seer.GateConfig(block_size=32, decode=seer.DecodeGateConfig(width=16, block_size=16))
    assert (joined.policy, joined.decode_policy) == (seer.TopK(0.25), seer.TokenBudget(4096))
    assert joined.weights.keys() == parts["prefill"].weights.keys() | parts["decode"].weights.keys()
    for part in parts.values():
        assert all(torch.equal(joined.weights[name], value) for name, value in part.weights.items())
    for phase in ("prefill", "decode"):
        loaded(joined, phase)
    # Again, with a source that has both already: what it has for the other phase is left out.
    again = read_checkpoint(join(tmp_path / "both", tmp_path / "both", tmp_path / "both"))
    assert again.gate_config == joined.gate_config
    assert again.weights.keys() == joined.weights.keys()


def test_fine_decode_gates_are_joined(tmp_path):
    form = seer.DecodeGateConfig(block_size=16, k_pitch=8, merge_heads=False)
    write_own(tmp_path / "prompts")
    write_own(tmp_path / "decoding", form)
    joined = read_checkpoint(join(tmp_path / "prompts", tmp_path / "decoding", tmp_path / "both"))
    assert joined.gate_config.decode == form
    assert all((gate.k_pitch, gate.config.merge_heads) == (8, False) for gate in loaded(joined, "decode").values())
    assert '`{"form": "seerattention_r"' in (tmp_path / "both" / "README.md").read_text()
    assert '"k_pitch": 8, "merge_heads": false' in (tmp_path / "both" / "README.md").read_text()


def test_a_query_window_is_stored_where_there_is_one(tmp_path):
    """A missing one is 1: folders of earlier versions, which did not know it, are what they were."""
    write_own(tmp_path / "alone", seer.DecodeGateConfig(block_size=16))
    assert "query_window" not in (tmp_path / "alone" / "gate_config.json").read_text()
    assert read_checkpoint(tmp_path / "alone").gate_config.decode.query_window == 1
    write_own(tmp_path / "together", seer.DecodeGateConfig(block_size=16, query_window=8))
    write_own(tmp_path / "prompts")
    joined = read_checkpoint(join(tmp_path / "prompts", tmp_path / "together", tmp_path / "both"))
    assert joined.gate_config.decode.query_window == 8
    assert all(gate.query_window == 8 for gate in loaded(joined, "decode").values())
    assert '"query_window": 8' in (tmp_path / "both" / "README.md").read_text()
    with pytest.raises(ValueError, match="query_window must be a number of tokens from 1"):
        seer.GateConfig.from_dict({"block_size": 64, "prefill": None, "decode": {"query_window": 100}})


def test_gates_that_cannot_be_joined(tmp_path):
    write_own(tmp_path / "prompts")
    write_published_decode(tmp_path / "decoding")
    with pytest.raises(ValueError, match="no gates for 'decode', only for prefill"):
        join(tmp_path / "prompts", tmp_path / "prompts", tmp_path / "out")
    with pytest.raises(ValueError, match="no gates for 'prefill', only for decode"):
        join(tmp_path / "decoding", tmp_path / "decoding", tmp_path / "out")
    write_published_decode(tmp_path / "other", num_attention_heads=8)
    with pytest.raises(ValueError, match="different base models: num_attention_heads: 4 and 8"):
        join(tmp_path / "prompts", tmp_path / "other", tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="no folder of gates"):
        join(tmp_path / "prompts", tmp_path / "nothing", tmp_path / "out")
    assert not (tmp_path / "out").exists()
