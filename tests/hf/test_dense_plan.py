"""Layers of a prompt that is dense throughout do nothing but attend, and notice where that is not so."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import DynamicCache

import seerattention as seer
from call_counts import count_calls
from seerattention.hf import dense_plan
from seerattention.hf import state as state_module
from seerattention.hf.state import state_of
from tiny_models import attach, logits_of, make_ids, make_model

LAYERS, LENGTH = 4, 100


@pytest.fixture
def planned(monkeypatch):
    """Indices of the layers that went by a plan."""
    found, attend = [], dense_plan.DensePlan.attend

    def noting(plan, arguments):
        layer = plan.layer
        out = attend(plan, arguments)
        if out is not None:
            found.append(layer)
        return out

    monkeypatch.setattr(dense_plan.DensePlan, "attend", noting)
    return found


@pytest.fixture(autouse=True)
def not_parked(monkeypatch):
    """As where hooks have to stay (``tests/hf/test_parking.py``): layers are asked in every forward."""
    monkeypatch.setattr(state_module, "park", lambda state: False)


def make(family="llama", **options):
    model = make_model(family, num_hidden_layers=LAYERS)
    ids = make_ids(LENGTH)
    expected = logits_of(model, ids)
    return attach(model, seer.TopK(0.3), **{"min_context": 200, **options}), ids, expected


def test_short_prompts_are_those_of_the_untouched_model(planned):
    model, ids, expected = make()
    assert torch.equal(logits_of(model, ids), expected)
    assert planned == [1, 2, 3]
    padded = torch.cat([torch.zeros_like(ids[:, :9]), ids], dim=1)
    mask = (torch.arange(padded.shape[1]) >= 9).long()[None]
    found = logits_of(model, padded, attention_mask=mask)
    seer.detach(model)
    assert torch.equal(found, logits_of(model, padded, attention_mask=mask))
    assert planned == [1, 2, 3] * 2


def test_dense_is_for_prompts_of_any_length(planned):
    model, ids, expected = make(min_context=0)
    assert not torch.equal(logits_of(model, ids), expected)
    assert not planned
    with seer.dense(model):
        assert torch.equal(logits_of(model, ids), expected)
    assert planned == [1, 2, 3]


def test_a_chunk_that_makes_the_prompt_long_is_sparse(planned):
    model, _, _ = make()
    ids, cache = make_ids(256), DynamicCache(config=model.config)
    with torch.inference_mode():
        model(input_ids=ids[:, :128], past_key_values=cache, use_cache=True)
        assert planned == [1, 2, 3]
        found = model(input_ids=ids[:, 128:], past_key_values=cache, use_cache=True).logits
    assert planned == [1, 2, 3]
    seer.detach(model)
    assert not torch.equal(found, logits_of(model, ids)[:, 128:])


def test_whoever_looks_on_sees_every_layer(planned):
    model, ids, _ = make()
    with seer.record(model) as stats:
        logits_of(model, ids)
    assert not planned
    assert stats.total_density == 1
    assert len(stats.dense_reasons) == LAYERS


def test_a_layer_with_a_window_takes_the_ordinary_way(planned):
    model, ids, expected = make()
    layer = state_of(model).layers[2]
    layer.geometry = dataclasses.replace(layer.geometry, window=1000)
    assert torch.equal(logits_of(model, ids), expected)
    assert planned == [1, 3]


def test_queries_are_kept_for_decoding(planned):
    """Where decoded tokens choose with those before them, the prompt's last queries are wanted."""
    decode = seer.DecodeGateConfig(query_window=8)
    model = make_model("llama", num_hidden_layers=LAYERS)
    seer.attach(model, seer.GateConfig(decode=decode), decode=seer.TokenBudget(64), min_context=200)
    logits_of(model, make_ids(LENGTH))
    assert not planned


def test_probabilities_are_given_where_they_are_asked_for(planned):
    model = make_model("llama", num_hidden_layers=LAYERS)
    model.set_attn_implementation("eager")
    attach(model, seer.TopK(0.3), min_context=200)
    with torch.inference_mode():
        assert len(model(input_ids=make_ids(LENGTH), output_attentions=True).attentions) == LAYERS
    assert not planned


def test_calls_that_a_short_prompt_adds_are_few():
    """Of Python and C, by layer; 163 before there were plans."""
    counts = {}
    for attached in (False, True):
        for layers in (3, 8):
            model, ids = make_model("llama", num_hidden_layers=layers), make_ids(LENGTH)
            if attached:
                attach(model, seer.TopK(0.3), min_context=200)
            for _ in range(2):
                logits_of(model, ids, logits_to_keep=1, use_cache=False)
            counts[attached, layers] = count_calls(
                lambda model=model, ids=ids: logits_of(model, ids, logits_to_keep=1, use_cache=False)
            )
    dense, short = ((counts[attached, 8] - counts[attached, 3]) / 5 for attached in (False, True))
    assert 0 < short - dense <= 50
