"""record() says why layers were dense, and below how many tokens they are; and waits for nothing."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

import seerattention as seer
from decode_models import BOTH, SPARSE, attach, feed, generate
from seerattention.hf import DEFAULT_MIN_CONTEXT
from seerattention.hf.conditions import ASKED_FOR, BELOW_MIN_CONTEXT, DENSE_POLICY, NO_GATE
from tiny_models import logits_of


def gated(model, **options):
    return attach(model, SPARSE, BOTH, **{"prefill": seer.TopK(0.4), **options})


def test_nothing_dense_has_no_reasons(model_of, ids_of):
    model = gated(model_of())
    with seer.record(model) as stats:
        assert stats.min_context is None
        generate(model, ids_of(120), 4)
    assert (stats.dense_calls, stats.dense_reasons, stats.min_context) == (0, {}, 0)


def test_reasons_are_counted_by_layer(model_of, ids_of):
    model, ids = gated(model_of()), ids_of(120)
    seer.set_policy(model, layers={1: {"prefill": seer.Dense()}})
    with seer.record(model) as stats:
        logits_of(model, ids)
        with seer.dense(model):
            logits_of(model, ids)
            logits_of(model, ids)
        logits_of(model, ids, attention_mask=torch.ones(1, 1, 120, 120))
    assert stats.dense_calls == sum(sum(reasons.values()) for reasons in stats.dense_reasons.values()) == 7
    assert stats.dense_reasons[0][ASKED_FOR] == 2
    assert stats.dense_reasons[1] == {ASKED_FOR: 2, DENSE_POLICY: 1} | {
        reason: 1 for reason in stats.dense_reasons[0] if "more than causal" in reason
    }
    assert len(stats.dense_reasons[0]) == 2


@pytest.mark.parametrize(("minimum", "shown"), [(None, DEFAULT_MIN_CONTEXT["cpu"]), (121, 121), (0, 0)])
def test_min_context(model_of, ids_of, minimum, shown):
    model = gated(model_of(), min_context=minimum)
    with seer.record(model) as stats:
        generate(model, ids_of(119), 4)
    assert stats.min_context == shown
    expected = {None: {BELOW_MIN_CONTEXT: 4}, 121: {BELOW_MIN_CONTEXT: 2}, 0: None}[minimum]  # 119 and 120 tokens
    assert stats.dense_reasons == ({} if expected is None else {0: expected, 1: expected})


def test_layers_and_phases_without_gates(model_of, ids_of):
    """One layer has a window, and so no gate; decoding has none at all."""
    model = model_of("gemma3_text")
    torch.manual_seed(0)
    seer.attach(model, seer.GateConfig(block_size=32), prefill=seer.TopK(0.4), min_context=0)
    with seer.record(model) as stats:
        generate(model, ids_of(100), 3)
    assert stats.dense_reasons[1] == stats.dense_reasons[2] == {NO_GATE: 2}
    assert stats.dense_reasons[0] == {NO_GATE: 2, "the layer attends to a sliding window": 1}


@pytest.mark.parametrize("what", ["training", "gradients", "short", "padding", "weights"])
def test_reasons_of_warnings_are_those_of_records(model_of, ids_of, what):
    model, ids, cache = gated(model_of("llama", attn_implementation="eager")), ids_of(100), DynamicCache()
    mask = torch.ones(1, 164, dtype=torch.long)
    mask[:, 150:] = 0
    feed(model, ids, cache)
    run = {
        "training": lambda: logits_of(model.train(), ids),
        "gradients": lambda: model(ids),
        "weights": lambda: logits_of(model, ids, output_attentions=True),
        "short": lambda: feed(model, ids[:, :5], cache),
        "padding": lambda: feed(model, ids[:, :64], cache, attention_mask=mask),
    }[what]
    with seer.record(model) as stats, pytest.warns(UserWarning, match="attended densely, because") as caught:
        run()
    (reason,) = stats.dense_reasons[0]
    assert f"because {reason}" in str(caught[0].message)


def test_candidates_and_prompts_count_apart(model_of, ids_of):
    """One forward of both is two calls a layer."""
    model, ids = gated(model_of("llama")), ids_of(120)
    seer.set_policy(model, decode=seer.Dense())
    with seer.record(model) as stats:
        generate(model, ids, 3, use_cache=False)
    assert (stats.sparse_calls, stats.dense_calls) == (2 * 3, 2 * 2)
    assert stats.dense_reasons == {0: {DENSE_POLICY: 2}, 1: {DENSE_POLICY: 2}}
    assert stats.prompt_density < 0.7 < stats.total_density


def test_reading_alone_waits(model_of, ids_of, monkeypatch):
    """Of counting nothing comes to the host; reasons are there already."""
    model, ids = gated(model_of("llama")), ids_of(120)
    from seerattention.measure.stats import Statistics

    add, inside = Statistics.add, []

    def watched(self, *args):
        with monkeypatch.context() as patch:
            for name in ("item", "tolist", "__float__", "__bool__", "__int__", "cpu"):
                patch.setattr(torch.Tensor, name, lambda *_, name=name: inside.append(name))
            return add(self, *args)

    monkeypatch.setattr(Statistics, "add", watched)
    with seer.record(model) as stats:
        generate(model, ids, 3)
        with seer.dense(model):
            generate(model, ids, 3)
        reasons = stats.dense_reasons
    assert not inside
    assert reasons[0] == {ASKED_FOR: 3}
    assert 0 < stats.total_density < 1
