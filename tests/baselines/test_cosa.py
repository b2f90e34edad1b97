"""CoSA: tiles, their maxima and the order of blocks, one after the other."""

from __future__ import annotations

import math

import pytest
import torch

import baseline_cases as cases
from seerattention import TopK, TopP
from seerattention.baselines import CoSA, XAttention, parse_selectors
from seerattention.baselines.prompt import Prompt


def brute_maxima(stride, block):
    """Mass of each pair of blocks, and whether a row of tiles has its best one there; both ``[R, N]``."""

    def maxima(q, k, start):
        length, dim = k.shape
        blocks, first, tiles = -(-length // block), start // block, block // stride
        query, key = (torch.zeros(blocks * block, dim, dtype=torch.float64) for _ in range(2))
        query[start:length], key[:length] = q, k
        mass = torch.zeros(blocks - first, blocks, dtype=torch.float64)
        best = torch.zeros(blocks - first, blocks, dtype=torch.bool)
        for a in range(start // stride, -(-length // stride)):
            backwards = query[a * stride : (a + 1) * stride].flip(0).flatten()
            z = key[: (a + 1) * stride].view(a + 1, -1) @ backwards / stride
            for j in range(a // tiles + 1):
                e = math.exp(float(z[j * tiles : (j + 1) * tiles].max() - z.max()))
                mass[a // tiles - first, j] += e
                best[a // tiles - first, j] |= e >= 0.999
        return mass, best

    return maxima


def brute_rule(stride, tau, block):
    def mask(q, k, start):
        mass, best = brute_maxima(stride, block)(q, k, start)
        kept = torch.zeros_like(best)
        for row, own in enumerate(range(start // block, mass.shape[1])):
            place = {j: 0 if j in (0, own) else 1 if best[row, j] else 2 for j in range(own + 1)}
            total, have = float(mass[row].sum()), 0.0
            for j in sorted(place, key=lambda j: (place[j], -float(mass[row, j]), j)):
                kept[row, j] = place[j] == 0 or have < tau * total
                have += float(mass[row, j])
        return kept

    return mask


CASES = [(8, 0.8, 64, TopK(0.4)), (16, 0.5, 32, TopP(0.8, last_blocks_dense=1)), (4, 0.3, 32, TopP(0.6))]


@pytest.mark.parametrize(("stride", "tau", "block", "policy"), CASES)
def test_definition(stride, tau, block, policy):
    """Its rule, its scores, and what a policy makes of these."""
    selector = CoSA(stride, tau, block_size=block)
    cases.assert_definition(selector, brute_rule(stride, tau, block), sharp=2.0)

    def score(q, k, start):
        return brute_maxima(stride, block)(q, k, start)[0].log()

    cases.assert_scores(selector, score, sharp=2.0)
    cases.assert_definition(CoSA(stride, policy=policy, block_size=block), cases.brute_policy(score, policy))


def test_a_block_with_the_best_tile_of_a_row_comes_before_one_of_more_mass():
    """Of four blocks: the second is nearly as good as the last in three rows of tiles, the third is the best of one."""
    q, k = torch.zeros(1, 32, 16), torch.zeros(1, 128, 16)
    q[0, :, 0], k[0, :, 0] = 1.0, -4.0
    k[0, 32:64, 0], k[0, 96:, 0] = 0.98, 1.0
    q[0, :8, 1], k[0, 64:72, 1] = 1.0, 8.0
    prompt = Prompt(0, q, k, 1.0, 32)
    score, best = CoSA(block_size=32).maxima(prompt)
    assert best[0, 0].tolist() == [False, False, True, True]
    assert score[0, 0, 1] > score[0, 0, 2] + 1
    assert CoSA(tau=0.5, block_size=32).keep(prompt)[0, 0].tolist() == [True, False, True, True]
    assert XAttention(tau=0.5, block_size=32).keep(prompt)[0, 0].tolist() == [True, True, False, True]


def test_ends_and_chunks(monkeypatch):
    inputs = cases.make_inputs([300])
    assert CoSA(tau=1, block_size=32).select(inputs).density() == 1.0
    assert CoSA(tau=0, block_size=32).select(inputs).counts[0, 0].tolist() == [1] + [2] * 9
    cases.assert_few_at_a_time(monkeypatch, CoSA(tau=0.6))


@pytest.mark.parametrize("bad", ["stride=0", "stride=24", "tau=1.1", "tau=true", "block_size=4"])
def test_arguments(bad):
    with pytest.raises(ValueError, match=f"CoSA: .*{bad.split('=')[0]}"):
        parse_selectors(f"cosa:{bad}")
    cases.assert_goes_round("cosa:stride=16:policy=top_k(0.1)", CoSA(16, policy=TopK(0.1)))
