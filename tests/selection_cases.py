"""Selections in plain Python lists, and scores that are hard to select from."""

from __future__ import annotations

import math

import pytest
import torch

from seerattention.ops.block_selection.reference import PROBABILITY_UNITS
from seerattention.ops.dispatch import triton_importable, triton_interpreted

needs_interpreter = pytest.mark.skipif(
    not (triton_importable() and triton_interpreted()), reason="needs triton and TRITON_INTERPRET=1"
)
UNITS = PROBABILITY_UNITS


def make_scores(num_rows, num_keys, batch=2, heads=2, seed=0, special=True):
    """Random scores with many ties and, where asked, NaN, infinities and both zeros."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(batch, heads, num_rows, num_keys, generator=generator)
    scores[..., ::3] = scores[..., ::3].round()
    if special:
        scores[0, 0] = 0.0
        scores[0, 0, :, ::2] = -0.0
        scores[0, -1, num_rows // 2] = float("nan")
        scores[-1, 0, :, 0] = float("-inf")
        scores[-1, -1, :, 1::4] = float("inf")
        scores[-1, -1, -1, ::2] = float("nan")
    return scores


def lists(blocks):
    """The lists as nested Python lists, with a check that they are ascending."""
    out = [
        [[row[:count].tolist() for row, count in zip(*rows, strict=True)] for rows in zip(*heads, strict=True)]
        for heads in zip(blocks.indices, blocks.counts, strict=True)
    ]
    for row in (row for batch in out for head in batch for row in head):
        assert row == sorted(set(row))
    return out


def expected_lists(scores, choose, *, block_size=64, lengths=None, last_blocks_dense=0):
    """``choose(values, query, row)`` gives the wanted blocks out of the causal values of one row."""
    batch, heads, num_rows, num_keys = scores.shape
    out = []
    for b in range(batch):
        end = num_keys if lengths is None else math.ceil(int(lengths[b]) / block_size)
        out.append([])
        for h in range(heads):
            out[-1].append([])
            for row in range(num_rows):
                query = num_keys - num_rows + row
                values = [float("-inf") if math.isnan(x) else x for x in scores[b, h, row, : query + 1].tolist()]
                wanted = set(choose(values, query, row)) | {query}
                if query >= end - last_blocks_dense:
                    wanted = set(range(query + 1))
                out[-1][-1].append(sorted(wanted) if query < end else [])
    return out


def best(values, blocks, count):
    return sorted(blocks, key=lambda block: (-values[block], block))[:count]


def topk_lists(scores, keep, diagonal_extra, **common):
    def choose(values, query, row):
        if diagonal_extra:
            return best(values, range(query + 1), keep[row])
        return best(values, range(query), keep[row] - 1)

    return expected_lists(scores, choose, **common)


def topp_lists(probabilities, p, **common):
    def choose(values, query, row):
        units = [int(min(max(x, 0.0), 1.0) * UNITS) if x == x else 0 for x in values]
        taken, mass = [], units[query]
        for block in best([min(max(x, 0.0), 1.0) for x in values], range(query), query):
            if p < 1 and mass >= int(p * UNITS):
                break
            taken.append(block)
            mass += units[block]
        return taken

    return expected_lists(probabilities, choose, **common)


def assert_identical(actual, expected):
    assert actual.indices.shape == expected.indices.shape
    assert torch.equal(actual.counts, expected.counts)
    assert lists(actual) == lists(expected)
