"""Launches that are bound and replayed, and prompts in CUDA graphs, give what calls one by one give."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import seerattention as seer
from plan_cases import note_repeats
from seerattention.hf import attention, gates_of
from seerattention.ops import block_pooling, replay, triton_launch
from tiny_models import make_ids, make_model

POLICIES = [seer.TopK(0.3), seer.TokenBudget(128), seer.Threshold(0.05), seer.TopP(0.7), seer.RelativeThreshold(1.5)]
POLICIES.append(seer.RelativeThreshold(0.4, exponent=0.5))
POLICIES.append(seer.Budget(0.3, blocks=(2.0, 9.0), factors=(0.5, 1.5)))
POLICIES.append(seer.Budget(0.2, blocks=(2.0, 9.0), factors=(0.5, 1.5), layers=(0.5, 2.0)))
POLICIES.append(seer.RelativeThreshold(1.2, layers=(2.0, 0.5)))
SUB_BLOCKS = seer.GateConfig(prefill=seer.SubBlockGateConfig())
MASS = seer.GateConfig(prefill=seer.SubBlockGateConfig(q_pitch=4, k_pitch=4, reduce="mass"))


def attached(policy, config=None, **options):
    torch.manual_seed(0)
    model = make_model("llama", dtype=torch.bfloat16, head_dim=64).cuda()
    return seer.attach(model, config or seer.GateConfig(), prefill=policy, min_context=0, **options)


@torch.inference_mode()
def logits_of(model, ids, **inputs):
    return model(input_ids=ids, **inputs).logits


@pytest.fixture
def ordinary(monkeypatch):
    """A function that runs another one with every launch through the JIT."""

    def run(function):
        with monkeypatch.context() as changed:
            changed.setattr(triton_launch, "KNOWN", False)
            return function()

    return run


@pytest.mark.parametrize("config", [None, SUB_BLOCKS, MASS], ids=["paper", "sub_block", "mass"])
@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_replays_equal_ordinary_launches(policy, config, ordinary):
    model = attached(policy, config)
    for length in (1000, 1000, 1000, 1024, 1024, 1024, 1000):
        ids = make_ids(length, seed=length).cuda()
        assert torch.equal(logits_of(model, ids), ordinary(lambda ids=ids: logits_of(model, ids)))


def test_replays_on_streams_of_their_own():
    model, ids = attached(seer.TopK(0.3)), make_ids(1000).cuda()
    expected = logits_of(model, ids)
    for _ in range(3):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                found = logits_of(model, ids)
        torch.cuda.current_stream().wait_stream(stream)
        assert torch.equal(found, expected)


@pytest.mark.parametrize("config", [None, SUB_BLOCKS, MASS], ids=["paper", "sub_block", "mass"])
@pytest.mark.parametrize("policy", [POLICIES[0], POLICIES[-1]], ids=str)
def test_a_layer_is_replayed(policy, config, monkeypatch):
    """Else what is tested above would be nothing."""
    model, ids, calls = attached(policy, config), make_ids(1000).cuda(), []
    for _ in range(2):
        logits_of(model, ids)
    launch = replay.Recording.launch
    monkeypatch.setattr(replay.Recording, "launch", lambda *given: calls.append(1) or launch(*given))
    logits_of(model, ids)
    assert len(calls) == model.config.num_hidden_layers
    calls.clear()
    for _ in range(3):
        with seer.record(model):
            logits_of(model, ids)
    assert len(calls) >= 2 * model.config.num_hidden_layers  # lists that are looked at, and attention


@pytest.fixture
def repeated(monkeypatch):
    """Indices of the layers that repeated what another one did."""
    return note_repeats(monkeypatch)


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "gemma3_text", "glm4"])
@pytest.mark.parametrize("use_cache", [False, True])
def test_layers_repeat_what_the_first_one_did(family, use_cache, repeated, monkeypatch):
    """As calls one by one; GLM-4's queries and keys are more than views."""
    torch.manual_seed(0)
    model = make_model(family, dtype=torch.bfloat16, num_hidden_layers=3).cuda()
    seer.attach(model, seer.GateConfig(), prefill=seer.TopK(0.3), min_context=0)
    for seed in range(4):
        ids = make_ids(1000, seed=seed).cuda()
        repeated.clear()
        found = logits_of(model, ids, use_cache=use_cache)
        again = list(repeated)
        with monkeypatch.context() as changed:
            changed.setattr(attention, "make_plan", lambda *given: None)
            assert torch.equal(found, logits_of(model, ids, use_cache=use_cache))
    assert again == {"glm4": [], "gemma3_text": [2]}.get(family, [1, 2])


@pytest.mark.parametrize("config", [None, MASS], ids=["paper", "mass"])
@pytest.mark.parametrize(
    "policy", [seer.RelativeThreshold(1.2, dense_rows=2), seer.Budget(0.3, (2.0, 9.0), (0.7, 1.5))]
)
def test_layers_with_factors_of_their_own_repeat_what_the_first_one_did(policy, config, repeated):
    """Each by its own table: as with a policy for each layer, and not as with one for all."""
    torch.manual_seed(0)
    model = make_model("llama", dtype=torch.bfloat16, head_dim=64, num_hidden_layers=3).cuda()
    seer.attach(model, config or seer.GateConfig(), prefill=policy, min_context=0)
    times, num = (0.4, 1.0, 2.5), 3
    by_layer = dataclasses.replace(policy, layers=times)
    own = {i: dataclasses.replace(by_layer, layers=(times[i],) * num) for i in range(num)}
    for seed in range(4):
        ids = make_ids(1000, seed=seed).cuda()
        alike = logits_of(model, ids)
        seer.set_policy(model, policy, layers=own)
        expected = logits_of(model, ids)
        seer.set_policy(model, by_layer, layers=dict.fromkeys(own))
        repeated.clear()
        with seer.record(model) as stats:
            found = logits_of(model, ids)
        assert torch.equal(found, expected)
        assert torch.equal(logits_of(model, ids), expected)
        assert not torch.equal(found, alike)
        assert stats.per_layer[0] > stats.per_layer[2]
        seer.set_policy(model, policy)
    seer.set_policy(model, by_layer)
    repeated.clear()
    assert torch.equal(logits_of(model, ids), expected)
    assert repeated == [1, 2]


def test_a_layer_with_something_of_its_own_repeats_nothing(repeated):
    """A gate that was moved comes back, and launches go to the stream of their layer."""
    torch.manual_seed(0)
    model = make_model("llama", dtype=torch.bfloat16, head_dim=64, num_hidden_layers=3).cuda()
    seer.attach(model, seer.GateConfig(), prefill=seer.TopK(0.3), min_context=0)
    ids = make_ids(1000).cuda()
    for _ in range(3):
        expected = logits_of(model, ids)
    assert repeated[-2:] == [1, 2]
    repeated.clear()
    gates_of(model)[1].cpu()
    assert torch.equal(logits_of(model, ids), expected)
    assert repeated == [2]
    assert next(gates_of(model)[1].parameters()).device == ids.device
    side, layer = torch.cuda.Stream(), model.model.layers[1]
    context = torch.cuda.stream(side)

    def enter(*given):
        side.wait_stream(torch.cuda.current_stream())
        context.__enter__()

    def leave(*given):
        context.__exit__(None, None, None)
        torch.cuda.current_stream().wait_stream(side)

    layer.register_forward_pre_hook(enter)
    layer.register_forward_hook(leave)
    for _ in range(3):
        repeated.clear()
        assert torch.equal(logits_of(model, ids), expected)
        assert 1 not in repeated


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shift", [0, 1, 8])
@pytest.mark.parametrize("length", [16, 17, 64, 1000])
def test_variants_of_a_kernel_are_told_apart(dtype, shift, length, ordinary):
    """By dtype, alignment, and whether integers are 1 or multiples of 16, in any order of calls."""
    x = torch.randn(2, 4, length, 64 + shift, device="cuda", dtype=dtype)[..., shift:]
    for _ in range(2):
        found = block_pooling(x, ("max", "avg"), implementation="triton")
        assert torch.equal(found, ordinary(lambda: block_pooling(x, ("max", "avg"), implementation="triton")))


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_a_prompt_in_a_cuda_graph(policy):
    """Captured once, replayed on other prompts of the length: sparse, and what an eager call gives."""
    model, static = attached(policy), make_ids(1000, seed=0).cuda()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            logits_of(model, static, use_cache=True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with seer.record(model) as stats, torch.cuda.graph(graph), torch.inference_mode():
        found = model(input_ids=static, use_cache=True).logits
    assert stats.dense_calls == 0
    for seed in (1, 2, 3):
        fresh = make_ids(1000, seed=seed).cuda()
        static.copy_(fresh)
        graph.replay()
        torch.testing.assert_close(found, logits_of(model, fresh, use_cache=True), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("given", ["attention_mask", "position_ids"])
def test_what_cannot_be_looked_at_in_a_capture_is_dense(given):
    model, ids = attached(seer.TopK(0.3)), make_ids(1000).cuda()
    inputs = {
        "attention_mask": {"attention_mask": torch.ones_like(ids)},
        "position_ids": {"position_ids": torch.arange(1000, device="cuda")[None]},
    }[given]
    logits_of(model, ids, use_cache=True, **inputs)
    with seer.dense(model):
        expected = logits_of(model, ids, use_cache=True, **inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with pytest.warns(UserWarning, match="a CUDA graph is captured"), torch.cuda.graph(graph), torch.inference_mode():
        found = model(input_ids=ids, use_cache=True, **inputs).logits
    graph.replay()
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
