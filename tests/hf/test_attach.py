"""Life cycle: attach, policies, dense, observe, detach; copies, several models, bad inputs."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward as sdpa

import seerattention as seer
from seerattention.hf import gates_of, is_attached
from tiny_models import attach, logits_of, make_vlm


def test_detach_gives_the_model_back(model_of, ids_of, family):
    model, ids = model_of(family), ids_of(150, batch=2)
    config, implementation = model.config, model.config._attn_implementation
    expected = logits_of(model, ids)
    for _ in range(2):
        attach(model, seer.TokenBudget(32))
        assert is_attached(model)
        assert not torch.equal(logits_of(model, ids), expected)
        assert seer.detach(model) is model
        assert not is_attached(model)
        assert torch.equal(logits_of(model, ids), expected)
    assert model.config is config
    assert config._attn_implementation == implementation
    assert not [name for module in model.modules() for name in module.__dict__ if "seer" in name]
    for module in model.modules():
        assert {**module._forward_hooks, **module._forward_pre_hooks} == {}


def test_detach_keeps_an_implementation_that_the_user_chose(model_of):
    model = model_of()
    attach(model)
    model.set_attn_implementation("eager")
    seer.detach(model)
    assert model.config._attn_implementation == "eager"


def test_gates_stay_out_of_the_base_model(model_of, tmp_path):
    model = model_of()
    names, parameters = list(model.state_dict()), len(list(model.parameters()))
    attach(model)
    assert list(model.state_dict()) == names
    assert len(list(model.parameters())) == parameters
    model.save_pretrained(tmp_path)
    seer.detach(model)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config._attn_implementation == "sdpa"


def test_gates_follow_device_and_dtype(model_of, ids_of):
    model = model_of()
    attach(model)
    assert all(gate.k_linear.dtype == torch.float32 for gate in gates_of(model))
    model.to(torch.bfloat16)
    parameters = [gate.k_linear for gate in gates_of(model)]
    assert all(parameter.dtype == torch.bfloat16 for parameter in parameters)
    # A trainer may hold the gates in float32 beside a bf16 model: only a change of the layer moves them.
    for gate in gates_of(model):
        gate.float()
    logits_of(model, ids_of(70))
    assert all(gate.k_linear.dtype == torch.float32 for gate in gates_of(model))
    model.to(torch.float16)
    assert all(gate.k_linear.dtype == torch.float16 for gate in gates_of(model))


def test_fresh_gates_come_from_the_global_generator(model_of):
    drawn = []
    for seed in (5, 5, 6):
        model = model_of()
        torch.manual_seed(seed)
        seer.attach(model, seer.GateConfig())
        drawn.append(torch.stack([gate.k_linear.detach() for gate in gates_of(model)]))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0][0], drawn[0][1])


def test_deepcopy_is_independent(model_of, ids_of):
    model, ids = model_of(), ids_of(150)
    expected = logits_of(model, ids)
    attach(model, seer.TokenBudget(32))
    sparse = logits_of(model, ids)
    twin = copy.deepcopy(model)
    assert torch.equal(logits_of(twin, ids), sparse)
    seer.set_policy(twin, seer.TopK(1.0))
    with torch.no_grad():
        gates_of(twin)[0].k_linear.zero_()
    torch.testing.assert_close(logits_of(twin, ids), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(logits_of(model, ids), sparse)
    seer.detach(twin)
    assert torch.equal(logits_of(twin, ids), expected)
    assert torch.equal(logits_of(model, ids), sparse)
    with seer.record(model) as stats:
        logits_of(model, ids)
    assert stats.sparse_calls == 2


def test_two_models_of_one_config(model_of, ids_of):
    """transformers shares a config object between the models made from it."""
    first, ids = model_of(), ids_of(150)
    second = type(first)(first.config).eval()
    assert second.config is first.config
    expected = logits_of(first, ids), logits_of(second, ids)
    attach(first, seer.TokenBudget(32))
    assert torch.equal(logits_of(second, ids), expected[1])
    attach(second, seer.TokenBudget(64))
    seer.detach(first)
    assert torch.equal(logits_of(first, ids), expected[0])
    with seer.record(second) as stats:
        assert not torch.equal(logits_of(second, ids), expected[1])
    assert stats.sparse_calls == 2
    seer.detach(second)
    assert torch.equal(logits_of(second, ids), expected[1])


def test_set_policy_by_layer(model_of, ids_of):
    model, ids = model_of(), ids_of(160)
    attach(model, seer.TokenBudget(32))
    seer.set_policy(model, layers={0: seer.Dense()})
    with seer.record(model) as stats:
        logits_of(model, ids)
    assert stats.per_layer[0] == 1.0
    assert stats.per_layer[1] < 0.5
    seer.set_policy(model, seer.TopK(1.0), layers={0: None})
    with seer.record(model) as stats:
        logits_of(model, ids)
    assert stats.sparse_calls == 2
    assert stats.total_density == 1.0


def test_selector_without_gates(model_of, ids_of):
    model, ids, calls = model_of(), ids_of(150), []

    def diagonal(q, k, *, layer, scale, lengths):
        calls.append((layer, q.shape[1], k.shape[1], lengths))
        blocks = -(-q.shape[2] // 64)
        eye = torch.eye(blocks, dtype=torch.bool).expand(q.shape[0], q.shape[1], -1, -1)
        return seer.BlockIndices.from_mask(eye, 64)

    seer.attach(model, selector=diagonal, min_context=0)
    with seer.record(model) as stats:
        logits_of(model, ids)
    assert calls == [(0, 4, 2, None), (1, 4, 2, None)]
    assert stats.density == pytest.approx(3 / 6)
    assert gates_of(model) == [None, None]


def test_lists_shared_by_a_group_of_heads(model_of, ids_of):
    model, ids = model_of(), ids_of(150)
    expected = logits_of(model, ids)

    def everything(q, k, *, layer, scale, lengths):
        return seer.BlockIndices.from_mask(torch.ones(1, k.shape[1], 3, 3, dtype=torch.bool), 64)

    seer.attach(model, selector=everything, min_context=0)
    with seer.record(model) as stats:
        torch.testing.assert_close(logits_of(model, ids), expected, rtol=1e-4, atol=1e-4)
    assert stats.total_density == 1.0


def test_the_oracle_is_a_selector(model_of, ids_of):
    model, ids = model_of(), ids_of(200)
    expected = logits_of(model, ids)
    seer.attach(model, selector=seer.baselines.Oracle(seer.TopK(1.0)), min_context=0)
    torch.testing.assert_close(logits_of(model, ids), expected, rtol=1e-4, atol=1e-4)


def test_observe_reports_what_attention_reads(model_of, ids_of):
    model, ids = model_of(), ids_of(100, batch=2)
    attach(model, seer.TopK(0.5))
    seen = []
    with seer.observe(model, lambda inputs, blocks: seen.append((inputs, blocks))):
        logits_of(model, ids)
        with seer.dense(model):
            logits_of(model, ids)
    logits_of(model, ids)
    assert [inputs.layer for inputs, _ in seen] == [0, 1, 0, 1]
    for inputs, blocks in seen[:2]:
        rows = torch.tensor([1, 3])
        with torch.inference_mode():
            logits, some = inputs.gate_logits(), inputs.gate_logits(rows)
        assert torch.equal(blocks.to_mask(), seer.TopK(0.5).select(logits, block_size=32).to_mask())
        torch.testing.assert_close(some, logits[:, :, rows])
    assert all(blocks is None for _, blocks in seen[2:])


def test_observers_get_the_log_sum_exp_of_a_dense_forward(model_of, ids_of, family):
    """For nothing: outputs stay those of the untouched model, bit for bit."""
    model, ids = model_of(family), ids_of(100, batch=2)
    expected = logits_of(model, ids)
    attach(model, seer.TopK(0.5))
    seen = []
    with seer.observe(model, lambda inputs, blocks: seen.append((inputs, blocks))):
        with seer.dense(model):
            assert torch.equal(logits_of(model, ids), expected)
        logits_of(model, ids)
    assert [inputs.lse is None for inputs, _ in seen] == [False, False, True, True]
    for inputs, _ in seen[:2]:
        keys = inputs.k.repeat_interleave(inputs.q.shape[1] // inputs.k.shape[1], 1)
        scores = inputs.q @ keys.mT * inputs.scale
        lse = scores.masked_fill(torch.ones(100, 100).triu(1).bool(), float("-inf")).logsumexp(-1)
        torch.testing.assert_close(inputs.lse, lse, rtol=1e-5, atol=1e-5)


def test_no_log_sum_exp_where_the_kernel_cannot_give_it(model_of, ids_of, monkeypatch):
    model, ids, mask = model_of(), ids_of(100, batch=2), torch.ones(2, 100, dtype=torch.long)
    attach(model, seer.TopK(0.5))
    seen = []
    with seer.dense(model), seer.observe(model, lambda inputs, blocks: seen.append(inputs.lse)):
        model(ids).logits.sum().backward()  # gradients are recorded
        mask[0, 70:] = 0
        logits_of(model, ids, attention_mask=mask)
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            logits_of(model, ids)
        logits_of(model, ids, output_attentions=True)
        monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", lambda *args, **kwargs: sdpa(*args, **kwargs))
        logits_of(model, ids)
    assert seen == [None] * 10


def test_contexts_close_on_errors(model_of, ids_of):
    model, ids = model_of(), ids_of(100)
    attach(model, seer.TokenBudget(32))

    def broken(inputs, blocks):
        raise RuntimeError("broken observer")

    with pytest.raises(RuntimeError, match="broken"), seer.observe(model, broken):
        logits_of(model, ids)
    for context in (seer.dense(model), seer.record(model)):
        with pytest.raises(RuntimeError, match="inside"), context:
            raise RuntimeError("inside")
    with seer.record(model) as stats:
        logits_of(model, ids)
    assert (stats.sparse_calls, stats.dense_calls) == (2, 0)


BAD = {
    "nothing": (ValueError, "gates .* selector", (), {}),
    "gates type": (TypeError, "GateConfig", (3,), {}),
    "policy type": (TypeError, "policy", (seer.GateConfig(),), {"prefill": 0.1}),
    "selector type": (TypeError, "callable", (), {"selector": 5}),
    "decode": (ValueError, "no gates", (seer.GateConfig(),), {"decode": seer.TokenBudget(64)}),
    "min_context": (ValueError, "min_context", (seer.GateConfig(),), {"min_context": -1}),
    "path": (FileNotFoundError, "no folder", ("./no/such/folder",), {}),
    "path without prefix": (FileNotFoundError, "no folder", ("tests/no-such-folder",), {}),
    "name": (FileNotFoundError, "no folder", ("gates",), {}),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(model_of, ids_of, case, monkeypatch, tmp_path):
    import huggingface_hub

    def never(*args, **kwargs):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", never)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tests").mkdir()
    error, message, arguments, options = BAD[case]
    model, ids = model_of(), ids_of(100)
    expected = logits_of(model, ids)
    with pytest.raises(error, match=message):
        seer.attach(model, *arguments, **options)
    assert not is_attached(model)
    assert torch.equal(logits_of(model, ids), expected)
    for module in model.modules():
        assert not module._forward_hooks


def test_dense_decode_policies_are_accepted(model_of):
    for policy in (None, seer.Dense(), seer.TopK(1.0)):
        model = model_of()
        seer.attach(model, seer.GateConfig(), decode=policy)


def test_hub_ids_ask_the_hub(model_of, monkeypatch, tmp_path):
    import huggingface_hub

    source = model_of()
    attach(source, seer.TopK(0.3))
    seer.save_gates(source, tmp_path)
    asked = []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **options: asked.append(name) or str(tmp_path)
    )
    model = model_of()
    seer.attach(model, "some-owner/some-gates")
    assert asked == ["some-owner/some-gates"]
    assert torch.equal(gates_of(model)[0].k_linear, gates_of(source)[0].k_linear)


def test_attaching_twice_raises(model_of):
    model = model_of()
    attach(model)
    with pytest.raises(ValueError, match="attached already"):
        attach(model)


@pytest.mark.parametrize("use", ["detach", "set_policy", "dense", "record", "observe", "save_gates", "calibrate"])
def test_an_unattached_model_is_named_as_such(model_of, ids_of, use, tmp_path):
    model = model_of()
    uses = {
        "detach": lambda: seer.detach(model),
        "set_policy": lambda: seer.set_policy(model, seer.TopK(0.5)),
        "dense": lambda: seer.dense(model).__enter__(),
        "record": lambda: seer.record(model).__enter__(),
        "observe": lambda: seer.observe(model, print).__enter__(),
        "save_gates": lambda: seer.save_gates(model, tmp_path),
        "calibrate": lambda: seer.calibrate(model, [ids_of(100)], density=0.5),
    }
    with pytest.raises(ValueError, match="nothing is attached"):
        uses[use]()


def test_bad_layers_and_policies(model_of):
    model = model_of()
    attach(model)
    with pytest.raises(ValueError, match="0 to 1"):
        seer.set_policy(model, layers={2: seer.Dense()})
    with pytest.raises(TypeError, match="policy"):
        seer.set_policy(model, layers={0: 0.5})
    with pytest.raises(ValueError, match=r"no gates.*GateConfig\(decode=...\)"):
        seer.set_policy(model, decode=seer.TopK(0.5))


def test_a_gate_that_rope_cannot_fit_is_refused_early(model_of):
    model = model_of()
    with pytest.raises(ValueError, match="rotary"):
        seer.attach(model, seer.GateConfig(prefill=seer.PrefillGateConfig(hidden_size=12)))
    assert not is_attached(model)


def test_a_failed_attach_leaves_no_hooks(model_of):
    model = model_of()
    del model.model.layers[1].self_attn.k_proj
    with pytest.raises(AttributeError, match="k_proj"):
        seer.attach(model, seer.GateConfig())
    assert not is_attached(model)
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_a_selector_must_return_block_indices(model_of, ids_of):
    model = seer.attach(model_of(), selector=lambda *args, **kwargs: [[0]], min_context=0)
    with pytest.raises(TypeError, match="BlockIndices"):
        logits_of(model, ids_of(100))


def test_a_compiled_model(model_of, ids_of):
    model, ids = model_of(), ids_of(100)
    attach(model, seer.TokenBudget(32))
    compiled = torch.compile(model, backend="eager")
    assert torch.equal(logits_of(compiled, ids), logits_of(model, ids))
    with seer.record(compiled) as stats:
        logits_of(compiled, ids)
    assert stats.sparse_calls == 2


def test_offloaded_weights(model_of, ids_of):
    from accelerate import cpu_offload

    model, ids = model_of(), ids_of(100)
    attach(model, seer.TokenBudget(32))
    expected = logits_of(model, ids)
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert next(model.model.layers[0].self_attn.parameters()).is_meta
    assert torch.equal(logits_of(model, ids), expected)


def test_a_vision_language_model_attaches_to_its_language_model(ids_of):
    model, ids = make_vlm(), ids_of(100).clamp(max=90)
    expected = logits_of(model, ids)
    attach(model, seer.TopK(1.0))
    with seer.record(model) as stats:
        torch.testing.assert_close(logits_of(model, ids), expected, rtol=1e-4, atol=1e-4)
    assert stats.sparse_calls == 2
    pixels, with_image = torch.randn(1, 3, 28, 28), torch.cat((torch.full((1, 4), 96), ids), dim=1)
    sparse = logits_of(model, with_image, pixel_values=pixels)
    seer.detach(model)
    torch.testing.assert_close(sparse, logits_of(model, with_image, pixel_values=pixels), rtol=1e-4, atol=1e-4)


def test_adapters_of_peft(model_of, ids_of):
    peft = pytest.importorskip("peft")
    model, ids = model_of(), ids_of(100)
    adapters = peft.LoraConfig(target_modules=["q_proj", "k_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(model, adapters).eval()
    expected = logits_of(wrapped, ids)
    attach(wrapped, seer.TopK(1.0))
    with seer.record(wrapped) as stats:
        torch.testing.assert_close(logits_of(wrapped, ids), expected, rtol=1e-4, atol=1e-4)
    assert stats.sparse_calls == 2
