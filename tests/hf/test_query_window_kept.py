"""Queries of the last tokens that stay with a cache: whatever happens to it, they are those of its tokens."""

from __future__ import annotations

import copy
import dataclasses
import gc
import pickle
import random
import warnings
import weakref
from contextlib import nullcontext

import pytest
import torch
from transformers import DynamicCache, StaticCache

import seerattention as seer
from decode_models import SPARSE, attach, feed, generate, nothing_kept
from seerattention.hf import gates_of, kept
from seerattention.hf.state import state_of
from seerattention.measure import cache_memory
from window_models import GATES, WINDOW, gated, same


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


def test_any_history_of_a_cache_leaves_the_queries_of_its_tokens(model_of, ids_of):
    """Of the first layer, whose queries follow from the tokens alone: random tokens, chunks, dense steps, crops,
    orders, repeated and chosen rows, copies."""
    model, random_ = gated(model_of("qwen3"), "decode", seer.TopK(0.3)), random.Random(0)
    gate = gates_of(model, "decode")[0]
    for case in range(4):
        cache, rows = DynamicCache(), ids_of(100, batch=2, seed=case)
        feed(model, rows, cache)
        for step in range(40):
            batch, length = rows.shape
            kind = random_.choice(["append"] * 4 + ["chunk", "dense", "crop", "reorder", "repeat", "select", "copy"])
            if kind in ("append", "chunk", "dense"):
                count = random_.randint(2, 9) if kind == "chunk" else 1
                new = ids_of(count, batch=batch, seed=100 + step)
                with seer.dense(model) if kind == "dense" else nullcontext():
                    feed(model, new, cache)
                rows = torch.cat((rows, new), 1)
            elif kind == "crop" and length > 60:
                gone = random_.randint(1, 6)
                cache.crop(-gone)
                rows = rows[:, :-gone]
            elif kind == "reorder":
                order = torch.tensor([random_.randrange(batch) for _ in range(batch)])
                cache.reorder_cache(order)
                rows = rows[order]
            elif kind == "repeat" and batch < 4:
                cache.batch_repeat_interleave(2)
                rows = rows.repeat_interleave(2, 0)
            elif kind == "select" and batch > 1:
                chosen = torch.tensor(random_.sample(range(batch), batch - 1))
                cache.batch_select_indices(chosen)
                rows = rows[chosen]
            elif kind == "copy":
                cache = copy.deepcopy(cache)
            found = kept.kept_queries(cache.layers[0], gate)
            whole = DynamicCache()
            with seer.dense(model):
                feed(model, rows, whole)
            expected = kept.kept_queries(whole.layers[0], gate).last.queries
            assert expected.shape[2] == WINDOW - 1
            torch.testing.assert_close(found.last.queries, expected, rtol=1e-4, atol=1e-4)


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


def test_gates_of_a_part_of_the_heads_have_the_window_of_all(model_of):
    """Where heads are spread over processes."""
    model = gated(model_of("llama"), "decode")
    state, (gate, _) = state_of(model), gates_of(model, "decode")
    state.head_rank, layer = 1, state.layers[0]
    assert layer.gate_of(gate.num_heads // 2, gate).query_window == WINDOW
    seer.set_policy(model, query_window=3)
    assert layer.gate_of(gate.num_heads // 2, gate).query_window == 3
    assert gate.new_query_state().capacity == 2 + 64


def test_errors(model_of):
    model = gated(model_of(), "decode")
    for value, error in ((0, ValueError), (65, ValueError), ("8", TypeError)):
        with pytest.raises(error, match="query_window must be"):
            seer.set_policy(model, query_window=value)
    assert [gate.query_window for gate in gates_of(model, "decode")] == [WINDOW, WINDOW]
    with pytest.raises(ValueError, match="gates for decoding"):
        seer.set_policy(attach(model_of(), None, seer.GateConfig(block_size=32)), query_window=2)


@pytest.mark.parametrize("name", ["right", "holes", "training", "gradients"])
def test_what_is_dense_is_the_untouched_model(model_of, ids_of, name):
    """Padding on the right, masks with holes, training: queries are seen there too, and nothing changes."""
    model, ids, caches, found = model_of(), ids_of(80, batch=2), [DynamicCache(), DynamicCache()], []
    mask = torch.ones(2, 81, dtype=torch.long)
    if name in ("right", "holes"):
        mask[0, slice(70, 80) if name == "right" else slice(30, 40)] = 0
    model.train(name == "training")
    for cache in caches:
        if found:
            gated(model, "decode")
        with torch.set_grad_enabled(name == "gradients"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            inputs = {"past_key_values": cache, "use_cache": True}
            parts = [model(ids, attention_mask=mask[:, :80], **inputs).logits]
            parts.append(model(ids_of(1, batch=2), attention_mask=mask, **inputs).logits)
        found.append(torch.cat(parts, 1))
    assert torch.equal(*found)
