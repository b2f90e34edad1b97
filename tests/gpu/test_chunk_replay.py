"""Chunks on a cache that are replayed, and whose layers repeat each other, on a GPU: what calls one by one give."""

from __future__ import annotations

import warnings

import pytest
import torch
from transformers import DynamicCache

import seerattention as seer
from gpu.test_replay import MASS, POLICIES, SUB_BLOCKS
from plan_cases import in_chunks, note_repeats
from seerattention import selectors
from seerattention.hf import attention
from seerattention.ops import replay, triton_launch
from seerattention.selectors import GateSelector
from tiny_models import make_ids, make_model

# Chunks that begin with a block of 64, and inside of one; the last of few queries on many keys, whose lists are cut
# into parts.
CUTS = [[1000], [1024, 2048], [1000, 2000, 2100], [64, 191]]
TOKENS = 2200
POLICIES = [policy for policy in POLICIES if not getattr(policy, "layers", ())]
POLICIES += [seer.TopK(0.2, uniform=True), seer.TopK(0.3, last_blocks_dense=1)]
POLICIES.append(seer.RelativeThreshold(1.1, dense_rows=2, layers=(0.5, 1.0, 2.0)))
POLICIES.append(seer.Budget(0.4, blocks=(2.0, 9.0), factors=(0.6, 1.4), layers=(0.5, 1.0, 2.0)))


def make(family="llama", policy=None, config=None, layers=3, dtype=torch.bfloat16, **options):
    torch.manual_seed(0)
    options = {"head_dim": 64, **options} if family in ("llama", "qwen3") else options
    model = make_model(family, dtype=dtype, num_hidden_layers=layers, **options).cuda()
    return seer.attach(model, config or seer.GateConfig(), prefill=policy or seer.TopK(0.3), min_context=0)


def ids_of(seed=0, tokens=TOKENS, batch=1):
    return make_ids(tokens, seed=seed, batch=batch).cuda()


@pytest.fixture
def ordinary(monkeypatch):
    """A function that runs another one with every launch through the JIT, and every layer by itself."""

    def run(function):
        with monkeypatch.context() as changed:
            changed.setattr(triton_launch, "KNOWN", False)
            changed.setattr(attention, "make_plan", lambda *given: None)
            changed.setattr(GateSelector, "attend_at_once", lambda *given: None)
            return function()

    return run


@pytest.fixture
def repeated(monkeypatch):
    """Indices of the layers that repeated what another one did."""
    return note_repeats(monkeypatch)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("config", [None, SUB_BLOCKS, MASS], ids=["paper", "sub_block", "mass"])
@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_chunks_equal_ordinary_launches(policy, config, dtype, ordinary, repeated):
    model, cuts = make(policy=policy, config=config, dtype=dtype), [1024, 1999]
    for seed in range(4):
        ids = ids_of(seed)
        repeated.clear()
        found = in_chunks(model, ids, cuts)
        assert torch.equal(found, ordinary(lambda ids=ids: in_chunks(model, ids, cuts)))
    assert repeated == 3 * [1, 2]
    with seer.dense(model):
        assert not torch.equal(found, in_chunks(model, ids, cuts))


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("cuts", CUTS, ids=str)
def test_chunks_of_any_length(cuts, batch, ordinary, repeated):
    model = make()
    for seed in range(4):
        ids = ids_of(seed, batch=batch)
        repeated.clear()
        found = in_chunks(model, ids, cuts)
        assert torch.equal(found, ordinary(lambda ids=ids: in_chunks(model, ids, cuts)))
    assert repeated == (len(cuts) + 1) * [1, 2]


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "gemma3_text", "olmo2", "glm4"])
def test_families(family, ordinary, repeated):
    """GLM-4's queries and keys are more than views; of Gemma 3's layers two have no window."""
    model = make(family)
    for seed in range(4):
        ids = ids_of(seed)
        repeated.clear()
        found = in_chunks(model, ids, [1000, 1600])
        assert torch.equal(found, ordinary(lambda ids=ids: in_chunks(model, ids, [1000, 1600])))
    assert repeated == 3 * {"glm4": [], "gemma3_text": [2]}.get(family, [1, 2])


def test_a_new_number_of_keys_is_recorded_when_it_is_first_seen(monkeypatch, repeated, ordinary):
    """And each of the layers that follow is one replay."""
    monkeypatch.setattr(selectors, "_CHUNKS", replay.Replays(passing=True))
    model, cuts, launches = make(), range(200, TOKENS, 200), []
    for _ in range(3):  # the first chunk of all, which is a whole prompt; chunks, once
        in_chunks(model, ids_of(0, 400), [200])
    launch = replay.Recording.launch
    monkeypatch.setattr(replay.Recording, "launch", lambda *given: launches.append(1) or launch(*given))
    repeated.clear()
    ids = ids_of(1)
    found = in_chunks(model, ids, cuts)
    assert repeated == 11 * [1, 2]
    assert len(launches) == 3 + 3 + 9 * 2  # both chunks that were known, and of the others layers after the first
    assert torch.equal(found, ordinary(lambda: in_chunks(model, ids, cuts)))


def test_streams_of_their_own(repeated):
    model, ids, cuts = make(), ids_of(), [1000, 1600]
    expected = in_chunks(model, ids, cuts)
    for _ in range(2):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                repeated.clear()
                found = in_chunks(model, ids, cuts)
        torch.cuda.current_stream().wait_stream(stream)
        assert torch.equal(found, expected)
        assert repeated == 3 * [1, 2]


def test_another_stream_between_chunks(repeated):
    model, ids = make(), ids_of()
    expected = in_chunks(model, ids, [1000, 1600])
    side = torch.cuda.Stream()
    for _ in range(3):
        repeated.clear()
        cache = DynamicCache(config=model.config)
        parts = [in_chunks(model, ids[:, :1000], [], cache)]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            parts.append(in_chunks(model, ids[:, 1000:1600], [], cache))
        torch.cuda.current_stream().wait_stream(side)
        parts.append(in_chunks(model, ids[:, 1600:], [], cache))
        assert torch.equal(torch.cat(parts, 1), expected)
    assert repeated == 3 * [1, 2]


def test_generate_in_chunks(ordinary, repeated):
    model, ids = make(), ids_of(2, 1500)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    options["attention_mask"] = torch.ones_like(ids)
    for _ in range(4):
        repeated.clear()
        found = model.generate(ids, prefill_chunk_size=500, **options)
    assert repeated == 3 * [1, 2]
    assert torch.equal(found, ordinary(lambda: model.generate(ids, prefill_chunk_size=500, **options)))


def count_waits(model, given):
    """How often the host waits for the GPU in each of three chunks, when all is compiled."""
    cache, ids, found = DynamicCache(), ids_of(), []
    for _ in range(2):
        in_chunks(model, ids, [600, 1200, 1800])
    for start in range(0, 1800, 600):
        inputs = {"position_ids": torch.arange(start, start + 600, device="cuda")[None]} if given else {}
        torch.cuda.synchronize()
        with warnings.catch_warnings(record=True) as caught, torch.inference_mode():
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                model(ids[:, start : start + 600], past_key_values=cache, use_cache=True, logits_to_keep=1, **inputs)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        found.append(sum("called a synchronizing" in str(warning.message) for warning in caught))
    return found


@pytest.mark.parametrize("given", [False, True])
def test_no_layer_waits(given):
    """The host waits as often in models of more layers; where the decoder counts positions, no more than densely."""
    counts = [count_waits(make(layers=layers), given) for layers in (2, 5)]
    assert counts[0] == counts[1]
    model = make()
    with seer.dense(model):
        dense = count_waits(model, given)
    assert given or counts[0] == dense


def test_both_gates(ordinary, repeated):
    """Queries that a decode gate with a window keeps are kept beside what is repeated."""
    torch.manual_seed(0)
    config = seer.GateConfig(decode=seer.DecodeGateConfig(query_window=8))
    model = make_model("llama", dtype=torch.bfloat16, head_dim=64, num_hidden_layers=3).cuda()
    seer.attach(model, config, prefill=seer.TopK(0.3), decode=seer.TokenBudget(256), min_context=0)
    ids = ids_of()

    def run():
        cache = DynamicCache(config=model.config)
        parts = [in_chunks(model, ids[:, :2000], [1000], cache)]
        parts += [in_chunks(model, ids[:, i : i + 1], [], cache) for i in range(2000, 2006)]
        return torch.cat(parts, 1)

    for _ in range(3):
        repeated.clear()
        found = run()
    assert repeated == 2 * [1, 2]
    assert torch.equal(found, ordinary(run))
