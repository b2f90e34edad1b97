"""RBS: two branches, block after block."""

from __future__ import annotations

import math

import pytest
import torch

import baseline_cases as cases
from seerattention import TopK, TopP
from seerattention.baselines import RBS, FlashPrefill, parse_selectors
from seerattention.baselines.prompt import Prompt

BLOCK = 32


def quantile(values, share):
    """Of a list, between the two neighbours."""
    ordered, place = sorted(values), share * (len(values) - 1)
    low = math.floor(place)
    high = min(low + 1, len(values) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def brute_energies(q, k, start):
    """Base and rescue, ``[2, R, N]``."""
    parts, first = k.split(BLOCK), start // BLOCK
    radius = [max(math.dist(key, part.mean(0)) for key in part.tolist()) for part in parts]
    middle, wide = quantile(radius, 0.5), quantile(radius, 0.9)
    energies = torch.zeros(2, len(parts) - first, len(parts), dtype=torch.float64)
    for j, part in enumerate(parts):
        f = 0.0 if radius[j] <= middle else min(1.0, (radius[j] - middle) / (wide - middle))
        seeing = torch.arange(max(start, j * BLOCK + len(part) - 1), len(k))
        logit, length = q[seeing - start] @ part.mean(0), q[seeing - start].norm(dim=-1)
        for branch, more in enumerate((0.0, radius[j] * f)):
            energies[branch, :, j].index_add_(0, seeing // BLOCK - first, (logit + more * length).exp())
    return energies


def brute(alpha, sink, window, dense):
    def mask(q, k, start):
        energies, first = brute_energies(q, k, start), start // BLOCK
        kept = (energies >= alpha * energies.max(-1, keepdim=True).values).any(0)
        blocks = kept.shape[1]
        for i in range(first, blocks):
            kept[i - first, :sink] = True
            kept[i - first, max(0, i - window + 1) :] = True
            if i >= blocks - dense:
                kept[i - first] = True
        return kept

    return mask


def brute_score(q, k, start):
    energies = brute_energies(q, k, start)
    return (energies / energies.amax(-1, keepdim=True)).amax(0).log()


@pytest.mark.parametrize(
    ("alpha", "sink", "window", "dense"), [(0.18, 2, 4, 0), (0.5, 0, 0, 0), (0.9, 1, 2, 2), (1, 0, 1, 0)]
)
def test_definition(alpha, sink, window, dense):
    selector = RBS(alpha, sink, window, dense, block_size=BLOCK)
    cases.assert_every_case(selector, brute(alpha, sink, window, dense), sharp=6.0)
    cases.assert_padded_chunks(selector)


@pytest.mark.parametrize("policy", [TopK(0.4), TopP(0.8)])
def test_scores_and_policies(policy):
    selector = RBS(policy=policy, block_size=BLOCK)
    cases.assert_scores(selector, brute_score, sharp=3.0)
    cases.assert_every_case(selector, cases.brute_policy(brute_score, policy), sharp=3.0)
    assert not selector.rowwise


def test_whether_it_looks_at_the_whole_prompt():
    cases.assert_rowwise(RBS(0.9, 0, 0, block_size=BLOCK))


def rescued(keys):
    """What a row of queries keeps of ten blocks of keys by the one method and by the other."""
    q = torch.zeros(1, BLOCK, 16)
    q[..., 0] = 1.0
    prompt = Prompt(0, q, keys[None], 1.0, BLOCK)
    return [
        cls(0.5, 0, 0, block_size=BLOCK).keep(prompt)[0, 0].nonzero().flatten().tolist() for cls in (FlashPrefill, RBS)
    ]


def test_a_strong_key_among_weak_ones_is_found():
    """Its block has the least mean of all, and the largest radius. One query sees all of the last block: too few."""
    keys = torch.zeros(320, 16)
    keys[:, 0] = 1.0
    keys[96:128, 0] = -2.0
    keys[100, 0] = 8.0
    plain, rescue = rescued(keys)
    assert plain == [0, 1, 2, 4, 5, 6, 7, 8]
    assert rescue == list(range(9))


def test_blocks_of_equal_keys_are_flashprefill():
    """No radius is above another: nothing is divided by nothing."""
    keys = torch.arange(10.0).mul(0.3).repeat_interleave(BLOCK)[:, None].repeat(1, 16)
    plain, rescue = rescued(keys)
    assert plain == rescue
    assert 1 < len(plain) < 10


@pytest.mark.parametrize("bad", ["alpha=-0.1", "alpha=1.5", "sink_blocks=-1", "window_blocks=1.5"])
def test_arguments(bad):
    with pytest.raises(ValueError, match=f"RBS: {bad.split('=')[0]} must be"):
        parse_selectors(f"rbs:{bad}")
    cases.assert_goes_round("rbs:alpha=0.1:sink_blocks=1", RBS(0.1, 1))
