"""``generate`` without a cache, and speculative decoding, decide as cached greedy decoding does; and short chunks that
``generate`` says are a prompt are sparse."""

from __future__ import annotations

import copy
import functools
import inspect
import pickle
import warnings

import pytest
import torch
from transformers import DynamicCache

import seerattention as seer
from decode_models import BOTH, FINE, GREEDY, ONLY_DECODE, SPARSE, attach, feed, generate
from seerattention.gates import KeyState
from seerattention.hf import generation
from seerattention.hf.state import state_of
from tiny_models import make_ids, make_model

ONLY_PREFILL = seer.GateConfig(block_size=32)
GATES = {
    "prefill": (ONLY_PREFILL, {"decode": None, "prefill": seer.TopK(0.4)}),
    "decode": (ONLY_DECODE, {"decode": SPARSE}),
    "both": (BOTH, {"decode": SPARSE, "prefill": seer.TopK(0.4)}),
    "both, fine": (FINE, {"decode": SPARSE, "prefill": seer.TopK(0.4)}),
}
# Ways of generate in which several tokens are, or seem to be, a prompt.
WAYS = {
    "no cache": {"use_cache": False},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "assistant": {"assistant_model": None},
    "assistant of another kind": {"assistant_model": None, "num_assistant_tokens": 7},
}


def gated(model, gates, **options):
    config, policies = GATES[gates]
    return attach(model, config=config, **policies, **options)


def options_of(way, model_of):
    options = dict(WAYS[way])
    if "assistant_model" in options:
        options["assistant_model"] = model_of(seed=1 if way == "assistant" else 0)
        if way != "assistant":  # one that often guesses right: the same weights, a little moved
            with torch.no_grad():
                for parameter in options["assistant_model"].parameters():
                    parameter.mul_(1.02)
        options["assistant_model"].generation_config.num_assistant_tokens = options.pop("num_assistant_tokens", 4)
    return options


def prompt(ids_of, length=150):
    """With repetitions, in which prompt lookup finds candidates."""
    ids = ids_of(length)
    ids[:, length // 2 :] = ids[:, : length - length // 2]
    return ids


@functools.cache
def cached_greedy(name, gates):
    """Tokens and logits of the prompt; of an untouched model where ``gates`` is None."""
    model = make_model(name) if gates is None else gated(make_model(name), gates)
    return generate(model, prompt(make_ids))


@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_decides_as_cached_greedy_decoding(model_of, ids_of, name, way, gates):
    model, ids, options = model_of(name), prompt(ids_of), options_of(way, lambda seed: model_of(name, seed=seed))
    gated(model, gates)
    dense, expected = cached_greedy(name, None)[1], cached_greedy(name, gates)
    assert not torch.allclose(expected[1], dense, atol=1e-2)
    with seer.record(model) as stats, warnings.catch_warnings():
        warnings.filterwarnings("error", "seerattention")
        found = generate(model, ids, **options)
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-4)
    assert (stats.prompt_density < 1) == (gates != "decode")
    assert stats.sparse_calls > 0
    with seer.dense(model):
        torch.testing.assert_close(generate(model, ids, **options)[1], dense, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("family", ["gemma3_text", "glm4", "granite", "olmo2", "phi3", "qwen2", "qwen3_moe"])
def test_every_family_without_a_cache(model_of, ids_of, family, gates):
    model, ids = gated(model_of(family), gates), ids_of(150)
    expected, found = generate(model, ids, 8), generate(model, ids, 8, use_cache=False)
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["sdpa", "eager"])
@pytest.mark.parametrize("gates", GATES)
def test_left_padded_rows_without_a_cache(model_of, ids_of, gates, mode):
    model, ids = gated(model_of("qwen3", attn_implementation=mode), gates), ids_of(140, batch=3)
    mask = torch.ones_like(ids)
    mask[1, :9] = mask[2, :70] = 0
    expected = generate(model, ids, 8, attention_mask=mask)
    found = generate(model, ids, 8, attention_mask=mask, use_cache=False)
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 3}], ids=str)
@pytest.mark.parametrize("gates", GATES)
def test_beams_and_samples_without_a_cache(model_of, ids_of, gates, options):
    model, ids, found = gated(model_of(), gates), ids_of(140), []
    for use_cache in (True, False):
        torch.manual_seed(0)
        found.append(generate(model, ids, 8, use_cache=use_cache, **options))
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("minimum", [0, 145, 155, 160, 500])
@pytest.mark.parametrize("way", ["no cache", "prompt lookup", "assistant of another kind"])
def test_min_context_is_that_of_each_token(model_of, ids_of, way, minimum):
    """Prompts and tokens that are dense in the cached run for being short are so here."""
    model, ids, options = model_of(), prompt(ids_of), options_of(way, lambda seed: model_of(seed=seed))
    gated(model, "both", min_context=minimum)
    expected, found = generate(model, ids, 16), generate(model, ids, 16, **options)
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("way", ["prompt lookup", "assistant of another kind"])
def test_speculation_on_a_kept_cache_and_in_half_precision(model_of, ids_of, way):
    options = options_of(way, lambda seed: model_of(seed=seed).bfloat16())
    model, ids = gated(model_of(dtype=torch.bfloat16), "both"), prompt(ids_of)
    assert generate(model, ids, **options)[1].isfinite().all()


@pytest.mark.parametrize("way", ["prompt lookup", "assistant of another kind"])
def test_rejected_candidates_leave_what_is_encoded(model_of, ids_of, way, rebuilds, monkeypatch):
    """Keys of the prompt are encoded once a layer, and not again for every crop."""
    options = options_of(way, lambda seed: model_of(seed=seed))
    model, ids = gated(model_of(), "both"), prompt(ids_of)
    expected = generate(model, ids)
    rebuilds.clear()
    crop, crops = KeyState.crop, []
    monkeypatch.setattr(KeyState, "crop", lambda state, lengths: crops.append(1) or crop(state, lengths))
    found = generate(model, ids, **options)
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-4)
    assert len(rebuilds) <= 4  # with transformers 5.3 once more a layer
    assert len(crops) > len(rebuilds)


# ---- short chunks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 7, 31, 63])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3_text"])
def test_short_chunks_are_sparse_where_generate_says_that_they_are_a_prompt(model_of, ids_of, name, size):
    model, ids = model_of(name), ids_of(100)
    dense = generate(model, ids, 3)[1]
    gated(model, "prefill")
    with seer.record(model) as stats, warnings.catch_warnings():
        warnings.filterwarnings("error", "seerattention")
        found = generate(model, ids, 3, prefill_chunk_size=size)[1]
    gated_calls = 2 * -(-100 // size)
    assert stats.sparse_calls == gated_calls
    assert not torch.allclose(found, dense, atol=1e-2)
    seer.set_policy(model, prefill=seer.TopK(1.0))
    torch.testing.assert_close(generate(model, ids, 3, prefill_chunk_size=size)[1], dense, rtol=1e-4, atol=1e-4)


def test_short_turns_are_sparse_against_the_whole_history(model_of, ids_of):
    model, cache, said = gated(model_of("llama"), "prefill"), DynamicCache(), ids_of(100)
    for turn in (5, 1, 40):
        with seer.record(model) as stats:
            found = generate(model, said, 3, past_key_values=cache)
        assert stats.sparse_calls == 2
        assert stats.dense_calls == 4
        said = torch.cat((found[0], ids_of(turn)), 1)


def test_a_short_chunk_that_nobody_speaks_for_is_dense_with_one_warning(model_of, ids_of):
    model, ids, cache = model_of("llama"), ids_of(100), DynamicCache()
    feed(model, ids, cache)
    twin = copy.deepcopy(cache)
    expected = feed(model, ids[:, :5], twin)
    gated(model, "prefill")
    with pytest.warns(UserWarning, match="fewer tokens than a block"):
        assert torch.equal(feed(model, ids[:, :5], copy.deepcopy(cache)), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        feed(model, ids[:, :5], cache)


# ---- listening ------------------------------------------------------------------------------------------------------


def test_detach_and_copies_leave_the_method_as_it_was(model_of, ids_of):
    model, ids = model_of(), ids_of(150)
    before = inspect.signature(model.prepare_inputs_for_generation)
    gated(model, "both")
    assert inspect.signature(model.prepare_inputs_for_generation) == before
    expected = generate(model, ids, 8)[1]
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        listener = twin.prepare_inputs_for_generation
        assert listener.module is twin
        assert listener.state is state_of(twin)
        torch.testing.assert_close(generate(twin, ids, 8, use_cache=False)[1], expected, rtol=1e-4, atol=1e-4)
    seer.detach(model)
    assert "prepare_inputs_for_generation" not in model.__dict__
    model.prepare_inputs_for_generation = own = model.prepare_inputs_for_generation
    seer.detach(gated(model, "both"))
    assert model.__dict__["prepare_inputs_for_generation"] is own


def test_nothing_is_left_over_of_a_generation(model_of, ids_of):
    model, ids = gated(model_of(), "prefill"), ids_of(100)
    generate(model, ids, 3, prefill_chunk_size=1)
    assert not generation.single_tokens()
    with pytest.raises(RuntimeError, match="stop"):
        model.generate(ids, use_cache=False, logits_processor=[stop], **{**GREEDY, "max_new_tokens": 3})
    with seer.record(model) as stats, torch.no_grad():
        model(ids)  # one prompt
    assert (stats.sparse_calls, stats.dense_calls) == (2, 0)


def stop(*_):
    raise RuntimeError("stop")


def test_a_step_without_a_cache_of_which_nothing_is_known_is_dense(model_of, ids_of):
    """A generation loop of somebody's own that does not say which step is the first."""
    model, ids = model_of(), ids_of(100)
    with torch.no_grad():
        expected = model(ids).logits
        gated(model, "both")
        inputs = model.prepare_inputs_for_generation(ids, use_cache=False)
        with pytest.warns(UserWarning, match="does not say which of its tokens are a prompt"):
            assert torch.equal(model(**inputs).logits, expected)


@pytest.mark.parametrize("kind", ["lora", "prompt", "prefix"])
@pytest.mark.parametrize("attached_first", [True, False])
def test_adapters(model_of, ids_of, kind, attached_first):
    peft = pytest.importorskip("peft")
    config = {
        "lora": lambda: peft.LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False),
        "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
        "prefix": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
    }[kind]()
    model, ids = model_of(), ids_of(150)
    if attached_first:
        gated(model, "both")
    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, config).eval()
    if not attached_first:
        gated(adapted, "both")
    asked = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "min_new_tokens": 6}
    if kind == "prefix":
        for _ in range(2):  # PEFT itself fails, with gates and without
            with pytest.raises(RuntimeError):
                adapted.generate(**asked, **GREEDY, use_cache=False)
            with seer.record(adapted) as stats:
                adapted.generate(**asked, **GREEDY)
            assert stats.prompt_density < 1
        return
    for _ in range(2):  # PEFT changes methods for the time of a generation
        with seer.record(adapted) as stats:
            expected = adapted.generate(**asked, **GREEDY)
        assert stats.prompt_density < 1
        with seer.record(adapted) as stats:
            found = adapted.generate(**asked, **GREEDY, use_cache=False)
        torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), rtol=1e-3, atol=1e-3)
        assert stats.prompt_density < 1
