"""MInference in tiles: chosen columns and diagonals, and every tile with a token pair of one of them."""

from __future__ import annotations

import math

import pytest
import torch

import baseline_cases as cases
from seerattention.baselines import MInference, minference
from seerattention.baselines.prompt import Prompt


def brute_patterns(vertical, slash, last):
    """Chosen keys and distances, by sums along explicit columns and diagonals."""

    def patterns(q, k, start):
        length, count = len(k), min(last, len(q))
        attention = torch.zeros(count, length, dtype=torch.float64)
        for row, t in enumerate(range(length - count, length)):
            attention[row, : t + 1] = (k[: t + 1] @ q[t - start]).softmax(0)
        columns = [float(attention[:, c].sum()) for c in range(length)]
        columns = [math.inf] * min(length, minference.FIRST_KEYS) + columns[minference.FIRST_KEYS :]
        diagonals = []
        for distance in range(length - count + 1):
            total = float(sum(attention[row, length - count + row - distance] for row in range(count)))
            diagonals.append(math.inf if distance < minference.NEAREST_DIAGONALS else total)
        keys = sorted(range(length), key=lambda c: (-columns[c], c))[: max(vertical, minference.LEAST_VERTICAL)]
        nearest = sorted(range(len(diagonals)), key=lambda d: (-diagonals[d], d))
        return set(keys), set(nearest[: max(slash, minference.LEAST_SLASH)])

    return patterns


def brute(vertical, slash, last, block):
    def mask(q, k, start):
        keys, distances = brute_patterns(vertical, slash, last)(q, k, start)
        first, blocks = start // block, -(-len(k) // block)
        kept = torch.zeros(blocks - first, blocks, dtype=torch.bool)
        for i in range(first, blocks):
            end = (i + 1) * block
            for d in distances:  # the keys that the whole query block needs of a diagonal
                for c in {end - d - block, end - d - 1}:
                    if 0 <= c < len(k):
                        kept[i - first, c // block] = True
                if end - d > 0:
                    kept[i - first, max(0, end - d - block) // block] = True
            for c in keys:
                kept[i - first, c // block] = True
        return kept

    return mask


@pytest.fixture
def few(monkeypatch):
    """Smaller numbers in any case, so that little is chosen of short prompts."""
    for name, value in {"LEAST_VERTICAL": 1, "LEAST_SLASH": 1, "FIRST_KEYS": 2, "NEAREST_DIAGONALS": 3}.items():
        monkeypatch.setattr(minference, name, value)


@pytest.mark.parametrize(("vertical", "slash", "last", "block"), [(4, 6, 64, 32), (0, 9, 20, 32), (3, 5, 7, 64)])
def test_definition(few, vertical, slash, last, block):
    selector = MInference(vertical, slash, last_queries=last, block_size=block)
    cases.assert_every_case(selector, brute(vertical, slash, last, block), sharp=2.0)
    cases.assert_padded_chunks(selector)


def test_definition_with_the_published_minimum():
    selector = MInference(10, 20, block_size=32)
    cases.assert_every_case(selector, brute(10, 20, 64, 32))
    assert MInference().select(cases.make_inputs([1000])).density() == 1.0  # all of a short prompt


@pytest.mark.parametrize(("length", "start"), [(300, 0), (300, 77), (65, 0), (200, 190), (1, 0)])
def test_patterns(few, length, start):
    inputs = cases.make_inputs([length], start=start, sharp=2.0)
    keys, distances = MInference(8, 12).patterns(Prompt(0, inputs.q[0], inputs.k[0], cases.SCALE, 64))
    for _, h, (wanted_keys, wanted_distances) in cases.expected_of(inputs, 64, brute_patterns(8, 12, 64)):
        assert set(keys[h].nonzero().flatten().tolist()) == wanted_keys
        assert set(distances[h].nonzero().flatten().tolist()) == wanted_distances


def test_tiles_hold_every_pair_of_the_exact_form(few):
    """Each pair of tokens that a chosen key or distance means lies in a tile that is read, and no tile is without."""
    inputs = cases.make_inputs([320], sharp=2.0)
    selector = MInference(2, 4, block_size=32)
    keys, distances = selector.patterns(Prompt(0, inputs.q[0], inputs.k[0], cases.SCALE, 32))
    t, c = torch.arange(320)[:, None], torch.arange(320)
    exact = (keys[:, None] | distances[:, (t - c).clamp(min=0)]) & (c <= t)
    tiles = exact.unflatten(1, (10, 32)).unflatten(3, (10, 32)).any(4).any(2)
    assert torch.equal(selector.select(inputs).to_mask()[0], tiles)


def test_multiplier(few):
    inputs = cases.make_inputs([300])
    a, b = MInference(10, 20, 0.5).select(inputs), MInference(5, 10).select(inputs)
    assert torch.equal(a.to_mask(), b.to_mask())


def test_it_looks_at_the_end_of_the_prompt(few):
    cases.assert_rowwise(MInference(2, 4, block_size=32))


def test_names():
    cases.assert_goes_round("minference:vertical=100:slash=800:multiplier=0.5", MInference(100, 800, 0.5))


@pytest.mark.parametrize("options", [{"vertical": -1}, {"slash": 0.5}, {"last_queries": 0}, {"multiplier": -1}])
def test_bad_arguments(options):
    with pytest.raises(ValueError, match=f"MInference: {next(iter(options))} must be"):
        MInference(**options)
