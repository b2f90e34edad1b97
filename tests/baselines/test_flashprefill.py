"""FlashPrefill: energies summed query by query, and the blocks near the largest."""

from __future__ import annotations

import pytest
import torch

import baseline_cases as cases
from seerattention import TopK, TopP
from seerattention.baselines import FlashPrefill

BLOCK = 32


def brute_energy(q, k, start):
    """Sums over queries that see a whole block, one query at a time."""
    length, blocks, first = len(k), -(-len(k) // BLOCK), start // BLOCK
    energy = torch.zeros(blocks - first, blocks, dtype=torch.float64)
    mean = torch.stack([block.mean(0) for block in k.split(BLOCK)])
    last = torch.tensor([min((j + 1) * BLOCK, length) - 1 for j in range(blocks)])
    for t in range(start, length):
        energy[t // BLOCK - first] += (mean @ q[t - start]).exp() * (t >= last)
    return energy


def brute(alpha, sink, window, dense):
    def mask(q, k, start):
        energy, first = brute_energy(q, k, start), start // BLOCK
        kept = energy >= alpha * energy.max(-1, keepdim=True).values
        blocks = energy.shape[1]
        for i in range(first, blocks):
            for j in range(i + 1):
                kept[i - first, j] |= j < sink or i - j < window or i >= blocks - dense
        return kept

    return mask


@pytest.mark.parametrize(
    ("alpha", "sink", "window", "dense"), [(0.18, 2, 4, 0), (0.5, 0, 0, 0), (0.9, 1, 2, 2), (0, 0, 0, 0), (1, 0, 1, 0)]
)
def test_definition(alpha, sink, window, dense):
    selector = FlashPrefill(alpha, sink, window, dense, block_size=BLOCK)
    cases.assert_every_case(selector, brute(alpha, sink, window, dense))
    cases.assert_padded_chunks(selector)
    cases.assert_rowwise(selector)


@pytest.mark.parametrize("sharp", [1.0, 3.0])
def test_energy(sharp):
    cases.assert_scores(FlashPrefill(block_size=BLOCK), lambda *a: brute_energy(*a).log(), sharp=sharp)


@pytest.mark.parametrize("policy", [TopK(0.4), TopP(0.8), TopK(0.4, last_blocks_dense=1)])
def test_policies(policy):
    selector = FlashPrefill(policy=policy, block_size=BLOCK)
    cases.assert_every_case(selector, cases.brute_policy(lambda *a: brute_energy(*a).log(), policy))
    cases.assert_rowwise(selector)


def test_large_logits_do_not_overflow():
    selector = FlashPrefill(0.5, 0, 0, block_size=BLOCK)
    density = selector.select(cases.make_inputs([300], sharp=1000.0)).density()
    assert 0 < density < 0.9


def test_few_scores_at_a_time(monkeypatch):
    inputs = cases.make_inputs([300, 170])
    selector = FlashPrefill(0.5, 0, 0, block_size=BLOCK)
    expected = selector.select(inputs).to_mask()
    monkeypatch.setattr("seerattention.baselines.prompt.MOST_SCORES", 1)
    assert torch.equal(selector.select(inputs).to_mask(), expected)


def test_names():
    text = "flashprefill:alpha=0.08:last_blocks_dense=2:block_size=128"
    cases.assert_goes_round(text, FlashPrefill(0.08, last_blocks_dense=2, block_size=128))
    cases.assert_goes_round("flashprefill:policy=top_k(0.1)", FlashPrefill(policy=TopK(0.1)))


@pytest.mark.parametrize("options", [{"alpha": 1.1}, {"sink_blocks": -1}, {"window_blocks": 1.5}, {"block_size": 48}])
def test_bad_arguments(options):
    with pytest.raises(ValueError, match=f"FlashPrefill: {next(iter(options))} must be"):
        FlashPrefill(**options)
