"""Decoding by the scores of the last tokens together: however the tokens come, they read what they read one by one."""

from __future__ import annotations

import functools
import warnings

import pytest
import torch
from transformers import DynamicCache

import seerattention as seer
from decode_models import SPARSE, attend_naively, feed, generate, watched_steps
from seerattention.ops.span import Span
from tiny_models import make_ids, make_model
from window_models import FORMS, GATES, WINDOW, gated, prompt, same

FAMILIES = ["llama", *(pytest.param(name, marks=pytest.mark.newest) for name in ("phi3", "glm4"))]


# ---- the definition --------------------------------------------------------------------------------------------------


@torch.inference_mode()
def naive_attention(gate, policy, pre, post, scale):
    """Output ``[B, Hq, D]`` of the last token, everything from scratch: the queries of the window are encoded here."""
    q_pre, k_pre, cos, sin = pre
    length = q_pre.shape[2]
    span = Span(len(q_pre), 1, length)
    keys = gate.encode_keys(k_pre, cos, sin)
    single = []
    for back in range(min(gate.query_window, length)):
        place = slice(length - 1 - back, length - back)
        scores = gate.score(gate.encode_queries(q_pre[:, :, place], cos[:, place], sin[:, place]), keys, span=span)
        single.append(scores.log_softmax(-1))
    logits = torch.stack(single).amax(0)
    return attend_naively(logits, policy, gate.block_size, post, scale)


@pytest.mark.newest
@pytest.mark.parametrize("policy", [SPARSE, seer.TopK(0.3), seer.TopP(0.7)], ids=str)
@pytest.mark.parametrize(("name", "form"), [("llama", "published"), ("phi3", "published"), ("glm4", "fine")])
def test_each_step_is_its_definition(model_of, ids_of, name, form, policy):
    alone = 0
    for gate, pre, post, scale, given in watched_steps(model_of(name), ids_of(120), FORMS[form], policy):
        expected, _ = naive_attention(gate, policy, pre, post, scale)
        torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-5)
        gate.set_query_window(1)
        alone += torch.allclose(expected, naive_attention(gate, policy, pre, post, scale)[0], rtol=1e-3)
        gate.set_query_window(WINDOW)
    assert alone < 35  # mostly, tokens that choose for themselves read something else


# ---- every way in which tokens come ----------------------------------------------------------------------------------

WAYS = {
    "no cache": {"use_cache": False},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "chunks": {"prefill_chunk_size": 32},
    "static": {"cache_implementation": "static"},
    "static, chunks": {"cache_implementation": "static", "prefill_chunk_size": 32},
}


@functools.cache
def cached_greedy(name, gates):
    return generate(gated(make_model(name), gates), prompt(make_ids, 160))


@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", FAMILIES)
def test_decides_as_cached_greedy_decoding(model_of, ids_of, name, way, gates):
    model, ids = gated(model_of(name), gates), prompt(ids_of, 160)
    expected = cached_greedy(name, gates)
    with seer.record(model) as stats, warnings.catch_warnings():
        warnings.filterwarnings("error", "seerattention")
        found = generate(model, ids, **WAYS[way])
    same(found, expected)
    assert stats.sparse_calls > 0


@pytest.mark.parametrize("gates", GATES)
def test_candidates_in_inference_mode(model_of, ids_of, gates):
    """Where tensors do not know of which others they are views, as crops make them."""
    model, ids = gated(model_of("llama"), gates), prompt(ids_of)
    expected = generate(model, ids)
    with torch.inference_mode():
        same(generate(model, ids, prompt_lookup_num_tokens=3), expected)
        same(generate(model, ids), expected)


@pytest.mark.parametrize("gates", GATES)
def test_an_assistant(model_of, ids_of, gates):
    model, helper, ids = gated(model_of("llama"), gates), model_of("llama"), prompt(ids_of)
    with torch.no_grad():
        for parameter in helper.parameters():
            parameter.mul_(1.02)  # it often guesses right
    helper.generation_config.num_assistant_tokens = 7
    same(generate(model, ids, assistant_model=helper), generate(model, ids))


@pytest.mark.parametrize("size", [1, 3, 7, 31])
def test_short_chunks_bring_what_windows_need(model_of, ids_of, size):
    model, ids = gated(model_of("llama"), "decode"), ids_of(100)
    same(generate(model, ids, prefill_chunk_size=size), generate(model, ids))


PADS = [0, 7, 60, 107]  # one row begins with its last tokens: fewer than a window


def model_of_padded_rows(mode):
    return gated(make_model("qwen3", attn_implementation=mode), "decode", seer.TopK(0.3))


@functools.cache
def rows_alone(mode):
    model, ids = model_of_padded_rows(mode), make_ids(110, batch=4)
    return [generate(model, ids[row : row + 1, pad:]) for row, pad in enumerate(PADS)]


@pytest.mark.parametrize("mode", ["sdpa", "eager"])
@pytest.mark.parametrize("way", ["cache", *WAYS])
def test_left_padded_rows_equal_rows_alone(way, mode):
    """Speculation takes single rows only."""
    if way == "prompt lookup":
        pytest.skip("transformers speculates with single rows only")
    model, ids = model_of_padded_rows(mode), make_ids(110, batch=4)
    mask = torch.stack([(torch.arange(110) >= pad).long() for pad in PADS])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "seerattention")
        tokens, logits = generate(model, ids, attention_mask=mask, **WAYS.get(way, {}))
    for row, (pad, (alone, expected)) in enumerate(zip(PADS, rows_alone(mode), strict=True)):
        assert torch.equal(tokens[row, pad:], alone[0])
        torch.testing.assert_close(logits[row : row + 1], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("minimum", [0, 145, 155, 160, 500])
@pytest.mark.parametrize("way", ["no cache", "prompt lookup"])
def test_tokens_below_min_context_are_remembered(model_of, ids_of, way, minimum):
    model, ids = gated(model_of(), "both", min_context=minimum), prompt(ids_of)
    same(generate(model, ids, 16, **WAYS[way]), generate(model, ids, 16))


@pytest.mark.parametrize("turn", [1, 3, 40])
@pytest.mark.parametrize("gates", GATES)
def test_turns_on_a_cache(model_of, ids_of, gates, turn):
    """A later turn, short or long, goes on with the queries of the one before: as one long generation would."""
    model, ids = gated(model_of("llama"), gates), ids_of(96)
    seer.set_policy(model, prefill=seer.TopK(1.0)) if gates != "decode" else None
    cache = DynamicCache(config=model.config)
    said, _ = generate(model, ids, 8, past_key_values=cache)
    said = torch.cat((said, ids_of(turn, seed=5)), 1)
    found = generate(model, said, 8, past_key_values=cache)
    twin = DynamicCache(config=model.config)
    feed(model, ids, twin)
    for token in said[:, 96:103].split(1, 1):
        feed(model, token, twin)
    with seer.dense(model):  # the last token of the answer is in no cache yet
        logits = [feed(model, said[:, 103:], twin)[:, -1]]
    for token in found[0][:, said.shape[1] : -1].split(1, 1):
        logits.append(feed(model, token, twin)[:, -1])
    torch.testing.assert_close(found[1], torch.stack(logits, 1), rtol=1e-4, atol=1e-4)


def test_a_turn_that_is_taken_back(model_of, ids_of):
    """Cropped into the prompt, by no more than is kept: tokens go on as if nothing had come behind."""
    model, ids = gated(model_of("llama"), "decode"), ids_of(100)
    cache, twin = (DynamicCache(config=model.config) for _ in range(2))
    feed(model, ids, cache)
    for seed in range(4):
        feed(model, ids_of(1, seed=seed), cache)
    cache.crop(60 - cache.get_seq_length())
    feed(model, ids[:, :60], twin)
    for seed in range(20):
        token = ids_of(1, seed=50 + seed)
        torch.testing.assert_close(feed(model, token, cache), feed(model, token, twin), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 3}], ids=str)
@pytest.mark.parametrize("gates", GATES)
def test_beams_and_samples_without_a_cache(model_of, ids_of, gates, options):
    """Beams change their rows at every step; what is kept of the old rows goes along."""
    model, ids, found = gated(model_of("llama"), gates), ids_of(140, batch=2), []
    for use_cache in (True, False):
        torch.manual_seed(0)
        found.append(generate(model, ids, 12, use_cache=use_cache, **options))
    same(*found)


def test_beams_of_left_padded_rows(model_of, ids_of):
    model, ids, found = gated(model_of("llama"), "decode"), ids_of(110, batch=2), []
    mask = torch.ones_like(ids)
    mask[0, :40] = 0
    for use_cache in (True, False):
        found.append(generate(model, ids, 12, use_cache=use_cache, attention_mask=mask, num_beams=3))
    same(*found)
