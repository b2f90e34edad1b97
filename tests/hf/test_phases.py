"""What a model has for each phase: gates, policies and selectors, in the model and in its layers."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

import seerattention as seer
from seerattention.hf import gates_of, is_attached
from seerattention.hf.state import state_of
from seerattention.selectors import SELECTORS, GateSelector, LayerInputs, Selector


@torch.inference_mode()
def logits_of(model, ids, **inputs):
    return model(ids, **inputs).logits


def attach(model, policy=None, **options):
    torch.manual_seed(1)
    return seer.attach(model, seer.GateConfig(block_size=32), prefill=policy, **{"min_context": 0, **options})


def blocks_of(model, ids, **inputs):
    found = []
    with seer.observe(model, lambda inputs, blocks: found.append(blocks)):
        logits_of(model, ids, **inputs)
    return found


@pytest.fixture
def kinds():
    """Selectors that a test defines are gone afterwards."""
    known = dict(SELECTORS)
    yield
    SELECTORS.clear()
    SELECTORS.update(known)


def test_a_sparse_policy_for_a_phase_without_gates_is_refused(model_of):
    model = model_of()
    with pytest.raises(ValueError, match=r"TokenBudget\(.*'prefill', for which this model has no gates"):
        seer.attach(model, seer.GateConfig(prefill=None, decode=seer.DecodeGateConfig()), prefill=seer.TokenBudget(64))
    assert not is_attached(model)


def test_each_phase_has_its_own_block_size(model_of, ids_of, tmp_path):
    model, ids = model_of(), ids_of(150)
    config = seer.GateConfig(block_size=64, prefill=seer.PrefillGateConfig(block_size=32))
    seer.attach(model, config, prefill=seer.TopK(0.5), min_context=0)
    expected = blocks_of(model, ids)
    assert [blocks.block_size for blocks in expected] == [32, 32]
    assert state_of(model).block_size == gates_of(model)[0].block_size == 32
    seer.save_gates(model, tmp_path)
    assert "32x32 blocks" in (tmp_path / "README.md").read_text()
    again = seer.attach(model_of(), tmp_path, min_context=0)
    assert state_of(again).gate_config == config
    assert all(torch.equal(a.to_mask(), b.to_mask()) for a, b in zip(blocks_of(again, ids), expected, strict=True))


def test_policies_by_phase(model_of, ids_of):
    model, ids = model_of(), ids_of(160)
    attach(model, seer.TokenBudget(32))
    seer.set_policy(model, layers={1: {"prefill": seer.Dense(), "decode": seer.Dense()}})
    assert [blocks is None for blocks in blocks_of(model, ids)] == [False, True]
    seer.set_policy(model, seer.TopK(1.0), decode=seer.TopK(1.0), layers={1: {"prefill": None}})
    assert [blocks.density() for blocks in blocks_of(model, ids)] == [1.0, 1.0]
    assert [layer.phases.keys() for layer in state_of(model).layers] == [{"prefill"}] * 2  # decoding stays dense


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"layers": {0: seer.Dense(), 1: {"training": seer.Dense()}}}, ValueError, "phases prefill, decode"),
        ({"layers": {0: seer.Dense(), 1: {"decode": seer.TopK(0.5)}}}, ValueError, "has no gates"),
        ({"layers": {0: seer.Dense(), 1: {"prefill": 0.5}}}, TypeError, "policy"),
        ({"layers": {0: seer.Dense(), True: seer.Dense()}}, ValueError, "0 to 1"),
        ({"layers": {0: seer.Dense()}, "decode": seer.TopK(0.5)}, ValueError, "has no gates"),
    ],
)
def test_a_wrong_policy_changes_nothing(model_of, options, error, message):
    model = model_of()
    attach(model, seer.TopK(0.5))
    with pytest.raises(error, match=message):
        seer.set_policy(model, seer.TopK(0.1), **options)
    assert state_of(model).policy == seer.TopK(0.5)
    assert [layer.policy for layer in state_of(model).layers] == [None, None]


def test_decoding_is_dense_where_a_layer_has_nothing_for_it(model_of, ids_of):
    model, ids = model_of(), ids_of(100)
    attach(model, seer.TokenBudget(32))
    with torch.inference_mode():
        cache = model(ids, use_cache=True).past_key_values
        with seer.record(model) as stats:
            model(ids[:, :1], past_key_values=cache)
    assert (stats.sparse_calls, stats.dense_calls) == (0, 2)


def test_gate_and_policy_are_a_selector_as_others(model_of, ids_of):
    model, twin, ids = model_of(), model_of(), ids_of(150)
    attach(model, seer.TopK(0.3))
    attach(twin, seer.Dense(), selector=GateSelector(seer.TopK(0.3)))
    assert torch.equal(logits_of(model, ids), logits_of(twin, ids))
    assert [layer.selector("prefill") for layer in state_of(model).layers] == [GateSelector(seer.TopK(0.3))] * 2
    assert [layer.selector("decode") for layer in state_of(model).layers] == [None, None]


def test_a_selector_that_asks_gates_needs_some(model_of, ids_of):
    model = model_of()
    with pytest.raises(ValueError, match="selector 'gate' asks the layers' gates"):
        seer.attach(model, selector=GateSelector(seer.TopK(0.5)))
    # One of the layers has a window: it gets no gate, and is dense where the window does not matter either.
    model = model_of("qwen2", use_sliding_window=True, sliding_window=512, max_window_layers=1)
    attach(model, selector=GateSelector(seer.TokenBudget(32)))
    assert [gate is None for gate in gates_of(model)] == [False, True]
    assert [blocks is None for blocks in blocks_of(model, ids_of(150))] == [False, True]


def test_selectors_see_what_gates_see(model_of, ids_of, kinds):
    """A toy method in one class: by what the keys are before RoPE."""

    @dataclass(frozen=True)
    class Loudest(Selector):
        keep: int = 1

        kind = "loudest"
        rowwise = True

        def select(self, inputs: LayerInputs) -> seer.BlockIndices:
            seen.append(inputs)
            loudness = seer.ops.block_pooling(inputs.k_pre.norm(dim=-1, keepdim=True), ("max",), block_size=32)
            scores = loudness.mT.expand(-1, -1, loudness.shape[2], -1)
            return seer.TokenBudget(32 * self.keep).select(scores.float(), block_size=32, lengths=inputs.lengths)

    seen: list[LayerInputs] = []
    model, ids = model_of(), ids_of(160)
    seer.attach(model, selector=seer.baselines.parse_selectors("loudest:keep=2")["loudest:keep=2"], min_context=0)
    blocks = blocks_of(model, ids)
    assert [b.to_mask().sum(-1).max().item() for b in blocks] == [2, 2]
    assert [(inputs.layer, inputs.phase, inputs.gate) for inputs in seen] == [
        (0, "prefill", None),
        (1, "prefill", None),
    ]
    assert seen[0].cos.shape == (1, 160, 16)
    assert not torch.equal(seen[0].k_pre, seen[0].k)
