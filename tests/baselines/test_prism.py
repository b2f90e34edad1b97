"""Prism: bands of channels, and the blocks of each row one after the other."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

import baseline_cases as cases
from seerattention import TopK, TopP
from seerattention.baselines import Prism, parse_selectors
from seerattention.baselines.prism import bands
from seerattention.baselines.prompt import Prompt

BLOCK = 32
BANDS = [[0, 1, 2, 3, 8, 9, 10, 11], [2, 3, 4, 5, 6, 7, 10, 11, 12, 13, 14, 15]]  # of heads of 16 channels


def rms(x):
    return math.sqrt(sum(value**2 for value in x.flatten().tolist()) / x.numel())


def brute_shares(q, k, start):
    """Softmax of both bands, ``[2, R, N]``; q is scaled."""
    first, dim = start // BLOCK, k.shape[1]
    pooled_k = torch.stack([part.mean(0) for part in k.split(BLOCK)])
    ends = [start, *range((first + 1) * BLOCK, len(k), BLOCK), len(k)]
    pooled_q = torch.stack([q[a - start : b - start].mean(0) for a, b in pairwise(ends)])
    shares = torch.zeros(2, len(pooled_q), len(pooled_k), dtype=torch.float64)
    for found, band in zip(shares, BANDS, strict=True):
        here_q, here_k = pooled_q[:, band], pooled_k[:, band]
        temperature = math.sqrt(len(band) / dim) * rms(here_q) / rms(pooled_q) * rms(here_k) / rms(pooled_k)
        for row, query in enumerate(here_q):
            # The scale of a head is in q already, that of a band is meant.
            logits = here_k[: first + row + 1] @ query * math.sqrt(dim) / math.sqrt(len(band)) / temperature
            found[row, : first + row + 1] = logits.softmax(-1)
    return shares


def brute(p):
    def mask(q, k, start):
        shares = brute_shares(q, k, start)
        kept = torch.zeros(shares.shape[1:], dtype=torch.bool)
        kept[:, 0] = True
        for band in shares.tolist():
            for row, values in enumerate(band):
                have = 0.0
                for j in sorted(range(start // BLOCK + row + 1), key=lambda j: (-values[j], j)):
                    if have < p:
                        kept[row, j] = True
                    have += values[j]
        return kept

    return mask


def brute_score(q, k, start):
    return brute_shares(q, k, start).amax(0).log()


@pytest.mark.parametrize(("p", "policy"), [(0.95, TopK(0.4)), (0.6, TopP(0.8)), (0.0, TopK(0.2, last_blocks_dense=1))])
def test_definition(p, policy):
    """Its rule, its scores, and what a policy makes of these."""
    cases.assert_every_case(Prism(p, block_size=BLOCK), brute(p), sharp=30.0)
    cases.assert_padded_chunks(Prism(p, block_size=BLOCK))
    chosen = Prism(policy=policy, block_size=BLOCK)
    cases.assert_scores(chosen, brute_score, sharp=4.0)
    cases.assert_every_case(chosen, cases.brute_policy(brute_score, policy), sharp=4.0)
    assert not chosen.rowwise


def test_whether_it_looks_at_the_whole_prompt():
    cases.assert_rowwise(Prism(0.6, block_size=BLOCK), sharp=10.0)


def test_bands_of_other_heads():
    """The published ones are of 128 channels."""
    fast, slow = bands(128, torch.device("cpu"))
    assert fast.tolist() == [*range(32), *range(64, 96)]
    assert slow.tolist() == [*range(16, 64), *range(80, 128)]
    assert [band.tolist() for band in bands(16, torch.device("cpu"))] == BANDS
    assert [len(band) for band in bands(80, torch.device("cpu"))] == [40, 60]


def test_a_weak_band_is_heard():
    """All channels together tell the fourth block from others by 0.0004."""
    k = torch.zeros(1, 320, 16)
    k[..., 7], k[:, 96:128, 0] = 1.0, 0.02
    q = torch.zeros(1, 32, 16)
    q[..., 7], q[..., 0] = 1.0, 0.02
    prompt = Prompt(0, q, k, 1.0, BLOCK)
    fast, slow = Prism(block_size=BLOCK).log_shares(prompt)[:, 0, 0].exp()
    assert fast[3] > 0.7
    assert slow.max() < 0.11
    assert Prism(0.05, block_size=BLOCK).keep(prompt)[0, 0].nonzero().flatten().tolist() == [0, 3]


def test_nothing_is_divided_by_nothing():
    """Queries of zeros, and a band without anything."""
    k = torch.ones(1, 96, 16)
    k[..., BANDS[0]] = 0.0
    score = Prism(block_size=BLOCK).score(Prompt(0, torch.zeros(1, 96, 16), k, 1.0, BLOCK))
    torch.testing.assert_close(score[0, 2].exp(), torch.full((3,), 1 / 3))


@pytest.mark.parametrize("bad", ["p=1.5", "p=-1", "p=true", "block_size=48"])
def test_arguments(bad):
    with pytest.raises(ValueError, match=f"Prism: {bad.split('=')[0]} must be"):
        parse_selectors(f"prism:{bad}")
    cases.assert_goes_round("prism:p=0.9:policy=top_k(0.1)", Prism(0.9, TopK(0.1)))
