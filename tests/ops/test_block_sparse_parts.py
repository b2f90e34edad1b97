"""Lists in parts: what several programs make of one list, put together, is what one program makes of it."""

from __future__ import annotations

import importlib

import pytest
import torch

from helpers import (
    check_attention,
    make_blocks,
    make_qkv,
    split_lists,
)
from seerattention.ops import dispatch
from seerattention.ops.block_sparse_attention import block_sparse_attention
from seerattention.ops.span import Span

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu covers it")
parts = importlib.import_module("seerattention.ops.block_sparse_attention.triton_parts")


def run_and_check(q, k, v, blocks):
    out = check_attention("triton", q, k, v, blocks)
    assert out.stride() == q.stride()
    assert torch.equal(block_sparse_attention(q, k, v, blocks, implementation="triton"), out)


# parts, (Tq, Tk), heads, KV heads, head_dim, block size, dtype, kind
CASES = [
    (2, (1, 1), 2, 2, 64, 64, torch.float32, "all"),
    (3, (1, 65), 4, 1, 64, 64, torch.float16, "random"),
    (3, (1, 65), 2, 2, 32, 64, torch.float32, "empty_rows"),
    (5, (37, 200), 4, 2, 80, 64, torch.float16, "shared"),
    (2, (37, 200), 4, 2, 128, 64, torch.float16, "empty_rows"),
    (2, (37, 200), 7, 1, 32, 32, torch.float32, "random"),
    (7, (64, 300), 2, 1, 128, 32, torch.float16, "all"),
    (3, (64, 300), 2, 1, 64, 64, torch.float32, "single"),
    (3, (130, 333), 2, 2, 64, 128, torch.float16, "random"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_in_parts(case, monkeypatch, nan_filled_empty):
    number, lengths, heads, kv_heads, head_dim, block_size, dtype, kind = case
    split_lists(monkeypatch, number)
    q, k, v = make_qkv(*lengths, batch=2, heads=heads, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype)
    run_and_check(q, k, v, make_blocks(kind, q, k, block_size))


def test_large_logits(monkeypatch):
    """Parts whose scores differ by thousands: the smaller ones count for nothing, and nothing overflows."""
    q, k, v = make_qkv(64, 300)
    blocks = make_blocks("all", q, k)
    k[..., :64, :] *= 300
    whole = block_sparse_attention(q, k, v, blocks, return_lse=True, implementation="triton")
    split_lists(monkeypatch, 4)
    for a, b in zip(
        block_sparse_attention(q, k, v, blocks, return_lse=True, implementation="triton"), whole, strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("programs", "capacity", "expected"),
    [
        (32, 205, 4),  # one query block of 32 heads on 132 multiprocessors
        (64, 205, 2),
        (32, 24, 3),  # never fewer entries a part than pay
        (32, 7, 1),
        (4, 2048, 32),  # never more parts than merging takes in its stride
        (128, 205, 1),  # 256 queries of 32 heads
        (4096, 205, 1),
    ],
)
def test_number_of_parts(programs, capacity, expected, monkeypatch):
    monkeypatch.setattr(dispatch, "multiprocessors", lambda device: 132)
    assert parts.num_parts(programs, capacity, torch.device("cuda"), 1) == expected


def test_a_full_grid_writes_the_results_themselves():
    out, lse = torch.empty(1, 2, 3, 4), torch.empty(1, 2, 3)
    span = Span(1, 3, 3)
    assert parts.result_buffers(out, lse, 1, span) == (out, lse)
    assert parts.result_buffers(out, None, 1, span) == (out, None)
