"""Lists some of whose rows read everything after all."""

from __future__ import annotations

import pytest
import torch

from seerattention.blocks import BlockIndices, completed, dense_indices
from seerattention.ops import Span
from seerattention.ops.indices import is_ordered


def diagonal(batch, heads, rows):
    return torch.eye(rows, dtype=torch.bool).expand(batch, heads, rows, rows)


@pytest.mark.parametrize("known", [False, True])
def test_rows_of_a_padded_batch(known):
    """Short rows have the lists of a dense prompt, the others theirs, and both are in order if they were."""
    lengths = torch.tensor([130, 256, 0])
    lists = BlockIndices.from_mask(diagonal(3, 2, 4) & (torch.arange(4) < -(-lengths // 64)[:, None])[:, None, :, None])
    if not known:
        lists = BlockIndices(lists.indices.clone(), lists.counts.clone(), 4)
    dense = dense_indices(3, 2, 4, 4, block_size=64, lengths=lengths)
    causal = torch.arange(1, 5) * (torch.arange(4) < -(-lengths // 64)[:, None])
    found = completed(lists, torch.tensor([[True], [False], [True]]), causal, 200)
    assert is_ordered(found) == is_ordered(lists)
    assert torch.equal(found.to_mask()[[0, 2]], dense.to_mask()[[0, 2]])
    assert torch.equal(found.to_mask()[1], lists.to_mask()[1])
    assert found.indices.shape[-1] == 4  # blocks of 199 tokens


def test_tokens():
    """Of five query tokens the first two read all that they see, which lies in two blocks."""
    span = Span(1, 5, 131)
    mask = torch.zeros(1, 1, 5, 3, dtype=torch.bool)
    mask[..., 0] = True
    lists = BlockIndices.from_mask(mask, by_token=True, span=span)
    found = completed(lists, torch.tensor([[True, True, False, False, False]]), lists.last_blocks() + 1, 129)
    assert found.by_token
    assert found.span is span
    assert found.counts[0, 0].tolist() == [2, 2, 1, 1, 1]
    assert found.to_mask()[0, 0].long().tolist() == [[1, 1, 0], [1, 1, 0], [1, 0, 0], [1, 0, 0], [1, 0, 0]]


def test_room_is_not_taken_away():
    lists = BlockIndices.from_mask(diagonal(1, 1, 3))
    found = completed(lists, torch.tensor([[False]]), torch.arange(1, 4)[None], 1)
    assert found.indices.shape == lists.indices.shape
    assert torch.equal(found.to_mask(), lists.to_mask())
