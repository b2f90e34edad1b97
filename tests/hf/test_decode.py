"""Decoding through decode gates: what is kept beside the cache against computing everything from scratch."""

from __future__ import annotations

import copy
import pickle
import random
import warnings

import pytest
import torch
from transformers import DynamicCache

import seerattention as seer
from decode_models import (
    BOTH,
    DECODE,
    EVERYTHING,
    FINE,
    FINE_DECODE,
    ONLY_DECODE,
    ONLY_FINE_DECODE,
    SPARSE,
    attach,
    attend_naively,
    feed,
    generate,
    nothing_kept,
    watched_steps,
)
from seerattention.hf import gates_of, kept
from seerattention.ops.span import Span


@pytest.mark.parametrize("name", ["llama", "qwen3", "glm4", "phi3"])
@pytest.mark.parametrize("config", [ONLY_DECODE, BOTH, ONLY_FINE_DECODE])
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
    q_pre, k_pre, cos, sin = pre
    span = Span(len(q_pre), 1, q_pre.shape[2])
    queries = gate.encode_queries(q_pre[:, :, -1:], cos[:, -1:], sin[:, -1:])
    logits = gate.score(queries, gate.encode_keys(k_pre, cos, sin), span=span)
    return attend_naively(logits, policy, gate.block_size, post, scale)


@pytest.mark.newest
@pytest.mark.parametrize("policy", [SPARSE, seer.TopK(0.3), seer.TopP(0.7), seer.Threshold(0.2)], ids=str)
@pytest.mark.parametrize(("name", "form"), [("llama", DECODE), ("qwen3", DECODE), ("llama", FINE_DECODE)])
def test_each_step_is_its_definition(model_of, ids_of, name, form, policy):
    read = 0
    for gate, pre, post, scale, given in watched_steps(model_of(name), ids_of(120), form, policy):
        expected, mask = naive_attention(gate, policy, pre, post, scale)
        torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-5)
        read += mask.float().mean().item()
    assert read / 70 < 0.9


@pytest.mark.parametrize("config", [ONLY_DECODE, ONLY_FINE_DECODE])
def test_any_history_of_a_cache_equals_computing_from_scratch(model_of, ids_of, config):
    """Random appends, chunks, dense steps, crops, reorders, repeats, selections, copies."""
    model, random_ = attach(model_of("qwen3"), seer.TopK(0.3), config), random.Random(0)
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
@pytest.mark.parametrize(("mode", "config"), [("sdpa", BOTH), ("eager", BOTH), ("sdpa", FINE)])
def test_left_padded_rows_equal_rows_alone(model_of, ids_of, min_context, mode, config, rebuilds):
    model = attach(model_of("qwen3", attn_implementation=mode), seer.TopK(0.3), config, min_context=min_context)
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


@pytest.mark.parametrize("config", [ONLY_DECODE, ONLY_FINE_DECODE])
def test_beams_equal_a_run_that_keeps_nothing(model_of, ids_of, config):
    model, ids = attach(model_of(), config=config), ids_of(80, batch=2)
    options = {"max_new_tokens": 16, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    found = model.generate(ids, **options)
    with nothing_kept():
        assert torch.equal(found, model.generate(ids, **options))


@pytest.mark.parametrize("config", [ONLY_DECODE, ONLY_FINE_DECODE])
def test_crop_and_decode_again(model_of, ids_of, config):
    model, ids = attach(model_of("llama"), config=config), ids_of(90)
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
