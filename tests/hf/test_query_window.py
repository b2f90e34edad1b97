"""Decoding by the scores of the last tokens together: however the tokens come, they read what they read one by one."""

from __future__ import annotations

import copy
import dataclasses
import gc
import pickle
import warnings
import weakref

import pytest
import torch
from transformers import DynamicCache, StaticCache

import seerattention as seer
from decode_models import BLOCK, SPARSE, attach, feed, generate, nothing_kept
from seerattention.gates import select_by_token
from seerattention.hf import gates_of
from seerattention.hf.state import state_of
from seerattention.measure import cache_memory
from seerattention.ops.span import Span
from tiny_models import logits_of

WINDOW = 6
FORMS = {
    "published": seer.DecodeGateConfig(block_size=BLOCK, query_window=WINDOW),
    "fine": seer.DecodeGateConfig(block_size=BLOCK, k_pitch=4, merge_heads=False, query_window=WINDOW),
}
GATES = {
    "decode": (seer.GateConfig(block_size=32, prefill=None, decode=FORMS["published"]), {}),
    "both": (seer.GateConfig(block_size=32, decode=FORMS["published"]), {"prefill": seer.TopK(0.4)}),
    "both, fine": (seer.GateConfig(block_size=32, decode=FORMS["fine"]), {"prefill": seer.TopK(0.4)}),
}
FAMILIES = ["llama", "phi3", "glm4"]


def gated(model, gates="both, fine", decode=SPARSE, **options):
    config, policies = GATES[gates]
    return attach(model, decode, config, **policies, **options)


def prompt(ids_of, length=150):
    """With repetitions, in which prompt lookup finds candidates."""
    ids = ids_of(length)
    ids[:, length // 2 :] = ids[:, : length - length // 2]
    return ids


def same(found, expected):
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-4)


# ---- the definition --------------------------------------------------------------------------------------------------


@torch.inference_mode()
def naive_attention(gate, policy, pre, post, scale):
    """Output ``[B, Hq, D]`` of the last token, everything from scratch: the queries of the window are encoded here."""
    (q_pre, k_pre, cos, sin), (q, k, v) = pre, post
    batch, heads, length, _ = q.shape
    span = Span(batch, 1, length)
    keys = gate.encode_keys(k_pre, cos, sin)
    single = []
    for back in range(min(gate.query_window, length)):
        place = slice(length - 1 - back, length - back)
        scores = gate.score(gate.encode_queries(q_pre[:, :, place], cos[:, place], sin[:, place]), keys, span=span)
        single.append(scores.log_softmax(-1))
    logits = torch.stack(single).amax(0)
    mask = select_by_token(policy, logits, block_size=gate.block_size, span=span).to_mask()
    group = heads // k.shape[1]
    mask = mask.repeat_interleave(gate.block_size, -1)[..., :length].repeat_interleave(group, 1)
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    scores = (q[:, :, -1:] @ k.mT * scale).masked_fill(~mask, float("-inf"))
    return (scores.softmax(-1) @ v)[:, :, 0], mask


@pytest.mark.parametrize("policy", [SPARSE, seer.TopK(0.3), seer.TopP(0.7)], ids=str)
@pytest.mark.parametrize(("name", "form"), [("llama", "published"), ("phi3", "published"), ("glm4", "fine")])
def test_each_step_is_its_definition(model_of, ids_of, name, form, policy, monkeypatch):
    """Of the first layer, whose inputs do not depend on what was read before."""
    model, ids = model_of(name), ids_of(120)
    attach(model, None, seer.GateConfig(block_size=32, decode=FORMS[form]), prefill=seer.Dense())
    seen = []
    with seer.observe(model, lambda inputs, blocks: seen.append(inputs)):
        logits_of(model, ids)
    whole = seen[0]
    gate, layer = gates_of(model, "decode")[0], state_of(model).layers[0]
    seer.set_policy(model, decode=policy)
    given, alone = [], 0
    attend = seer.hf.attention.attend_tokens

    def watched(arguments, blocks):
        out = attend(arguments, blocks)
        if arguments.module is layer.attention:
            given.append(out[:, 0])
        return out

    monkeypatch.setattr(seer.hf.attention, "attend_tokens", watched)
    cache = DynamicCache(config=model.config)
    feed(model, ids[:, :50], cache)
    for end in range(51, 121):
        feed(model, ids[:, end - 1 : end], cache)
        pre = [whole.q_pre[:, :, :end], whole.k_pre[:, :, :end], whole.cos[:, :end], whole.sin[:, :end]]
        post = [x[:, :, :end] for x in (whole.q, whole.k, whole.v)]
        expected, _ = naive_attention(gate, policy, pre, post, whole.scale)
        torch.testing.assert_close(given[-1], expected, rtol=1e-4, atol=1e-5)
        gate.set_query_window(1)
        alone += torch.allclose(expected, naive_attention(gate, policy, pre, post, whole.scale)[0], rtol=1e-3)
        gate.set_query_window(WINDOW)
    assert len(given) == 70
    assert alone < 35  # mostly, tokens that choose for themselves read something else


# ---- every way in which tokens come ----------------------------------------------------------------------------------

WAYS = {
    "no cache": {"use_cache": False},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "chunks": {"prefill_chunk_size": 32},
    "static": {"cache_implementation": "static"},
    "static, chunks": {"cache_implementation": "static", "prefill_chunk_size": 32},
}


@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", FAMILIES)
def test_decides_as_cached_greedy_decoding(model_of, ids_of, name, way, gates):
    model, ids = gated(model_of(name), gates), prompt(ids_of, 160)
    expected = generate(model, ids)
    with seer.record(model) as stats, warnings.catch_warnings():
        warnings.filterwarnings("error", "seerattention")
        found = generate(model, ids, **WAYS[way])
    same(found, expected)
    assert stats.sparse_calls > 0


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


@pytest.mark.parametrize("mode", ["sdpa", "eager"])
@pytest.mark.parametrize("way", ["cache", *WAYS])
def test_left_padded_rows_equal_rows_alone(model_of, ids_of, way, mode):
    """One row begins with its last tokens: fewer than a window. Speculation takes single rows only."""
    if way == "prompt lookup":
        pytest.skip("transformers speculates with single rows only")
    model = gated(model_of("qwen3", attn_implementation=mode), "decode", seer.TopK(0.3))
    ids, pads = ids_of(110, batch=4), [0, 7, 60, 107]
    mask = torch.ones_like(ids)
    for row, pad in enumerate(pads):
        mask[row, :pad] = 0
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "seerattention")
        tokens, logits = generate(model, ids, attention_mask=mask, **WAYS.get(way, {}))
    for row, pad in enumerate(pads):
        alone, expected = generate(model, ids[row : row + 1, pad:])
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


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_rows_that_move(model_of, ids_of, kind):
    """Repeated, chosen, put in another order, cropped, copied: each row goes on as it would alone."""
    model, ids = gated(model_of("llama"), "decode", seer.TopK(0.5)), ids_of(90, batch=2)
    alone, caches = [], [DynamicCache(config=model.config) for _ in range(2)]
    for row, cache in enumerate(caches):
        feed(model, ids[row : row + 1], cache)
        for seed in range(3):
            feed(model, ids_of(1, batch=2, seed=seed)[row : row + 1], cache)
        alone.append([feed(model, ids_of(1, seed=20 + seed), cache) for seed in range(4)])
    cache = DynamicCache() if kind == "dynamic" else StaticCache(config=model.config, max_cache_len=120)
    feed(model, ids, cache)
    for seed in range(3):
        feed(model, ids_of(1, batch=2, seed=seed), cache)
    rows = [1, 1]
    if kind == "dynamic":
        rows = [1, 0]
        cache.batch_repeat_interleave(2)
        cache = copy.deepcopy(cache)
        cache.batch_select_indices(torch.tensor([True, False, True, True]))
        feed(model, ids_of(1, batch=3), cache)
        cache.crop(93 - cache.get_seq_length())
        cache.batch_select_indices([0, 2])
    cache.reorder_cache(torch.tensor([1, 0] if kind == "dynamic" else [1, 1]))
    for seed in range(4):
        found = feed(model, ids_of(1, seed=20 + seed).expand(len(rows), -1), cache)
        expected = torch.cat([alone[row][seed] for row in rows])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_cache_is_freed_at_once_and_read_again(model_of, ids_of):
    model, cache = gated(model_of("llama"), "decode"), DynamicCache()
    feed(model, ids_of(90), cache)
    feed(model, ids_of(1), cache)
    read = pickle.loads(pickle.dumps(cache))
    read.reorder_cache(torch.tensor([0]))
    assert feed(model, ids_of(1), read).isfinite().all()
    gone = [weakref.ref(cache.layers[0]), weakref.ref(cache.layers[0].keys)]
    gc.disable()
    try:
        del cache
        assert [reference() for reference in gone] == [None, None]
    finally:
        gc.enable()


# ---- what is kept ----------------------------------------------------------------------------------------------------


def test_dense_steps_are_remembered(model_of, ids_of):
    model, ids = gated(model_of("llama"), "decode", seer.TokenBudget(10_000)), ids_of(100)
    caches = [DynamicCache(config=model.config) for _ in range(2)]
    with seer.dense(model):
        for cache in caches:
            feed(model, ids, cache)
            feed(model, ids_of(2), cache)
            feed(model, ids_of(1), cache)
    feed(model, ids_of(1), caches[0])  # reads everything
    with seer.dense(model):
        feed(model, ids_of(1), caches[1])
    seer.set_policy(model, decode=SPARSE)
    token = ids_of(1, seed=9)
    torch.testing.assert_close(feed(model, token, caches[1]), feed(model, token, caches[0]), rtol=1e-4, atol=1e-4)


def test_windows_travel_with_copies_and_go_with_changes(model_of, ids_of):
    model, cache = gated(model_of("llama"), "decode", seer.TopK(0.5)), DynamicCache()
    feed(model, ids_of(90, batch=3), cache)
    feed(model, ids_of(3, batch=3, seed=1), cache)
    token = ids_of(1, batch=3, seed=2)
    expected = feed(model, token, copy.deepcopy(cache))
    torch.testing.assert_close(feed(model, token, copy.deepcopy(cache)), expected)
    with nothing_kept():
        torch.testing.assert_close(feed(model, token, copy.deepcopy(cache)), expected, rtol=1e-4, atol=1e-4)
    # Of another process, or filled by another: the token chooses for itself.
    read = pickle.loads(pickle.dumps(cache))
    alone = feed(model, token, read)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("seerattention.hf.layer.kept_queries", lambda *_, **__: None)
        torch.testing.assert_close(feed(model, token, copy.deepcopy(cache)), alone, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(alone, expected, atol=1e-3)


def test_memory_is_counted(model_of, ids_of):
    model = gated(model_of(), "decode")
    cache = DynamicCache(config=model.config)
    feed(model, ids_of(200), cache)
    (_, heads, _, dim), gate = cache.layers[0].keys.shape, gates_of(model, "decode")[0]
    assert cache_memory(cache).gates == 2 * gate.q_vectors * (WINDOW - 1 + 64) * gate.width * 4
    assert (heads, dim) == (gate.num_kv_heads, gate.head_dim)


@pytest.mark.parametrize("inference", [False, True])
def test_static_caches_in_inference_mode_have_no_memory(model_of, ids_of, inference):
    """There a token chooses for itself, as nobody can say what was written into the cache; nothing else changes."""
    model, ids, outputs = gated(model_of("llama"), "decode"), ids_of(100), []
    for make in (lambda: StaticCache(config=model.config, max_cache_len=160), DynamicCache):
        with torch.inference_mode() if inference else torch.no_grad():
            cache = make()
            feed(model, ids, cache)
            outputs.append([feed(model, ids_of(1, seed=seed), cache) for seed in range(6)])
    assert all(logits.isfinite().all() for logits in outputs[0])
    close = [torch.allclose(found, expected, rtol=1e-4, atol=1e-4) for found, expected in zip(*outputs, strict=True)]
    assert all(close) is not inference


def test_saved_and_read_again(model_of, ids_of, tmp_path):
    model, ids = gated(model_of()), ids_of(100)
    expected = generate(model, ids)
    seer.save_gates(model, tmp_path)
    assert f'"query_window": {WINDOW}' in (tmp_path / "README.md").read_text()
    again = seer.attach(model_of(), tmp_path, min_context=0)
    assert state_of(again).gate_config == GATES["both, fine"][0]
    same(generate(again, ids), expected)


@pytest.mark.parametrize("gates", GATES)
def test_a_window_is_chosen_for_gates_that_are_there(model_of, ids_of, tmp_path, gates):
    """It is not trained: the same gates with another window are what they were made with."""
    config, policies = GATES[gates]
    config = dataclasses.replace(config, decode=dataclasses.replace(config.decode, query_window=1))
    model, ids = attach(model_of(), SPARSE, config, **policies), ids_of(100)
    alone = generate(model, ids)
    seer.set_policy(model, query_window=WINDOW)
    found = generate(model, ids)
    assert not torch.allclose(found[1], alone[1], atol=1e-3)
    same(found, generate(gated(model_of(), gates), ids))
    seer.save_gates(model, tmp_path)
    same(generate(seer.attach(model_of(), tmp_path, min_context=0), ids), found)
    # On a cache that is in use: what is kept of another window is not taken.
    cache = DynamicCache(config=model.config)
    feed(model, ids, cache)
    for size in (2 * WINDOW, 2, 1, WINDOW):
        seer.set_policy(model, query_window=size)
        for seed in range(3):
            assert feed(model, ids_of(1, seed=seed), cache).isfinite().all()
    seer.set_policy(model, query_window=1)
    same(generate(model, ids), alone)


def test_errors(model_of):
    model = gated(model_of(), "decode")
    for value, error in ((0, ValueError), (65, ValueError), ("8", TypeError)):
        with pytest.raises(error, match="query_window must be"):
            seer.set_policy(model, query_window=value)
    assert [gate.query_window for gate in gates_of(model, "decode")] == [WINDOW, WINDOW]
    with pytest.raises(ValueError, match="gates for decoding"):
        seer.set_policy(attach(model_of(), None, seer.GateConfig(block_size=32)), query_window=2)
