"""Static caches, whose keys have room behind the tokens and are written in place: both phases as on dynamic ones."""

from __future__ import annotations

import copy
import random
import warnings

import pytest
import torch
from transformers import CompileConfig, DynamicCache, StaticCache

import seerattention as seer
from decode_models import BOTH, ONLY_DECODE, ONLY_FINE_DECODE, SPARSE, attach, feed, generate, nothing_kept
from seerattention.hf.masks import SeerMask

STATIC = {"cache_implementation": "static"}
ROOM = 160


def gated(model, **options):
    return attach(model, SPARSE, BOTH, prefill=seer.TopK(0.4), **options)


def static(model, length=ROOM):
    return StaticCache(config=model.config, max_cache_len=length)


@pytest.mark.parametrize("mode", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3_text", "phi3"])
def test_generate_decides_as_on_a_dynamic_cache(model_of, ids_of, name, mode, rebuilds):
    model, ids = gated(model_of(name, attn_implementation=mode)), ids_of(110)
    expected = generate(model, ids)
    rebuilds.clear()
    with seer.record(model) as stats, warnings.catch_warnings():
        warnings.filterwarnings("error", "seerattention")
        found = generate(model, ids, **STATIC)
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-4)
    gates = 2  # of each phase
    assert stats.sparse_calls == 24 * gates
    assert len(rebuilds) == gates  # what is encoded stays with a cache that is written in place, too


@pytest.mark.parametrize("mode", ["sdpa", "eager"])
@pytest.mark.parametrize("options", [{}, {"prefill_chunk_size": 64}], ids=str)
def test_left_padded_rows_equal_those_of_a_dynamic_cache(model_of, ids_of, mode, options):
    model, ids = gated(model_of("qwen3", attn_implementation=mode)), ids_of(110, batch=3)
    mask = torch.ones_like(ids)
    mask[1, :7] = mask[2, :60] = 0
    expected = generate(model, ids, attention_mask=mask, **options)
    found = generate(model, ids, attention_mask=mask, **options, **STATIC)
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["sdpa", "eager"])
def test_dense_is_the_untouched_model(model_of, ids_of, mode):
    model, ids = model_of("llama", attn_implementation=mode), ids_of(110, batch=2)
    mask = torch.ones_like(ids)
    mask[1, :20] = 0
    runs = [{}, {"attention_mask": mask}, {"prefill_chunk_size": 50}]
    expected = [generate(model, ids, 6, **STATIC, **options)[1] for options in runs]
    gated(model)
    with seer.dense(model):
        assert all(
            torch.equal(generate(model, ids, 6, **STATIC, **options)[1], logits)
            for options, logits in zip(runs, expected, strict=True)
        )
    seer.detach(model)
    assert torch.equal(generate(model, ids, 6, **STATIC)[1], expected[0])


def test_a_long_prompt_makes_no_mask(model_of, ids_of, monkeypatch):
    """One of all its tokens by all slots would take more memory than anything else."""
    model = gated(model_of("llama"))
    made = []
    monkeypatch.setattr(SeerMask, "materialize", lambda self: made.append(self))
    cache = static(model)
    for ids in ids_of(128).split(64, 1):
        feed(model, ids, cache)
    assert not made


@pytest.mark.parametrize(
    ("inference", "config"), [(False, ONLY_DECODE), (True, ONLY_DECODE), (False, ONLY_FINE_DECODE)]
)
def test_any_history_of_a_cache_equals_computing_from_scratch(model_of, ids_of, inference, config):
    """Tokens, dense tokens, chunks, reorders, copies, resets; also where torch does not count changes in place."""
    model, random_ = attach(model_of("qwen3"), seer.TopK(0.3), config), random.Random(0)
    with torch.inference_mode() if inference else torch.no_grad():
        cache = static(model, 400)
        feed(model, ids_of(60, batch=2), cache)
        for step in range(60):
            kind = random_.choice(["append"] * 6 + ["chunk", "dense", "reorder", "copy", "reset"])
            if kind == "chunk":
                feed(model, ids_of(random_.randint(2, 9), batch=2, seed=step), cache)
            elif kind == "dense":
                with seer.dense(model):
                    feed(model, ids_of(1, batch=2, seed=step), cache)
            elif kind == "reorder":
                cache.reorder_cache(torch.tensor([random_.randrange(2) for _ in range(2)]))
            elif kind == "copy":
                cache = copy.deepcopy(cache)
            elif kind == "reset":
                length = int(cache.get_seq_length())
                cache.reset()
                feed(model, ids_of(min(length, 90), batch=2, seed=step), cache)
            ids = ids_of(1, batch=2, seed=100 + step)
            twin = copy.deepcopy(cache)
            logits = feed(model, ids, cache)
            with nothing_kept():
                torch.testing.assert_close(logits, feed(model, ids, twin), rtol=1e-4, atol=1e-4)


def test_a_token_reads_what_it_reads_of_a_dynamic_cache(model_of, ids_of):
    model = gated(model_of("llama"))
    caches = [static(model), DynamicCache(config=model.config)]
    for cache in caches:
        feed(model, ids_of(100), cache)
    for seed in range(40):
        with seer.record(model) as stats:
            found, expected = (feed(model, ids_of(1, seed=seed), cache) for cache in caches)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert stats.sparse_calls == 4
        assert stats.density < 0.5


@pytest.mark.parametrize("gates", ["prefill", "both"])
def test_compiled_decoding(model_of, ids_of, gates):
    """As ``generate`` compiles it on GPUs. Without gates for it decoding is dense, and nothing of it is looked at."""
    model, ids = model_of("llama"), ids_of(100)
    attach(model, SPARSE if gates == "both" else None, BOTH if gates == "both" else seer.GateConfig(block_size=32),
           prefill=seer.TopK(0.4))  # fmt: skip
    caches = [static(model), static(model)]
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=gates == "prefill")
    for cache in caches:
        feed(model, ids, cache)
    for seed in range(4):
        token = ids_of(1, seed=seed)
        with seer.record(model) if gates == "both" else warnings.catch_warnings() as stats:
            found = feed(compiled, token, caches[0])
        assert gates == "prefill" or stats.sparse_calls == 2
        torch.testing.assert_close(found, feed(model, token, caches[1]), rtol=1e-4, atol=1e-4)


def test_observers_see_prompts_in_static_caches(model_of, ids_of):
    model, ids = gated(model_of("llama")), ids_of(100)
    for context in (seer.dense(model), warnings.catch_warnings()):
        lists = []
        for cache in (None, static(model)):
            seen = []
            with context, seer.observe(model, lambda inputs, blocks, seen=seen: seen.append((inputs, blocks))):
                feed(model, ids, cache)
            lists.append(seen)
            context = seer.dense(model) if lists[0][0][1] is None else warnings.catch_warnings()
        for (a, blocks_a), (b, blocks_b) in zip(*lists, strict=True):
            torch.testing.assert_close(a.k, b.k, rtol=1e-4, atol=1e-4)
            assert (blocks_a is None) == (blocks_b is None)
            assert blocks_a is None or torch.equal(blocks_a.to_mask(), blocks_b.to_mask())


def test_where_torch_cannot_compile_attached_models_decoding_is_not_compiled(model_of, ids_of, monkeypatch):
    monkeypatch.setattr("seerattention.hf.generation.COMPILES_ATTACHED", False)
    model = gated(model_of())
    config = copy.deepcopy(model.generation_config)
    config.compile_config = CompileConfig(backend="eager")
    config.compile_config._compile_all_devices = True
    inputs = {"past_key_values": static(model)}
    for each in (model, copy.deepcopy(model)):
        assert not each._valid_auto_compile_criteria(inputs, config)
    ids = ids_of(110)
    monkeypatch.setattr(type(model), "get_compiled_call", lambda *_: pytest.fail("it is compiled"))
    generate(model, ids, generation_config=config, **STATIC)
    seer.detach(model)
    assert model._valid_auto_compile_criteria(inputs, config)
    assert "_valid_auto_compile_criteria" not in vars(model)
