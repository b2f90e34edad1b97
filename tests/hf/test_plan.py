"""Layers that repeat what another one did: what they may repeat, and what comes between them."""

from __future__ import annotations

import dataclasses
import gc
import threading
import weakref

import pytest
import torch
from transformers import DynamicCache

import seerattention as seer
from plan_cases import BY_LAYER, LAYERS, LENGTH, ODD, attention_of, make, same
from seerattention.gates.state import HISTORY
from seerattention.hf import gates_of
from seerattention.hf.forward import present_plan
from seerattention.hf.kept import kept_queries
from seerattention.hf.state import state_of
from tiny_models import logits_of, make_ids, make_model

pytestmark = pytest.mark.usefixtures("on_a_gpu")


@pytest.mark.parametrize("use_cache", [False, True])
def test_layers_repeat_what_the_first_one_did(family, use_cache, repeated, ordinary):
    model = make(family)
    logits_of(model, make_ids(LENGTH), use_cache=use_cache)  # of a cache keys have other strides
    repeated.clear()
    for seed in (3, 4):
        ids = make_ids(LENGTH, seed=seed)
        found = logits_of(model, ids, use_cache=use_cache)
        same(found, ordinary(lambda ids=ids: logits_of(model, ids, use_cache=use_cache)))
    gated = [index for index, gate in enumerate(gates_of(model)) if gate is not None]
    # GLM-4's queries and keys are put in another order, which is more than a view.
    assert repeated == ([] if family == "glm4" else 2 * gated[1:])


@pytest.mark.newest
@pytest.mark.parametrize("policy", [seer.TopK(0.4), seer.RelativeThreshold(1.0), BY_LAYER], ids=str)
def test_kernels_of_the_package_are_repeated(policy, repeated, ordinary, real_kernels):
    model = make(policy=policy)
    repeated.clear()
    same(logits_of(model, make_ids(LENGTH)), ordinary(lambda: logits_of(model, make_ids(LENGTH))))
    assert repeated == [1, 2]


@pytest.mark.newest
def test_each_layer_by_factors_of_its_own(repeated, real_kernels):
    """What is repeated is the launches, and not the factors of the layer that left them."""
    model, ids = make(policy=BY_LAYER), make_ids(LENGTH)
    repeated.clear()
    found = logits_of(model, ids)
    assert repeated == [1, 2]
    for index, times in enumerate(BY_LAYER.layers):
        alike = dataclasses.replace(BY_LAYER, layers=(times,) * LAYERS)
        seer.set_policy(model, layers={index: alike})
    same(found, logits_of(model, ids))
    for index in range(LAYERS):
        seer.set_policy(model, layers={index: dataclasses.replace(BY_LAYER, layers=(1.0,) * LAYERS)})
    assert not torch.equal(found, logits_of(model, ids))


def test_another_length_begins_anew(repeated, ordinary):
    model = make()
    for length in (71, 71, LENGTH, 140, 140, 71):
        ids = make_ids(length, seed=length)
        repeated.clear()
        found = logits_of(model, ids)
        same(found, ordinary(lambda ids=ids: logits_of(model, ids)))
    assert repeated == [1, 2]


def test_gradients_are_noticed(repeated):
    """Of values alone, as an adapter may train them, and from one layer on only."""
    model, ids = make(), make_ids(LENGTH, seed=7)
    state, attention = state_of(model), attention_of(model)
    model.requires_grad_(False)
    with torch.no_grad():
        model(ids)
    state.layers[ODD].decoder_layer.register_forward_pre_hook(lambda *_: torch.set_grad_enabled(True) and None)
    attention.v_proj.weight.requires_grad_(True)
    repeated.clear()
    with torch.no_grad(), pytest.warns(UserWarning, match="gradients are recorded"):
        out = model(ids).logits
    assert out.requires_grad
    assert repeated == [1]


def test_what_everybody_sees_is_repeated_by_nobody(repeated):
    model, ids = make(), make_ids(LENGTH)
    repeated.clear()
    with seer.record(model) as stats:
        logits_of(model, ids)
    assert stats.sparse_calls == LAYERS
    with seer.dense(model):
        logits_of(model, ids)
    logits_of(model, ids, attention_mask=(torch.arange(LENGTH) >= 5)[None].long())
    logits_of(model, ids)
    assert repeated == [1, 2]  # of the last forward


def test_chunks_are_and_decoding_is_not(repeated, ordinary):
    model, ids = make(), make_ids(110)

    @torch.inference_mode()
    def run():
        cache = model(ids[:, :LENGTH], use_cache=True).past_key_values
        model(ids[:, LENGTH:109], past_key_values=cache)
        return model(ids[:, 109:], past_key_values=cache).logits

    for _ in range(3):
        repeated.clear()
        found = run()
    assert repeated == [1, 2, 1, 2]
    same(found, ordinary(run))


def test_layers_that_keep_queries_repeat_too(repeated, ordinary):
    """Those of the last tokens, which choose with the next one, are kept beside what is repeated, in chunks as well."""
    config = seer.GateConfig(block_size=32, decode=seer.DecodeGateConfig(query_window=8))
    model = make_model("llama", dtype=torch.float16, num_hidden_layers=LAYERS)
    seer.attach(model, config, prefill=seer.TopK(0.4), decode=seer.TokenBudget(64), min_context=0)
    ids = make_ids(LENGTH + 40)

    def run():
        cache, found = DynamicCache(config=model.config), []
        for part in (ids[:, :LENGTH], ids[:, LENGTH:]):
            logits_of(model, part, past_key_values=cache)
            for layer, gate in zip(cache.layers, gates_of(model, "decode"), strict=True):
                queries = kept_queries(layer, gate)
                found.append((list(queries.held), queries.last.queries.clone()))
        return found

    for _ in range(3):
        repeated.clear()
        found = run()
    assert repeated == [1, 2, 1, 2]
    assert [held for held, _ in found] == LAYERS * [[LENGTH]] + LAYERS * [[7 + HISTORY]]
    for (held, queries), (expected_held, expected) in zip(found, ordinary(run), strict=True):
        assert held == expected_held
        assert torch.equal(queries, expected)
    seer.set_policy(model, decode=seer.Dense())  # nothing is to be kept then
    for _ in range(2):
        repeated.clear()
        logits_of(model, make_ids(LENGTH))
    assert repeated == [1, 2]


def test_a_change_while_a_forward_is_under_way(repeated):
    """``set_policy`` and ``min_context`` from elsewhere, another implementation, and detach."""
    model, ids = make(), make_ids(LENGTH)
    state = state_of(model)
    repeated.clear()
    hook = state.layers[1].decoder_layer.register_forward_hook(lambda *_: setattr(state, "min_context", 1000) or None)
    logits_of(model, ids)
    assert repeated == [1]
    hook.remove()
    state.min_context = 0
    hook = state.layers[1].decoder_layer.register_forward_hook(lambda *_: seer.set_policy(model, seer.TopK(0.8)))
    repeated.clear()
    logits_of(model, ids)
    assert repeated == [1]
    hook.remove()
    hook = state.layers[1].decoder_layer.register_forward_hook(
        lambda *_: model.set_attn_implementation("sdpa") and None
    )
    with pytest.raises(RuntimeError, match="was changed to 'sdpa'"):
        logits_of(model, ids)
    hook.remove()
    model.set_attn_implementation("seer")
    state.layers[1].decoder_layer.register_forward_hook(lambda *_: seer.detach(model) and None)
    with pytest.raises(RuntimeError, match="gates were detached"):
        logits_of(model, ids)


def test_attention_that_does_not_come_to_the_attention_function_is_missed(repeated):
    model, ids = make(), make_ids(LENGTH)
    attention = attention_of(model)
    attention.forward = lambda hidden_states, **kwargs: (hidden_states, None)
    with pytest.warns(UserWarning, match="layers 2 are not attended"):
        logits_of(model, ids)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["k_proj", "v_proj", "o_proj"])
def test_an_exception_pins_no_tensors(where, error):
    model, kept = make(), []
    attention = attention_of(model)

    def fail(*args):
        raise error("here")

    def keep(module, args, kwargs):
        kept.extend(map(weakref.ref, kwargs["position_embeddings"]))

    attention.q_proj.register_forward_hook(lambda module, args, output: kept.append(weakref.ref(output)))
    attention.register_forward_pre_hook(keep, with_kwargs=True)
    getattr(attention, where).register_forward_pre_hook(fail)
    gc.collect()
    gc.disable()
    try:
        with pytest.raises(error, match="here"):
            logits_of(model, make_ids(LENGTH))
    finally:
        gc.enable()
    gc.collect()
    assert len(kept) == 3
    assert all(ref() is None for ref in kept)


def test_nothing_is_kept_after_a_forward(repeated):
    model, kept, inputs = make(), [], []
    for layer in state_of(model).layers:
        layer.attention.q_proj.register_forward_hook(lambda module, args, output: kept.append(weakref.ref(output)))
        layer.attention.q_proj.register_forward_hook(lambda module, args, output: inputs.append(args[0]))
    plans = []
    repeated.clear()
    hooked = state_of(model).layers[1].attention
    hooked.register_forward_pre_hook(lambda *_: plans.append(weakref.ref(present_plan())))
    gc.collect()
    gc.disable()
    try:
        logits_of(model, make_ids(LENGTH))
        assert len(kept) == LAYERS
        assert all(ref() is None for ref in (*kept, *plans))  # without a collection
    finally:
        gc.enable()
    assert len(plans) == 1
    assert repeated == [1, 2]
    assert not any(x.__dict__ for x in inputs)


def test_threads_have_plans_of_their_own(repeated):
    model = make()
    ids = [make_ids(LENGTH, seed=seed) for seed in range(3)]
    expected = [logits_of(model, x) for x in ids]
    found, failed = {}, []

    def run(index):
        try:
            for _ in range(3):
                found[index] = logits_of(model, ids[index])
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    for index in range(3):
        same(found[index], expected[index])
