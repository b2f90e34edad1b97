"""FlexPrefill: probe, kind of head, budgets and lists, against loops over tokens and blocks."""

from __future__ import annotations

import math

import pytest
import torch

import baseline_cases as cases
from seerattention.baselines import FlexPrefill
from seerattention.baselines.prompt import Prompt

BLOCK = 32


def brute_probe(q, k, start):
    """Attention of the last queries by key and by offset, token by token, and the distance of the pooled guess."""
    length, count = len(k), min(BLOCK, len(q))
    vertical, by_offset = torch.zeros(length, dtype=torch.float64), torch.zeros(length, dtype=torch.float64)
    for t in range(length - count, length):
        shares = (k[: t + 1] @ q[t - start]).softmax(0)
        vertical[: t + 1] += shares / count
        by_offset[: t + 1] += shares.flip(0) / count
    means = torch.stack([block.mean(0) for block in k.split(BLOCK)])
    guess = (means @ q[-count:].mean(0)).softmax(0)
    truth = torch.stack([block.sum() for block in vertical.split(BLOCK)])
    middle = (guess + truth) / 2
    distance = math.sqrt(max(0.0, float((guess * (guess / middle).log() + truth * (truth / middle).log()).sum() / 2)))
    return vertical, by_offset, distance


def tokens_within(mass, gamma):
    total, count = 0.0, 0
    for value in sorted(mass.tolist(), reverse=True):
        total += value
        if total > gamma:
            break
        count += 1
    return count


def brute(gamma, tau, least, most=None):
    def mask(q, k, start):
        length, blocks, first = len(k), -(-len(k) // BLOCK), start // BLOCK
        rows = blocks - first
        if length <= max(2 * BLOCK, -(-least // BLOCK) * BLOCK):
            return torch.ones(rows, blocks, dtype=torch.bool)
        vertical, by_offset, distance = brute_probe(q, k, start)
        aware = distance < tau
        counts = []
        for mass in (vertical, by_offset):
            count = max(-(-least // BLOCK), (tokens_within(mass, gamma) + 1) // BLOCK + 1)
            if most is not None:
                count = min(count, -(-most // BLOCK))
            counts.append(-(-least // BLOCK) if aware else count)
        columns = {j: float(vertical[j * BLOCK : (j + 1) * BLOCK].sum()) for j in range(1, blocks)}
        # Distances are cut into blocks from the largest on, so the nearest block may be a partial one.
        slashes = {
            r: sum(float(by_offset[length - 1 - c]) for c in range((blocks - 1 - r) * BLOCK, (blocks - r) * BLOCK))
            for r in range(1, blocks)
        }
        columns = [0, *sorted(columns, key=columns.get, reverse=True)][: counts[0]]
        slashes = [0, *sorted(slashes, key=slashes.get, reverse=True)][: counts[1]]
        kept = torch.zeros(rows, blocks, dtype=torch.bool)
        for i in range(first, blocks):
            for j in range(i + 1):
                kept[i - first, j] = j in columns or i - j in slashes
        if aware:
            pool = []
            means = torch.stack([block.mean(0) for block in k.split(BLOCK)])
            for i in range(first, blocks):
                query = q[max(0, i * BLOCK - start) : (i + 1) * BLOCK - start].mean(0)
                pool += [(float(p), i, j) for j, p in enumerate((means[: i + 1] @ query).softmax(0))]
            total = 0.0
            for p, i, j in sorted(pool, reverse=True):
                total += p
                if total > gamma * rows:
                    break
                kept[i - first, j] = True
        return kept

    return mask


@pytest.mark.parametrize(
    ("gamma", "tau", "least", "most"),
    [(0.7, 0, 64, None), (0.8, 10, 64, None), (0.6, 0.3, 33, None), (0.95, 0.1, 64, 128), (0.7, 0.3, 1024, None)],
)
def test_definition(gamma, tau, least, most):
    selector = FlexPrefill(gamma, tau, least, most, block_size=BLOCK)
    cases.assert_every_case(selector, brute(gamma, tau, least, most), sharp=2.0)
    cases.assert_padded_chunks(selector)


def test_both_kinds_of_heads_are_in_the_test_above():
    distances = []
    for seed, length in enumerate([129, 300, 200]):
        inputs = cases.make_inputs([length], seed=seed, sharp=2.0)
        for _, h, (_, _, distance) in cases.expected_of(inputs, BLOCK, brute_probe):
            distances.append(distance)
            prompt = Prompt(0, inputs.q[0], inputs.k[0], cases.SCALE, BLOCK)
            for tau in (0.1, 0.3, 0.5):
                probe = FlexPrefill(tau=tau, block_size=BLOCK).probe(prompt)
                assert bool(probe.query_aware[h]) == (distance < tau)
                torch.testing.assert_close(probe.vertical.sum(-1), torch.ones(4))
                torch.testing.assert_close(probe.slash.sum(-1), torch.ones(4))
    assert min(distances) < 0.3 < max(distances)


def test_a_share_of_zero_makes_a_head_look_at_places():
    inputs = cases.make_inputs([200])
    k = inputs.k[0].clone()
    k[:, :32] = -1e4 * inputs.q[0, :1, -1:]  # no last query of head 0 sees anything of block 0
    q = inputs.q[0, :, -1:].expand(-1, 200, -1)
    probe = FlexPrefill(tau=100, block_size=BLOCK).probe(Prompt(0, q, k, cases.SCALE, BLOCK))
    assert not probe.query_aware[0]


def test_query_blocks_share_a_budget():
    """A row that knows what it wants leaves more to a row that does not."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.one_hot(torch.arange(8), 16).float()
    k = directions.repeat_interleave(BLOCK, 0) + 0.01 * torch.randn(256, 16, generator=generator)
    q = torch.zeros(256, 16)
    q[6 * BLOCK : 7 * BLOCK] = 40 * directions[2]  # one block holds nearly all of the mass of row 6
    inputs = cases.make_inputs([256], heads=1, kv_heads=1)
    options = dict(vars(inputs), q=q[None, None], k=k[None, None])
    selector = FlexPrefill(0.5, tau=100, min_budget=1, block_size=BLOCK)
    counts = selector.select(type(inputs)(**options)).counts[0, 0].tolist()
    assert counts[6] == 3  # block 0, what it wants, and the diagonal
    kept = selector.select(type(inputs)(**options)).to_mask()[0, 0]
    assert kept[6].nonzero().flatten().tolist() == [0, 2, 6]


def test_it_looks_at_the_end_of_the_prompt():
    cases.assert_rowwise(FlexPrefill(0.7, min_budget=64, block_size=BLOCK))


def test_names():
    cases.assert_goes_round("flexprefill:gamma=0.95:min_budget=512", FlexPrefill(0.95, min_budget=512))
    cases.assert_goes_round("flexprefill:max_budget=2048", FlexPrefill(max_budget=2048))


@pytest.mark.parametrize(
    "options", [{"gamma": 1.1}, {"tau": -1}, {"min_budget": 0}, {"max_budget": 64}, {"block_size": 48}]
)
def test_bad_arguments(options):
    with pytest.raises(ValueError, match=f"FlexPrefill: {next(iter(options))} must be"):
        FlexPrefill(**options)
