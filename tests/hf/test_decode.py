"""Decoding through decode gates: what is kept beside the cache against computing everything from scratch."""

from __future__ import annotations

import copy
import pickle
import random
import warnings
from contextlib import contextmanager

import pytest
import torch
from transformers import DynamicCache, StaticCache

import seerattention as seer
from seerattention.gates import select_by_token
from seerattention.hf import decoding, gates_of, kept
from seerattention.hf.state import state_of
from seerattention.ops.span import Span
from tiny_models import logits_of

BLOCK = 16
EVERYTHING = seer.Threshold(0.0)
SPARSE = seer.TokenBudget(2 * BLOCK)
DECODE = seer.DecodeGateConfig(block_size=BLOCK)
ONLY_DECODE = seer.GateConfig(block_size=32, prefill=None, decode=DECODE)
BOTH = seer.GateConfig(block_size=32, decode=DECODE)
GREEDY = {"do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True, "output_logits": True}


def attach(model, decode=SPARSE, config=ONLY_DECODE, **options):
    torch.manual_seed(3)
    return seer.attach(model, config, decode=decode, **{"min_context": 0, **options})


def generate(model, ids, tokens=24, **options):
    found = model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, **{**GREEDY, **options})
    return found.sequences, torch.stack(found.logits, 1)


@torch.no_grad()
def feed(model, ids, cache, **inputs):
    return model(ids, past_key_values=cache, use_cache=True, **inputs).logits


@contextmanager
def nothing_kept():
    """Every step makes its encoded keys anew."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("seerattention.hf.layer.kept_keys", lambda cache_layer, gate: None)
        yield


@pytest.fixture
def rebuilds(monkeypatch):
    """How often the cached keys of a layer are encoded from scratch."""
    counted = []
    make = decoding._encode_cache
    monkeypatch.setattr(decoding, "_encode_cache", lambda *args: counted.append(1) or make(*args))
    return counted


@pytest.mark.parametrize("name", ["llama", "qwen3", "glm4", "phi3"])
@pytest.mark.parametrize("config", [ONLY_DECODE, BOTH])
def test_with_every_block_generation_equals_dense(model_of, ids_of, name, config, rebuilds):
    model, ids = model_of(name), ids_of(100)
    expected = generate(model, ids)
    attach(model, EVERYTHING, config, prefill=EVERYTHING if config is BOTH else None)
    with seer.record(model) as stats, warnings.catch_warnings():
        warnings.simplefilter("error")
        found = generate(model, ids)
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-4)
    assert stats.sparse_calls >= 23 * 2
    assert len(rebuilds) == 2  # one a layer


@pytest.mark.parametrize("mode", ["sdpa", "eager"])
def test_dense_and_detach_are_the_untouched_model(model_of, ids_of, mode):
    model, ids = model_of("qwen3", attn_implementation=mode), ids_of(100, batch=2)
    mask = torch.ones_like(ids)
    mask[0, :20] = 0
    expected = generate(model, ids, attention_mask=mask)
    attach(model)
    assert not torch.equal(generate(model, ids, attention_mask=mask)[1], expected[1])
    with seer.dense(model):
        for a, b in zip(generate(model, ids, attention_mask=mask), expected, strict=True):
            assert torch.equal(a, b)
    seer.set_policy(model, decode=seer.Dense())
    assert torch.equal(generate(model, ids, attention_mask=mask)[1], expected[1])
    seer.set_policy(model, decode=SPARSE)
    seer.detach(model)
    assert torch.equal(generate(model, ids, attention_mask=mask)[1], expected[1])


@torch.inference_mode()
def naive_attention(gate, policy, pre, post, scale):
    """Output ``[B, Hq, D]`` of the last token: gate, policy and masked softmax over everything, in float32."""
    (q_pre, k_pre, cos, sin), (q, k, v) = pre, post
    batch, heads, length, _ = q.shape
    span = Span(batch, 1, length)
    queries = gate.encode_queries(q_pre[:, :, -1:], cos[:, -1:], sin[:, -1:])
    logits = gate.score(queries, gate.encode_keys(k_pre, cos, sin), span=span)
    mask = select_by_token(policy, logits, block_size=gate.block_size, span=span).to_mask()
    group = heads // k.shape[1]
    mask = mask.repeat_interleave(gate.block_size, -1)[..., :length].repeat_interleave(group, 1)
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    scores = (q[:, :, -1:] @ k.mT * scale).masked_fill(~mask, float("-inf"))
    return (scores.softmax(-1) @ v)[:, :, 0], mask


@pytest.mark.parametrize("policy", [SPARSE, seer.TopK(0.3), seer.TopP(0.7), seer.Threshold(0.2)], ids=str)
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_each_step_is_its_definition(model_of, ids_of, name, policy, monkeypatch):
    """Of the first layer, whose inputs do not depend on what was read before."""
    model, ids = model_of(name), ids_of(120)
    attach(model, None, seer.GateConfig(block_size=32, decode=DECODE), prefill=seer.Dense())
    seen = []
    with seer.observe(model, lambda inputs, blocks: seen.append(inputs)):
        logits_of(model, ids)
    whole = seen[0]
    gate, layer = gates_of(model, "decode")[0], state_of(model).layers[0]
    seer.set_policy(model, decode=policy)
    given, read = [], 0
    attend = seer.hf.attention.attend_token

    def watched(arguments, blocks):
        out = attend(arguments, blocks)
        if arguments.module is layer.attention:
            given.append(out[:, 0])
        return out

    monkeypatch.setattr(seer.hf.attention, "attend_token", watched)
    cache = DynamicCache(config=model.config)
    feed(model, ids[:, :50], cache)
    for end in range(51, 121):
        feed(model, ids[:, end - 1 : end], cache)
        pre = [whole.q_pre[:, :, :end], whole.k_pre[:, :, :end], whole.cos[:, :end], whole.sin[:, :end]]
        post = [x[:, :, :end] for x in (whole.q, whole.k, whole.v)]
        expected, mask = naive_attention(gate, policy, pre, post, whole.scale)
        torch.testing.assert_close(given[-1], expected, rtol=1e-4, atol=1e-5)
        read += mask.float().mean().item()
    assert len(given) == 70
    assert read / 70 < 0.9


def test_any_history_of_a_cache_equals_computing_from_scratch(model_of, ids_of):
    """Random appends, chunks, dense steps, crops, reorders, repeats, selections, copies."""
    model, random_ = attach(model_of("qwen3"), seer.TopK(0.3)), random.Random(0)
    for case in range(6):
        cache, batch = DynamicCache(config=model.config), 2
        feed(model, ids_of(60, batch=batch, seed=case), cache)
        for step in range(40):
            kind = random_.choice(["append"] * 6 + ["chunk", "dense", "crop", "reorder", "repeat", "select", "copy"])
            length = cache.get_seq_length()
            if kind == "chunk":
                feed(model, ids_of(random_.randint(2, 20), batch=batch, seed=step), cache)
            elif kind == "dense":
                with seer.dense(model):
                    feed(model, ids_of(1, batch=batch, seed=step), cache)
            elif kind == "crop" and length > 40:
                cache.crop(-random_.randint(1, 20))
            elif kind == "reorder":
                cache.reorder_cache(torch.tensor([random_.randrange(batch) for _ in range(batch)]))
            elif kind == "repeat" and batch < 4:
                cache.batch_repeat_interleave(2)
                batch *= 2
            elif kind == "select" and batch > 1:
                batch -= 1
                cache.batch_select_indices(torch.tensor(random_.sample(range(batch + 1), batch)))
            elif kind == "copy":
                cache = copy.deepcopy(cache)
            ids = ids_of(1, batch=batch, seed=100 + step)
            twin = copy.deepcopy(cache)
            logits = feed(model, ids, cache)
            with nothing_kept():
                torch.testing.assert_close(logits, feed(model, ids, twin), rtol=1e-4, atol=1e-4)


def test_what_is_kept_travels_with_copies_and_is_dropped_with_changes(model_of, ids_of, rebuilds):
    model, cache = attach(model_of()), DynamicCache()
    feed(model, ids_of(70), cache)
    for seed in range(20):
        feed(model, ids_of(1, seed=seed), cache)
    assert len(rebuilds) == 2
    twin = copy.deepcopy(cache)
    feed(model, ids_of(1), twin)
    feed(model, ids_of(1), cache)
    assert len(rebuilds) == 2
    read = pickle.loads(pickle.dumps(cache))
    torch.testing.assert_close(feed(model, ids_of(1), read), feed(model, ids_of(1), cache))
    assert len(rebuilds) == 4
    with torch.no_grad():
        cache.layers[0].keys.mul_(2.0)
        gates_of(model, "decode")[1].k_linear.mul_(2.0)
    feed(model, ids_of(1), cache)
    assert len(rebuilds) == 6
    cache.reset()
    feed(model, ids_of(70), cache)
    feed(model, ids_of(1), cache)
    assert len(rebuilds) == 8
    # Earlier versions of transformers only fill what they have with zeros.
    assert kept.kept_keys(cache.layers[0], gates_of(model, "decode")[0]).lengths == [cache.get_seq_length()]


def test_inference_mode_may_come_and_go(model_of, ids_of, rebuilds):
    model, cache = attach(model_of()), DynamicCache()
    with torch.inference_mode():
        feed(model, ids_of(70), cache)
        feed(model, ids_of(1), cache)
    for seed in range(30):
        feed(model, ids_of(1, seed=seed), cache)
    with torch.inference_mode():
        feed(model, ids_of(1), cache)
    assert len(rebuilds) == 2


@pytest.mark.parametrize("min_context", [0, 90])
@pytest.mark.parametrize("mode", ["sdpa", "eager"])
def test_left_padded_rows_equal_rows_alone(model_of, ids_of, min_context, mode, rebuilds):
    model = attach(model_of("qwen3", attn_implementation=mode), seer.TopK(0.3), BOTH, min_context=min_context)
    ids, pads = ids_of(110, batch=4), [0, 7, 32, 60]
    mask = torch.ones_like(ids)
    for row, pad in enumerate(pads):
        mask[row, :pad] = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokens, logits = generate(model, ids, attention_mask=mask)
        assert len(rebuilds) == 2
        for row, pad in enumerate(pads):
            alone, expected = generate(model, ids[row : row + 1, pad:])
            assert torch.equal(tokens[row, pad:], alone[0])
            torch.testing.assert_close(logits[row : row + 1], expected, rtol=1e-4, atol=1e-4)


def test_beams_equal_a_run_that_keeps_nothing(model_of, ids_of):
    model, ids = attach(model_of()), ids_of(80, batch=2)
    options = {"max_new_tokens": 16, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    found = model.generate(ids, **options)
    with nothing_kept():
        assert torch.equal(found, model.generate(ids, **options))


def test_crop_and_decode_again(model_of, ids_of):
    model, ids = attach(model_of("llama")), ids_of(90)
    cache = DynamicCache(config=model.config)
    tokens, logits = generate(model, ids, past_key_values=cache)
    for kept_tokens in (112, 100, 91, 90):
        cache.crop(kept_tokens - cache.get_seq_length())
        again = torch.cat([feed(model, token, cache) for token in tokens[:, kept_tokens:-1].split(1, 1)], 1)
        torch.testing.assert_close(again, logits[:, kept_tokens - 89 :], rtol=1e-4, atol=1e-4)


def test_both_phases_are_sparse(model_of, ids_of):
    model, ids = model_of("llama"), ids_of(150)
    attach(model, SPARSE, BOTH, prefill=seer.TokenBudget(32))
    with seer.record(model) as stats:
        generate(model, ids, 4)
    assert (stats.sparse_calls, stats.dense_calls) == (8, 0)
    assert stats.total_density < 0.5


def test_min_context_counts_the_cache(model_of, ids_of):
    model, ids = attach(model_of(), min_context=100), ids_of(95)
    with seer.record(model) as stats:
        generate(model, ids, 11)  # the first of the ten forwards on a cache sees 96 tokens
    assert (stats.sparse_calls, stats.dense_calls) == (2 * 6, 2 * 5)


@pytest.mark.parametrize("config", [ONLY_DECODE, BOTH])
def test_saved_folders(model_of, ids_of, tmp_path, config):
    model, ids = attach(model_of(), SPARSE, config), ids_of(100)
    expected = generate(model, ids)
    seer.save_gates(model, tmp_path)
    again = seer.attach(model_of(), tmp_path, min_context=0)
    assert state_of(again).gate_config == config
    assert state_of(again).phases == state_of(model).phases
    assert [gate is not None for gate in gates_of(again)] == [config is BOTH] * 2
    assert all(torch.equal(a, b) for a, b in zip(generate(again, ids), expected, strict=True))


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


@pytest.mark.parametrize("name", ["training", "gradients", "weights", "static", "window", "positions", "dynamic"])
def test_what_cannot_be_sparse_is_dense_with_one_warning(model_of, ids_of, name):
    options = {
        "window": {"use_sliding_window": True, "sliding_window": 40, "max_window_layers": 0},
        "dynamic": {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}},
    }.get(name, {})
    implementation = {"attn_implementation": "eager"} if name == "weights" else {}
    model, ids = model_of("qwen2", **options, **implementation), ids_of(64)
    cache = StaticCache(model.config, max_cache_len=80) if name == "static" else DynamicCache(config=model.config)

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
