"""Hooks are away while no layer has anything to do, and there when one has; nobody notices."""

from __future__ import annotations

import copy
import pickle
import threading
import warnings

import pytest
import torch
from torch import nn
from transformers import DynamicCache

import seerattention as seer
from call_counts import count_calls
from seerattention.hf.state import state_of
from tiny_models import attach, logits_of, make_ids, make_model

LAYERS, SHORT, LONG, MINIMUM = 3, 40, 200, 100


def make(family="llama", **options):
    model = make_model(family, **({} if family == "gemma3_text" else {"num_hidden_layers": LAYERS}))
    return attach(model, seer.TopK(0.3), **{"min_context": MINIMUM, **options})


def hooks(model) -> int:
    """How many hooks the layers have."""
    modules = [module for layer in model.model.layers for module in layer.modules()]
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules)


def is_parked(model) -> bool:
    assert state_of(model).parked == (hooks(model) == 0)
    return state_of(model).parked


def test_short_prompts_go_through_the_untouched_layers(family):
    model = make_model(family)
    expected = [logits_of(model, make_ids(length)) for length in (SHORT, LONG)]
    attach(model, seer.TopK(0.3), min_context=MINIMUM)
    all_hooks = hooks(model)
    sparse = logits_of(model, make_ids(LONG))
    assert not is_parked(model)
    for _ in range(2):
        assert torch.equal(logits_of(model, make_ids(SHORT)), expected[0])
        assert is_parked(model)
        assert torch.equal(logits_of(model, make_ids(LONG)), sparse)
        assert hooks(model) == all_hooks
    assert not torch.equal(sparse, expected[1])
    logits_of(model, make_ids(SHORT))
    seer.detach(model)
    assert hooks(model) == 0
    assert torch.equal(logits_of(model, make_ids(LONG)), expected[1])


def test_dense_decoding_does_too():
    model, ids = make_model(num_hidden_layers=LAYERS), make_ids(LONG)
    attach(model, seer.TopK(0.3), min_context=MINIMUM)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        assert not is_parked(model)
        found = model(make_ids(1), past_key_values=cache).logits
        assert is_parked(model)
        cache.crop(-1)
        with seer.dense(model):
            assert torch.equal(found, model(make_ids(1), past_key_values=cache).logits)
    assert model.generate(ids, max_new_tokens=4, do_sample=False).shape[1] == LONG + 4
    assert is_parked(model)


def test_a_chunk_that_makes_the_prompt_long_finds_the_hooks():
    model, ids = make(), make_ids(LONG)
    whole, cache = logits_of(model, ids), DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :64], past_key_values=cache)
        assert is_parked(model)
        with seer.record(model) as stats:
            found = model(ids[:, 64:], past_key_values=cache).logits
    assert stats.sparse_calls == LAYERS
    # The first chunk was attended densely, the whole prompt was not.
    assert found.shape == whole[:, 64:].shape


def test_whoever_looks_on_sees_every_layer():
    model = make()
    logits_of(model, make_ids(SHORT))
    assert is_parked(model)
    with seer.record(model) as stats:
        logits_of(model, make_ids(SHORT))
    assert stats.dense_calls == LAYERS
    assert not is_parked(model)


def test_queries_that_decoding_needs_are_kept():
    config = seer.GateConfig(block_size=32, decode=seer.DecodeGateConfig(query_window=4))
    model = make_model(num_hidden_layers=LAYERS)
    seer.attach(model, config, prefill=seer.TopK(0.3), decode=seer.TokenBudget(64), min_context=MINIMUM)
    logits_of(model, make_ids(SHORT))
    assert not is_parked(model)
    seer.set_policy(model, decode=seer.Dense())
    logits_of(model, make_ids(SHORT))
    assert is_parked(model)


@pytest.mark.newest
@pytest.mark.parametrize("part", ["", "self_attn", "self_attn.k_proj"])
@pytest.mark.parametrize("before", [False, True], ids=["parked_before", "from_the_start"])
def test_layers_that_are_compiled_keep_them(part, before):
    model = make()
    if not before:
        logits_of(model, make_ids(SHORT))
        assert is_parked(model)
    model.model.layers[1].get_submodule(part).compile(backend="eager")
    logits_of(model, make_ids(SHORT))
    assert not is_parked(model)
    with seer.record(model) as stats:
        logits_of(model, make_ids(LONG))
    assert stats.sparse_calls == LAYERS
    torch._dynamo.reset()


@pytest.mark.newest
def test_a_compiled_model_keeps_them():
    model = make()
    logits_of(model, make_ids(SHORT))
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled(make_ids(SHORT))
        assert not is_parked(model)
        with seer.record(model) as stats:
            compiled(make_ids(LONG))
    assert stats.sparse_calls == LAYERS
    torch._dynamo.reset()


def test_other_hooks_keep_their_place():
    """Ours see what the modules give, whatever hooks that come later make of it."""
    model = make()
    seen = []
    attention = model.model.layers[1].self_attn
    with seer.observe(model, lambda inputs, blocks: seen.append(inputs.k_pre) if inputs.layer == 1 else None):
        logits_of(model, make_ids(LONG))
        logits_of(model, make_ids(SHORT))
        attention.k_proj.register_forward_hook(lambda module, args, output: 2 * output)
        logits_of(model, make_ids(LONG))
    assert torch.equal(seen[0], seen[-1])
    logits_of(model, make_ids(SHORT))
    assert not is_parked(model)


def test_a_hook_that_comes_while_ours_are_away():
    model, seen = make(), []
    logits_of(model, make_ids(SHORT))
    assert is_parked(model)
    model.model.layers[1].self_attn.k_proj.register_forward_hook(lambda module, args, output: 2 * output)
    with seer.observe(model, lambda inputs, blocks: seen.append(inputs) if inputs.layer == 1 else None):
        logits_of(model, make_ids(LONG))
    hidden = []
    model.model.layers[1].self_attn.k_proj.register_forward_pre_hook(lambda module, args: hidden.append(args[0]))
    logits_of(model, make_ids(LONG))
    weight = model.model.layers[1].self_attn.k_proj.weight.detach()
    expected = (hidden[-1].clone() @ weight.T).unflatten(-1, (2, -1)).transpose(1, 2)
    torch.testing.assert_close(seen[-1].k_pre, expected)  # and not twice as much


def test_modules_that_are_replaced_while_they_are_away():
    model = make()
    logits_of(model, make_ids(SHORT))
    attention = model.model.layers[1].self_attn
    attention.k_proj = copy.deepcopy(attention.k_proj)
    with seer.record(model) as stats:
        logits_of(model, make_ids(LONG))
    assert stats.sparse_calls == LAYERS
    logits_of(model, make_ids(SHORT))
    assert is_parked(model)
    attention.q_proj = nn.Sequential(attention.q_proj)
    logits_of(model, make_ids(SHORT))
    with seer.record(model) as stats:
        logits_of(model, make_ids(LONG))
    assert stats.sparse_calls == LAYERS


@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_have_hooks_of_their_own(twin_of):
    model = make()
    sparse = logits_of(model, make_ids(LONG))
    logits_of(model, make_ids(SHORT))
    twin = twin_of(model)
    assert torch.equal(logits_of(twin, make_ids(LONG)), sparse)
    assert is_parked(model)
    assert not is_parked(twin)
    seer.detach(twin)
    assert hooks(twin) == 0
    assert torch.equal(logits_of(model, make_ids(LONG)), sparse)


def test_an_error_in_a_short_prompt_leaves_all_as_it_was():
    model = make()
    hook = model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        logits_of(model, make_ids(SHORT))
    hook.remove()
    with seer.record(model) as stats:
        logits_of(model, make_ids(LONG))
    assert stats.sparse_calls == LAYERS


def test_threads_with_prompts_of_both_kinds():
    model = make()
    expected = {length: logits_of(model, make_ids(length)) for length in (SHORT, LONG)}
    wrong, start = [], threading.Barrier(4)

    def run(length):
        start.wait()
        for _ in range(15):
            with torch.no_grad():
                if not torch.equal(logits_of(model, make_ids(length)), expected[length]):
                    wrong.append(length)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        threads = [threading.Thread(target=run, args=(length,)) for length in (SHORT, LONG, SHORT, LONG)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []
    assert "outside" not in state_of(model).warned


def test_what_a_short_prompt_costs_is_next_to_nothing():
    """Calls of Python and C that it has more than in the untouched model, which jump with the versions of both."""
    model = make_model(num_hidden_layers=8)
    ids = make_ids(SHORT)

    def run():
        logits_of(model, ids)

    run()
    before = count_calls(run)
    attach(model, seer.TopK(0.3), min_context=MINIMUM)
    run()
    run()
    assert (count_calls(run) - before) / 8 <= 25
