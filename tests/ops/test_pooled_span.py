"""Pooled attention of rows that begin and lie anywhere: each row's targets are those of the row alone."""

from __future__ import annotations

import pytest
import torch

from layouts import LAYOUTS, check_pooled_layout
from seerattention.ops import Span, pooled_attention, pooled_attention_decode
from seerattention.ops.dispatch import triton_importable, triton_interpreted
from seerattention.ops.span import Pages

SIZES = [(70, 200), (1, 33), (64, 64), (30, 160)]
EVERY = ["reference", "cpu"]
if triton_importable() and triton_interpreted():
    EVERY.append("triton")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("reduce", ["max", "sum", "row_sum"])
@pytest.mark.parametrize("op", [pooled_attention, pooled_attention_decode])
@pytest.mark.parametrize("implementation", EVERY)
def test_any_layout(implementation, op, reduce, given, layout, nan_filled_empty):
    check_pooled_layout(op, implementation, layout, SIZES, reduce=reduce, given=given)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("reduce", ["max", "row_sum"])
@pytest.mark.skipif(not triton_interpreted(), reason="needs TRITON_INTERPRET=1")
def test_hopper(emulated_pooled_attention, reduce, layout, given):
    options = {"reduce": reduce, "block_size": 64, "head_dim": 64, "heads": 4, "kv_heads": 1, "dtype": torch.float16}
    check_pooled_layout(pooled_attention, "hopper", layout, [(70, 200), (1, 65), (64, 64)], given=given, **options)


def test_packed_pages():
    """Rows packed on both sides of a page table."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 2, 50, 16, generator=generator)
    pages = torch.randn(6, 1, 64, 16, generator=generator)
    table = torch.tensor([[4, 0], [2, 5]], dtype=torch.int32)
    columns = {"start": torch.tensor([60, 0]), "length": torch.tensor([30, 20])}
    rows = Span.of_rows(30, 90, query_slot=torch.tensor([0, 30]), pages=Pages(table, 64), **columns)
    span = Span(2, 30, 90, rows.table, True, rows.pages)
    found = pooled_attention(q, pages, span=span, block_size=32)
    first = pages[table[0].long()].transpose(0, 1).flatten(1, 2)[None, :, :90]
    torch.testing.assert_close(found[:1, :, :2], pooled_attention(q[:, :, :30], first, block_size=32)[..., :3])
    second = pages[2:3, :, :20]
    torch.testing.assert_close(found[1:, :, :1, :1], pooled_attention(q[:, :, 30:], second, block_size=32))


def test_what_does_not_fit_is_refused():
    q, k = torch.randn(2, 2, 10, 16), torch.randn(2, 1, 40, 16)
    span = Span.of_rows(10, 40, start=torch.tensor([30, 5]), length=torch.tensor([10, 5]))
    with pytest.raises(ValueError, match="lengths or a span, not both"):
        pooled_attention(q, k, span=span, lengths=torch.tensor([40, 10]))
    with pytest.raises(ValueError, match="the span has 2 rows of 10 slots, but q is"):
        pooled_attention(q[:, :, :9], k, span=span)
    with pytest.raises(ValueError, match=r"rows must lie in \[0, 2\)"):
        pooled_attention(q, k, span=span, block_size=32, rows=torch.tensor([2]))
