"""Streaming keeps the first and the latest blocks."""

from __future__ import annotations

import pytest
import torch

import baseline_cases as cases
from seerattention.baselines import Streaming


def brute(sink, window, dense, block):
    """Row i reads block j if j is one of the first, or one of the latest, or i is one of the last rows."""

    def mask(q, k, start):
        blocks, first = -(-len(k) // block), start // block
        kept = torch.zeros(blocks - first, blocks, dtype=torch.bool)
        for i in range(first, blocks):
            for j in range(i + 1):
                kept[i - first, j] = j < -(-sink // block) or i - j < -(-window // block) or i >= blocks - dense
        return kept

    return mask


@pytest.mark.parametrize(
    ("sink", "window", "dense", "block"), [(64, 128, 0, 32), (1, 33, 0, 32), (0, 0, 0, 32), (100, 64, 2, 64)]
)
def test_definition(sink, window, dense, block):
    selector = Streaming(sink, window, last_blocks_dense=dense, block_size=block)
    cases.assert_every_case(selector, brute(sink, window, dense, block))
    cases.assert_padded_chunks(selector)
    cases.assert_rowwise(selector)


def test_density_of_a_long_prompt():
    lists = Streaming(sink=64, window=256).select(cases.make_inputs([64 * 40], dim=4))
    assert lists.counts[0, 0].tolist() == [1, 2, 3, 4] + [5] * 36


def test_names():
    cases.assert_goes_round("streaming:sink=128:window=512:block_size=32", Streaming(128, 512, block_size=32))


@pytest.mark.parametrize("options", [{"sink": -1}, {"window": 0.5}, {"block_size": 48}, {"last_blocks_dense": True}])
def test_bad_arguments(options):
    with pytest.raises(ValueError, match=f"Streaming: {next(iter(options))} must be"):
        Streaming(**options)
