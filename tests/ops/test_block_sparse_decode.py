"""Block-sparse decoding: every implementation against a float64 definition written token by token."""

from __future__ import annotations

import pytest
import torch

from decoding import LAYOUTS, check_layout, check_rows, draw, draw_lists, pack_lists
from seerattention.ops import BlockIndices, Span, block_sparse_decode
from seerattention.ops.block_sparse_decode import IMPLEMENTATIONS

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu covers it")


# heads, KV heads, head_dim, block size, dtype
SHAPES = [
    (4, 2, 64, 64, torch.float32),
    (7, 1, 32, 16, torch.float16),
    (6, 2, 80, 64, torch.float16),
    (2, 2, 128, 32, torch.float32),
    (20, 1, 64, 128, torch.float16),
]
LENGTHS = [(1, 1), (1, 63), (1, 65), (1, 1000), (3, 130), (2, 64)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_against_the_definition(implementation, lengths, shape, nan_filled_empty, monkeypatch):
    heads, kv_heads, head_dim, block_size, dtype = shape
    queries, keys = lengths
    cut_lists(monkeypatch, 1 if keys < 100 else 3)
    rows = [draw(heads, kv_heads, queries, keys, head_dim, dtype, seed) for seed in range(2)]
    num_key_blocks = -(-keys // block_size)
    lists = [draw_lists(kv_heads, queries, keys, block_size, seed, num_key_blocks) for seed in range(2)]
    q, k, v = (torch.stack([row[i] for row in rows]) for i in range(3))
    blocks = pack_lists(lists, num_key_blocks, block_size, num_key_blocks, queries)
    out, lse = block_sparse_decode(q, k, v, blocks, return_lse=True, implementation=implementation)
    check_rows(rows, lists, block_size, list(out), list(lse))


def cut_lists(monkeypatch, parts):
    from seerattention.ops.block_sparse_decode import triton as module

    monkeypatch.setattr(module, "num_parts", lambda lists, capacity, device: min(parts, max(1, capacity)))


@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rows_of_any_layout_equal_the_row_alone(implementation, layout, parts, nan_filled_empty, monkeypatch):
    cut_lists(monkeypatch, parts)
    check_layout(implementation, layout)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_future_blocks_count_for_nothing(implementation):
    q, k, v = (x[None] for x in draw(4, 2, 1, 40, 32, torch.float32, 0))
    blocks = pack_lists([[[[0, 1, 2]], [[2]]]], 3, 16, 3, 1)
    expected = block_sparse_decode(q, k, v, blocks, implementation="reference")
    future = Span.of_rows(1, 40, start=torch.tensor([20]), length=torch.tensor([1]))
    out = block_sparse_decode(q, k, v, blocks, span=future, implementation=implementation)
    alone = pack_lists([[[[0, 1]], [[]]]], 2, 16, 3, 1)
    torch.testing.assert_close(out, block_sparse_decode(q, k[:, :, :21], v[:, :, :21], alone), rtol=1e-5, atol=1e-6)
    assert not torch.equal(out, expected)


def test_bad_arguments():
    q, k, v = (x[None] for x in draw(4, 2, 1, 40, 32, torch.float32, 0))
    blocks = pack_lists([[[[0]], [[2]]]], 3, 16, 3, 1)
    with pytest.raises(ValueError, match="do not fit 3 KV heads"):
        block_sparse_decode(q, k[:, :1].expand(-1, 3, -1, -1), v[:, :1].expand(-1, 3, -1, -1), blocks)
    with pytest.raises(ValueError, match=r"2 KV heads, 1 query tokens\] over 3 key blocks, got \[1, 2, 1\] over 4"):
        block_sparse_decode(q, k, v, BlockIndices(blocks.indices, blocks.counts, 4, 16, by_token=True))
    with pytest.raises(TypeError, match=r"v is torch\.float16"):
        block_sparse_decode(q, k, v.half(), blocks)
    with pytest.raises(NotImplementedError, match="no backward"):
        block_sparse_decode(q.requires_grad_(), k, v, blocks)
    with pytest.raises(ValueError, match="block_size must be one of"):
        block_sparse_decode(q.detach(), k, v, BlockIndices(blocks.indices, blocks.counts, 5, 8, by_token=True))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_list_is_a_set(implementation):
    """Repeats count once, whatever the order; what is no key block is refused."""
    q, k, v = (x[None] for x in draw(4, 2, 1, 40, 32, torch.float32, 0))
    once = pack_lists([[[[0, 2]], [[1]]]], 3, 16, 4, 1)
    expected = block_sparse_decode(q, k, v, once, implementation="reference")
    repeated = pack_lists([[[[2, 0, 2, 0]], [[1, 1]]]], 3, 16, 4, 1)
    out = block_sparse_decode(q, k, v, repeated, implementation=implementation)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    for wrong in ([3], [-1]):
        with pytest.raises(ValueError, match="key block"):
            block_sparse_decode(q, k, v, pack_lists([[[wrong], [[1]]]], 3, 16, 4, 1), implementation=implementation)
