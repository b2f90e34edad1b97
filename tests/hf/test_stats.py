"""record and calibrate: densities from the very lists that attention read."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import seerattention as seer
from seerattention.hf.state import state_of
from tiny_models import attach, logits_of


def test_densities_are_those_of_the_lists(model_of, ids_of):
    model, lists = model_of(), []
    attach(model, seer.TopP(0.5))
    with seer.record(model) as stats, seer.observe(model, lambda inputs, blocks: lists.append(blocks)):
        logits_of(model, ids_of(200, batch=2))
        logits_of(model, ids_of(90))
    densities = [blocks.density() for blocks in lists]
    assert stats.sparse_calls == 4
    assert stats.density == pytest.approx(sum(densities) / 4)
    selected = sum(int(blocks.counts.sum()) for blocks in lists)
    causal = sum(blocks.counts[..., 0].numel() * n * (n + 1) // 2 for blocks in lists for n in [blocks.num_key_blocks])
    assert stats.total_density == pytest.approx(selected / causal)
    assert 0 < stats.total_density < 1
    assert set(stats.per_layer) == {0, 1}
    assert stats.per_layer[0] != stats.per_layer[1]


def test_padding_does_not_count(model_of, ids_of):
    model = model_of()
    attach(model, seer.TokenBudget(32))
    mask = torch.zeros(2, 320, dtype=torch.long)
    mask[0, 192:] = 1
    mask[1, 310:] = 1
    with seer.record(model) as stats:
        logits_of(model, ids_of(320, batch=2), attention_mask=mask)
    # 128 tokens: 4 rows of 1 out of 1 + 2 + 3 + 4 blocks; 10 tokens: 1 of 1.
    assert stats.total_density == pytest.approx((4 + 1) / (10 + 1))
    with seer.record(model) as stats, seer.dense(model):
        logits_of(model, ids_of(320, batch=2), attention_mask=mask)
    assert stats.total_density == 1.0


def test_a_selector_that_lists_padding_does_not_count_it(model_of, ids_of):
    model = model_of()

    def everything(q, k, *, layer, scale, lengths):
        return seer.BlockIndices.from_mask(torch.ones(2, 4, 5, 5, dtype=torch.bool), 64)

    seer.attach(model, selector=everything, min_context=0)
    mask = torch.ones(2, 320, dtype=torch.long)
    mask[0, 100:] = 0
    with seer.record(model) as stats:
        logits_of(model, ids_of(320, batch=2), attention_mask=mask)
    assert stats.density == 1.0


def test_dense_calls_count_as_one(model_of, ids_of):
    model = model_of()
    attach(model, seer.TokenBudget(32))
    seer.set_policy(model, layers={1: seer.Dense()})
    with seer.record(model) as stats:
        logits_of(model, ids_of(128))
    assert (stats.sparse_calls, stats.dense_calls) == (1, 1)
    assert stats.density == pytest.approx(4 / 10)
    assert stats.total_density == pytest.approx((4 + 10) / 20)
    assert stats.per_layer == pytest.approx({0: 0.4, 1: 1.0})
    assert "density=0.4" in repr(stats)


def test_decoding_counts_as_dense_rows(model_of, ids_of):
    model, ids = model_of(), ids_of(128)
    attach(model, seer.TokenBudget(32))
    with seer.record(model) as stats:
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=3,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    # Prefill reads 4 of 10 blocks; two steps read all 5 blocks of their one row.
    assert stats.total_density == pytest.approx((4 + 5 + 5) / (10 + 5 + 5))


def test_nothing_recorded_is_dense(model_of):
    model = model_of()
    attach(model)
    with seer.record(model) as stats:
        pass
    assert (stats.density, stats.total_density, stats.per_layer) == (1.0, 1.0, {})


def test_records_nest(model_of, ids_of):
    model = model_of()
    attach(model)
    with seer.record(model) as outer:
        logits_of(model, ids_of(100))
        with seer.record(model) as inner:
            logits_of(model, ids_of(100))
        logits_of(model, ids_of(100))
    assert (outer.sparse_calls, inner.sparse_calls) == (6, 2)


def make_batches(ids_of, padded):
    batches = [{"input_ids": ids_of(700, batch=2, seed=seed)} for seed in range(2)]
    if padded:
        for batch in batches:
            batch["attention_mask"] = torch.ones(2, 700, dtype=torch.long)
            batch["attention_mask"][0, :200] = 0
    return batches


@pytest.mark.parametrize("density", [0.25, 0.5, 0.8])
@pytest.mark.parametrize("padded", [False, True])
def test_calibrate_reaches_the_density(model_of, ids_of, density, padded):
    model = model_of(num_hidden_layers=3)
    attach(model)
    batches = make_batches(ids_of, padded)
    policy = seer.calibrate(model, batches, density=density, passes=3)
    assert isinstance(policy, seer.Threshold)
    assert state_of(model).policy == policy
    with seer.record(model) as stats:
        for batch in batches:
            logits_of(model, **{"ids": batch["input_ids"], "attention_mask": batch.get("attention_mask")})
    assert stats.total_density == pytest.approx(density, abs=0.03)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("density", "exponent"), [(0.35, 1.0), (0.6, 1.0), (0.35, 0.5), (0.5, 0.0)])
def test_calibrate_finds_the_factor_of_a_relative_threshold(model_of, ids_of, density, exponent, padded):
    model = model_of(num_hidden_layers=3)
    attach(model)
    batches = make_batches(ids_of, padded)
    given = seer.RelativeThreshold(1.0, min_blocks=2, dense_rows=3, last_blocks_dense=1, exponent=exponent)
    policy = seer.calibrate(model, batches, density=density, policy=given)
    assert dataclasses.replace(policy, factor=1.0) == given
    assert state_of(model).policy == policy
    with seer.record(model) as stats:
        for batch in batches:
            logits_of(model, **{"ids": batch["input_ids"], "attention_mask": batch.get("attention_mask")})
    assert stats.total_density == pytest.approx(density, rel=0.05)
    with pytest.raises(ValueError, match="always keeps is 0"):
        seer.calibrate(model, batches, density=0.02, policy=given)
    with pytest.raises(TypeError, match="factor of a RelativeThreshold, got TopK"):
        seer.calibrate(model, batches, density=0.5, policy=seer.TopK(0.1))


def test_calibrate_takes_tensors_and_clears_layer_policies(model_of, ids_of):
    model = model_of()
    attach(model)
    seer.set_policy(model, layers={0: seer.Dense()})
    seer.calibrate(model, (ids_of(300, seed=seed) for seed in range(2)), density=0.5)
    with seer.record(model) as stats:
        logits_of(model, ids_of(300))
    assert stats.dense_calls == 0


def test_calibrate_errors(model_of, ids_of):
    model = model_of()
    attach(model)
    with pytest.raises(ValueError, match="between 0 and 1"):
        seer.calibrate(model, [ids_of(100)], density=1.5)
    with pytest.raises(ValueError, match="at least one batch"):
        seer.calibrate(model, [], density=0.5)
    with pytest.raises(ValueError, match="out of reach"):
        seer.calibrate(model, [ids_of(100)], density=0.1)
    with pytest.raises(ValueError, match="no prompt"):
        seer.calibrate(model, [ids_of(1)], density=0.5)
    seer.detach(model)
    seer.attach(model, selector=lambda *args, **kwargs: None)
    with pytest.raises(ValueError, match="without a selector"):
        seer.calibrate(model, [ids_of(100)], density=0.5)
