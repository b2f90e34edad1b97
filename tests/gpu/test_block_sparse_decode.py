"""Block-sparse decoding on a GPU: shapes, dtypes, parts, layouts, long contexts, CUDA graphs."""

from __future__ import annotations

import pytest
import torch

from decoding import LAYOUTS, check_layout, check_rows, draw, draw_lists, pack_lists
from seerattention.ops import BlockIndices, block_sparse_decode
from seerattention.ops.block_sparse_decode import triton as module

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(4, 2, 64), (7, 1, 32), (32, 8, 128), (6, 2, 80), (2, 2, 256), (20, 1, 64)], ids=str)
@pytest.mark.parametrize("block_size", [16, 64, 128])
@pytest.mark.parametrize("parts", [None, 1, 5])
def test_against_the_definition(parts, block_size, shape, dtype, monkeypatch, nan_filled_empty):
    if parts is not None:
        monkeypatch.setattr(module, "num_parts", lambda lists, capacity, device: min(parts, max(1, capacity)))
    heads, kv_heads, head_dim = shape
    for queries, keys in [(1, 1), (1, 65), (1, 1000), (3, 130)]:
        rows = [draw(heads, kv_heads, queries, keys, head_dim, dtype, seed) for seed in range(2)]
        blocks = -(-keys // block_size)
        lists = [draw_lists(kv_heads, queries, keys, block_size, seed, blocks) for seed in range(2)]
        q, k, v = (torch.stack([row[i] for row in rows]).cuda() for i in range(3))
        packed = pack_lists(lists, blocks, block_size, blocks, queries)
        packed = BlockIndices(packed.indices.cuda(), packed.counts.cuda(), blocks, block_size, by_token=True)
        out, lse = block_sparse_decode(q, k, v, packed, return_lse=True)
        check_rows(rows, lists, block_size, list(out.cpu()), list(lse.cpu()), "cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("parts", [None, 1, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_of_any_layout_equal_the_row_alone(layout, parts, block_size, dtype, monkeypatch, nan_filled_empty):
    if parts is not None:
        monkeypatch.setattr(module, "num_parts", lambda lists, capacity, device: parts)
    check_layout(None, layout, "cuda", dtype, block_size)


def test_addresses_beyond_32_bits():
    """A cache of more than 2^31 elements: the last blocks of the last row."""
    keys, block_size = 600_000, 64
    q = torch.randn(4, 8, 1, 128, device="cuda", dtype=torch.bfloat16)
    k = torch.zeros(4, 8, keys, 128, device="cuda", dtype=torch.bfloat16)
    v = torch.zeros_like(k)
    last = keys // block_size - 1
    begin = last * block_size
    k[:, :, begin:], v[:, :, begin:] = torch.randn_like(k[:, :, begin:]), torch.randn_like(v[:, :, begin:])
    indices = torch.tensor([last, last - 1], dtype=torch.int32, device="cuda").expand(4, 8, 1, 2).contiguous()
    counts = torch.full((4, 8, 1), 2, dtype=torch.int32, device="cuda")
    blocks = BlockIndices(indices, counts, -(-keys // block_size), block_size, by_token=True)
    out = block_sparse_decode(q, k, v, blocks)
    read = slice(begin - block_size, begin + block_size)
    expected = torch.nn.functional.scaled_dot_product_attention(
        q.double(), k[:, :, read].double(), v[:, :, read].double()
    )
    torch.testing.assert_close(out.double(), expected, rtol=2e-2, atol=2e-2)


def test_a_graph_replays_other_lists(nan_filled_empty):
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (
        torch.randn(2, h, t, 64, device="cuda", dtype=torch.bfloat16, generator=generator)
        for h, t in ((8, 1), (2, 2048), (2, 2048))
    )
    indices = (
        torch.stack([torch.randperm(32, device="cuda", generator=generator) for _ in range(4)]).int().view(2, 2, 1, 32)
    )
    counts = torch.full((2, 2, 1), 32, dtype=torch.int32, device="cuda")
    blocks = BlockIndices(indices, counts, 32, 64, by_token=True)
    block_sparse_decode(q, k, v, blocks)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = block_sparse_decode(q, k, v, blocks)
    for count in (1, 7, 0, 32):
        counts.fill_(count)
        q.normal_()
        graph.replay()
        assert torch.equal(out, block_sparse_decode(q, k, v, blocks))
        if count == 0:
            assert not out.any()
