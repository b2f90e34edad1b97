"""Decoding through decode gates: policies, folders, copies, families, and what stays dense."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from transformers import DynamicCache

import seerattention as seer
from decode_models import BLOCK, BOTH, EVERYTHING, FINE, ONLY_DECODE, SPARSE, attach, feed, generate, nothing_kept
from gate_folders import write_published_decode
from seerattention.hf import gates_of
from seerattention.hf.state import state_of
from seerattention.measure import cache_memory
from seerattention.policies import PublishedDecode
from tiny_models import logits_of


@pytest.mark.parametrize("config", [ONLY_DECODE, BOTH, FINE])
def test_saved_folders(model_of, ids_of, tmp_path, config):
    model, ids = attach(model_of(), SPARSE, config), ids_of(100)
    expected = generate(model, ids)
    seer.save_gates(model, tmp_path)
    again = seer.attach(model_of(), tmp_path, min_context=0)
    assert state_of(again).gate_config == config
    assert state_of(again).phases == state_of(model).phases
    assert [gate is not None for gate in gates_of(again)] == [config is not ONLY_DECODE] * 2
    assert all(torch.equal(a, b) for a, b in zip(generate(again, ids), expected, strict=True))


@pytest.mark.parametrize("policy", [None, PublishedDecode(32), PublishedDecode(threshold=0.1)], ids=str)
def test_published_gates(model_of, ids_of, tmp_path, policy):
    folder = write_published_decode(tmp_path / "gates")
    model = seer.attach(model_of(), folder, decode=policy, min_context=0)
    assert state_of(model).phases["decode"].policy == (policy or seer.TokenBudget(4096))
    with seer.record(model) as stats:
        generate(model, ids_of(150), 5)
    assert (stats.sparse_calls, stats.dense_calls) == (8, 2)
    assert stats.density == 1 if policy is None else stats.density < 1


@pytest.mark.parametrize(("config", "vectors"), [(ONLY_DECODE, 1), (FINE, 4)])
def test_memory_of_what_gates_keep(model_of, ids_of, config, vectors):
    """One vector a sub-block in the gate's precision, and a few tokens, beside two vectors a token."""
    model = attach(model_of(), SPARSE, config)
    cache = model.generate(ids_of(2000), max_new_tokens=1, return_dict_in_generate=True, pad_token_id=0).past_key_values
    assert cache_memory(cache).gates == 0
    cache = model.generate(ids_of(2000), max_new_tokens=3, return_dict_in_generate=True, pad_token_id=0).past_key_values
    memory, (_, heads, length, dim) = cache_memory(cache), cache.layers[0].keys.shape
    assert memory.keys_and_values == 2 * 2 * heads * length * dim * 4
    encoded = 2 * heads * (length // BLOCK) * vectors * dim * 4
    tokens = 2 * (64 + BLOCK) * heads * dim * 4
    assert encoded < memory.gates < 1.02 * encoded + tokens * 1.6  # room to grow, and rotary tables
    assert memory.share == memory.gates / memory.keys_and_values
    with pytest.raises(TypeError, match="has layers, got list"):
        cache_memory([])


def test_default_policies(model_of):
    model = attach(model_of(), None)
    assert state_of(model).phases["decode"].policy == seer.TokenBudget(4096)
    assert state_of(model).policy == seer.Dense()
    with pytest.raises(ValueError, match="phases prefill, decode"):
        gates_of(model, "training")


@pytest.mark.parametrize("policy", [seer.TopK(0.5, uniform=True), seer.Threshold(0.1, last_blocks_dense=1)], ids=str)
def test_policies_that_see_whole_prompts_are_refused(model_of, policy):
    with pytest.raises(ValueError, match="token by token"):
        attach(model_of(), policy)
    with pytest.raises(ValueError, match="token by token"):
        seer.set_policy(attach(model_of()), decode=policy)


def test_layers_may_have_policies_of_their_own(model_of, ids_of):
    model, ids = attach(model_of()), ids_of(100)
    seer.set_policy(model, layers={1: {"decode": seer.Dense()}})
    with seer.record(model) as stats:
        generate(model, ids, 5)
    assert (stats.sparse_calls, stats.dense_calls) == (4, 6)


@pytest.mark.parametrize("name", ["training", "gradients", "weights", "window", "positions", "dynamic"])
def test_what_cannot_be_sparse_is_dense_with_one_warning(model_of, ids_of, name):
    options = {
        "window": {"use_sliding_window": True, "sliding_window": 40, "max_window_layers": 0},
        "dynamic": {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}},
    }.get(name, {})
    implementation = {"attn_implementation": "eager"} if name == "weights" else {}
    model, ids = model_of("qwen2", **options, **implementation), ids_of(64)
    cache = DynamicCache(config=model.config)

    def run(gradients):
        model.train(name == "training")
        inputs = {"position_ids": torch.tensor([[70]])} if name == "positions" else {}
        inputs |= {"output_attentions": True} if name == "weights" else {}
        with torch.set_grad_enabled(gradients):
            return [
                model(ids[:, :1], past_key_values=cache_, use_cache=True, **inputs).logits
                for cache_ in (copy.deepcopy(cache), copy.deepcopy(cache))
            ]

    feed(model, ids, cache)
    expected = run(name == "gradients")
    attach(model)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        found = run(name == "gradients")
    assert torch.equal(found[0], expected[0])
    assert len([w for w in seen if "attended densely" in str(w.message)]) == 1


def test_assisted_generation(model_of, ids_of):
    model, helper, ids = attach(model_of(), EVERYTHING), model_of(seed=1), ids_of(100)
    expected = generate(model, ids)[0]
    assert torch.equal(generate(model, ids, assistant_model=helper)[0], expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_runs(model_of, ids_of, dtype):
    model, ids = attach(model_of(dtype=dtype)), ids_of(100)
    assert generate(model, ids)[1].isfinite().all()


def test_autocast_runs(model_of, ids_of):
    model, ids = attach(model_of()), ids_of(100)
    with torch.autocast("cpu", torch.bfloat16), seer.record(model) as stats:
        assert generate(model, ids)[1].isfinite().all()
    assert stats.sparse_calls == 46


def test_gates_attached_anew_do_not_take_what_others_kept(model_of, ids_of):
    model, ids, cache = attach(model_of()), ids_of(90), DynamicCache()
    feed(model, ids, cache)
    feed(model, ids_of(1), cache)
    seer.detach(model)
    torch.manual_seed(9)
    seer.attach(model, ONLY_DECODE, decode=SPARSE, min_context=0)
    twin = copy.deepcopy(cache)
    logits = feed(model, ids_of(1), cache)
    with nothing_kept():
        torch.testing.assert_close(logits, feed(model, ids_of(1), twin))


def test_copies_of_a_model_decode_alike(model_of, ids_of):
    model, ids = attach(model_of()), ids_of(90)
    expected, twin = generate(model, ids), copy.deepcopy(model)
    seer.detach(model)
    with seer.record(twin) as stats:
        assert torch.equal(generate(twin, ids)[1], expected[1])
    assert stats.sparse_calls == 46
    read = pickle.loads(pickle.dumps(twin))
    assert torch.equal(generate(read, ids)[1], expected[1])
    assert not hasattr(model.config, "decodes")


def test_two_models_of_one_config(model_of, ids_of):
    """One of which decodes densely: it is not touched by the other's gates."""
    model, ids = model_of(), ids_of(90)
    other = type(model)(model.config).eval()
    expected = generate(other, ids)
    attach(model)
    seer.attach(other, seer.GateConfig(block_size=32))
    assert torch.equal(generate(other, ids)[1], expected[1])
    seer.detach(model)
    assert torch.equal(generate(other, ids)[1], expected[1])


@pytest.mark.parametrize("name", ["gemma3_text", "qwen3_moe", "olmo2", "granite", "mistral"])
def test_every_family_with_every_block(model_of, ids_of, name):
    options = {"sliding_window": None} if name == "mistral" else {}
    model, ids = model_of(name, **options), ids_of(100)
    expected = generate(model, ids)
    attach(model, EVERYTHING)
    with seer.record(model) as stats:
        found = generate(model, ids)
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=2e-4, atol=2e-4)
    assert stats.sparse_calls == 46


def test_a_compiled_model_decodes_as_it_does(model_of, ids_of):
    model, ids, cache = attach(model_of()), ids_of(90), DynamicCache()
    feed(model, ids, cache)
    twin = copy.deepcopy(cache)
    compiled = torch.compile(model, backend="eager")
    for seed in range(3):
        token = ids_of(1, seed=seed)
        torch.testing.assert_close(feed(compiled, token, twin), feed(model, token, cache), rtol=1e-4, atol=1e-4)


def test_adapters_that_come_between_two_tokens(model_of, ids_of):
    peft = pytest.importorskip("peft")
    model, ids, cache = attach(model_of()), ids_of(90), DynamicCache()
    feed(model, ids, cache)
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "k_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).eval()
    found = feed(adapted, ids_of(1), copy.deepcopy(cache))
    adapted.merge_adapter()
    torch.testing.assert_close(found, feed(adapted, ids_of(1), copy.deepcopy(cache)), rtol=1e-3, atol=1e-3)


def test_a_mask_of_ones_is_no_padding(model_of, ids_of):
    model, ids = attach(model_of("llama", attn_implementation="eager")), ids_of(90, batch=2)
    with seer.record(model) as stats:
        expected = generate(model, ids)
        found = generate(model, ids, attention_mask=torch.ones_like(ids))
    assert stats.sparse_calls == 92
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("altered", [False, True])
def test_layers_that_get_copies_of_the_mask(model_of, ids_of, altered):
    """As layers on other devices do. A mask that somebody has altered is nothing known."""
    model, ids = attach(model_of(num_hidden_layers=3)), ids_of(90, batch=2)
    mask = torch.ones_like(ids)
    mask[0, :20] = 0
    expected = generate(model, ids, 8, attention_mask=mask)

    def copied(module, args, kwargs):
        given = kwargs.get("attention_mask")
        if isinstance(given, torch.Tensor) and given.shape[-2] == 1:
            given = given.clone()
            given[..., 0, 50] = False if altered else given[..., 0, 50]
            kwargs["attention_mask"] = given
        return args, kwargs

    hook = model.model.layers[1].self_attn.register_forward_pre_hook(copied, with_kwargs=True)
    with seer.record(model) as stats, warnings.catch_warnings():
        warnings.simplefilter("ignore" if altered else "error")
        found = generate(model, ids, 8, attention_mask=mask)
    hook.remove()
    assert (stats.dense_calls > 3) is altered  # prompts are dense here, once a layer
    if not altered:
        assert torch.equal(found[1], expected[1])


def test_gates_of_decoding_alone_say_nothing_of_prompts(model_of, ids_of):
    model = attach(model_of())
    mask = torch.ones(2, 90, dtype=torch.long)
    mask[0, 20:30] = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logits_of(model, ids_of(90, batch=2), attention_mask=mask)


def test_sparse_policies_and_candidates(model_of, ids_of):
    """Candidates of assisted generation are judged densely; single tokens in between are not left with old keys."""
    model, helper, ids = attach(model_of()), model_of(seed=1), ids_of(100)
    options = {"assistant_model": helper, "max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
    found = model.generate(ids, **options)
    with nothing_kept():
        assert torch.equal(found, model.generate(ids, **options))


@pytest.mark.parametrize("side", ["right", "holes", "4d"])
def test_batches_of_other_masks_are_dense(model_of, ids_of, side):
    model, ids, cache = model_of(), ids_of(80, batch=2), DynamicCache()
    mask = torch.ones(2, 81, dtype=torch.long)
    if side == "right":
        mask[0, 70:] = 0
    elif side == "holes":
        mask[0, 30:40] = 0
    else:
        mask = torch.zeros(2, 1, 1, 81).masked_fill(torch.arange(81) == 20, -1e9)
    feed(model, ids, cache)
    twin, token = copy.deepcopy(cache), ids_of(1, batch=2)
    expected = feed(model, token, cache, attention_mask=mask)
    attach(model)
    with pytest.warns(UserWarning, match="attended densely"):
        assert torch.equal(feed(model, token, twin, attention_mask=mask), expected)
