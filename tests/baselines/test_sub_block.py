"""SubBlock: scores of pairs of pieces, one pair at a time."""

from __future__ import annotations

import math

import pytest
import torch

import baseline_cases as cases
from seerattention import TopK, TopP
from seerattention.baselines import MeanPool, SubBlock
from seerattention.baselines.prompt import Prompt

BLOCK = 32


def brute(query_parts, key_parts, reduce):
    def pieces(x, first, size):
        """Piece number -> its mean and its positions, of tokens at positions ``first`` and on."""
        found = {}
        for t in range(first, first + len(x)):
            found.setdefault(t // size, []).append(t)
        return {a: (torch.stack([x[t - first] for t in tokens]).mean(0), tokens) for a, tokens in found.items()}

    def scores(q, k, start):
        blocks, first = -(-len(k) // BLOCK), start // BLOCK
        pairs = [[[] for _ in range(blocks)] for _ in range(first, blocks)]
        keys = pieces(k, 0, BLOCK // key_parts)
        for a, (query, times) in pieces(q, start, BLOCK // query_parts).items():
            for b, (key, places) in keys.items():
                if places[0] <= times[-1]:
                    pairs[a // query_parts - first][b // key_parts].append(float(query @ key))
        found = torch.full((blocks - first, blocks), -math.inf, dtype=torch.float64)
        for i, row in enumerate(pairs):
            for j, values in enumerate(row):
                if values and reduce == "max":
                    found[i, j] = max(values)
                elif values:
                    found[i, j] = math.log(sum(math.exp(value) for value in values))
        return found

    return scores


@pytest.mark.parametrize(("query_parts", "key_parts"), [(4, 4), (1, 1), (8, 2), (2, 16)])
@pytest.mark.parametrize("reduce", ["lse", "max"])
def test_definition(query_parts, key_parts, reduce):
    selector = SubBlock(TopK(0.4), query_parts, key_parts, reduce, block_size=BLOCK)
    cases.assert_scores(selector, brute(query_parts, key_parts, reduce))
    if query_parts == 4:
        cases.assert_every_case(selector, cases.brute_policy(brute(query_parts, key_parts, reduce), TopK(0.4)))
    cases.assert_padded_chunks(selector)
    cases.assert_rowwise(selector)


@pytest.mark.parametrize("policy", [TopP(0.7), TopK(0.4, last_blocks_dense=1)])
def test_other_policies(policy):
    selector = SubBlock(policy, 2, 4, block_size=BLOCK)
    cases.assert_every_case(selector, cases.brute_policy(brute(2, 4, "lse"), policy))
    cases.assert_rowwise(selector)


@pytest.mark.parametrize("reduce", ["lse", "max"])
def test_one_piece_is_mean_pooling(reduce):
    inputs = cases.make_inputs([300, 129])
    one = SubBlock(TopK(0.3), 1, 1, reduce).select(inputs)
    assert torch.equal(one.to_mask(), MeanPool(TopK(0.3)).select(inputs).to_mask())


@pytest.mark.parametrize(("length", "start"), [(300, 0), (300, 77), (1, 0)])
def test_single_tokens_give_the_exact_mass(length, start):
    inputs = cases.make_inputs([length], start=start)
    scores = SubBlock(query_parts=BLOCK, key_parts=BLOCK, block_size=BLOCK).score(
        Prompt(0, inputs.q[0], inputs.k[0], cases.SCALE, BLOCK)
    )

    def log_mass(q, k, start):
        first, blocks = start // BLOCK, -(-length // BLOCK)
        total = torch.zeros(blocks - first, blocks, dtype=torch.float64)
        for t in range(start, length):
            for j, tile in enumerate((k[: t + 1] @ q[t - start]).exp().split(BLOCK)):
                total[t // BLOCK - first, j] += tile.sum()
        return total.log()

    for _, h, wanted in cases.expected_of(inputs, BLOCK, log_mass):
        torch.testing.assert_close(scores[h].double(), wanted, rtol=1e-5, atol=1e-5)


def test_few_scores_at_a_time(monkeypatch):
    inputs = cases.make_inputs([300, 170])
    expected = SubBlock().select(inputs).to_mask()
    monkeypatch.setattr("seerattention.baselines.prompt.MOST_SCORES", 1)
    assert torch.equal(SubBlock().select(inputs).to_mask(), expected)


def test_names():
    cases.assert_goes_round(
        "sub_block:policy=top_p(0.9):query_parts=8:reduce=max", SubBlock(TopP(0.9), 8, reduce="max")
    )
    cases.assert_goes_round("sub_block:key_parts=8", SubBlock(key_parts=8))


@pytest.mark.parametrize("options", [{"query_parts": 3}, {"key_parts": 0}, {"reduce": "sum"}, {"block_size": 48}])
def test_bad_arguments(options):
    with pytest.raises(ValueError, match=f"SubBlock: {next(iter(options))} must"):
        SubBlock(**options)
