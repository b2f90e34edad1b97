"""MeanPool: logits are products of means, and the policy chooses from them."""

from __future__ import annotations

import pytest
import torch

import baseline_cases as cases
from seerattention import Threshold, TopK, TopP
from seerattention.baselines import MeanPool

BLOCK = 32


def brute(pooled):
    def scores(q, k, start):
        blocks, first = -(-len(k) // BLOCK), start // BLOCK
        found = torch.empty(blocks - first, blocks, dtype=torch.float64)
        for i in range(first, blocks):
            tokens = [t for t in range(i * BLOCK, (i + 1) * BLOCK) if start <= t < len(k)]
            queries = torch.stack([q[t - start] for t in tokens])
            for j in range(blocks):
                mean = sum(k[j * BLOCK : (j + 1) * BLOCK]) / len(k[j * BLOCK : (j + 1) * BLOCK])
                found[i - first, j] = queries.mean(0) @ mean if pooled else max(query @ mean for query in queries)
        return found

    return scores


@pytest.mark.parametrize("pooled", [True, False])
def test_definition(pooled):
    selector = MeanPool(TopK(0.4), pool_queries=pooled, block_size=BLOCK)
    cases.assert_scores(selector, brute(pooled))
    cases.assert_every_case(selector, cases.brute_policy(brute(pooled), TopK(0.4)))
    cases.assert_padded_chunks(selector)
    cases.assert_rowwise(selector)


@pytest.mark.parametrize("policy", [Threshold(0.1), TopP(0.6), TopK(0.4, last_blocks_dense=2)])
def test_other_policies(policy):
    selector = MeanPool(policy, block_size=BLOCK)
    cases.assert_every_case(selector, cases.brute_policy(brute(True), policy))
    cases.assert_rowwise(selector)


def test_few_scores_at_a_time(monkeypatch):
    inputs = cases.make_inputs([300])
    selector = MeanPool(pool_queries=False, block_size=BLOCK)
    expected = selector.select(inputs).to_mask()
    monkeypatch.setattr("seerattention.baselines.prompt.MOST_SCORES", 1)
    assert torch.equal(selector.select(inputs).to_mask(), expected)


def test_names():
    cases.assert_goes_round("mean_pool:policy=top_p(0.9):pool_queries=false", MeanPool(TopP(0.9), pool_queries=False))
    cases.assert_goes_round("mean_pool", MeanPool(TopK(0.1)))


def test_bad_arguments():
    with pytest.raises(TypeError, match="MeanPool: policy must be a policy"):
        MeanPool(0.1)
    with pytest.raises(TypeError, match="pool_queries must be True or False"):
        MeanPool(pool_queries=1)
    with pytest.raises(ValueError, match="MeanPool: block_size must be one of"):
        MeanPool(block_size=16)
