"""Span: rows of a padded, packed, paged or chunked batch have the blocks that they have alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from seerattention.ops.span import Pages, Span, cumulative, num_blocks

ROWS = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 30)), min_size=1, max_size=4)  # (start, length)


def spans_of(rows: list[tuple[int, int]], pads: list[int]) -> Span:
    start, length = torch.tensor(rows).T
    pad = torch.tensor(pads)
    queries = int((pad + length).max())
    keys = int((pad + start + length).max())
    return Span.of_rows(queries, max(keys, queries), start=start, length=length, query_slot=pad, key_slot=pad)


@given(rows=ROWS, data=st.data(), block_size=st.sampled_from([4, 8, 16]))
def test_every_row_has_the_blocks_that_it_has_alone(rows, data, block_size):
    pads = data.draw(st.lists(st.integers(0, 9), min_size=len(rows), max_size=len(rows)))
    span = spans_of(rows, pads)
    blocks, valid, causal = span.row_blocks(block_size), span.valid_rows(block_size), span.causal_blocks(block_size)
    for row, (start, length) in enumerate(rows):
        alone = Span(1, length, start + length)
        expected = set(range(start // block_size, num_blocks(start + length, block_size)))
        assert set(alone.row_blocks(block_size)[0].tolist()) == expected
        assert set(blocks[row][valid[row]].tolist()) == expected
        for place, block in enumerate(blocks[row].tolist()):
            visible = set(causal[row, place].nonzero().flatten().tolist())
            assert visible == (set(range(block + 1)) if valid[row, place] else set())


@given(rows=ROWS, data=st.data())
def test_queries_and_keys_of_padded_rows(rows, data):
    pads = data.draw(st.lists(st.integers(0, 9), min_size=len(rows), max_size=len(rows)))
    span = spans_of(rows, pads)
    q = torch.arange(len(rows) * span.queries).view(len(rows), 1, span.queries, 1)
    k = torch.arange(len(rows) * span.keys).view(len(rows), 1, span.keys, 1)
    gathered, keys = span.gather_queries(q), span.gather_keys(k)
    for row, ((start, length), pad) in enumerate(zip(rows, pads, strict=True)):
        assert torch.equal(gathered[row, :, :length], q[row, :, pad : pad + length])
        assert torch.equal(keys[row, :, : start + length], k[row, :, pad : pad + start + length])
    back = span.scatter_queries(gathered, torch.full_like(q, -1))
    for row, ((_, length), pad) in enumerate(zip(rows, pads, strict=True)):
        assert torch.equal(back[row, :, pad : pad + length], q[row, :, pad : pad + length])
        assert (back[row, :, :pad] == -1).all()
        assert (back[row, :, pad + length :] == -1).all()


@given(rows=ROWS)
def test_packed_rows(rows):
    lengths = [length for _, length in rows]
    cu_queries = cumulative(lengths)
    cu_keys = cumulative([start + length for start, length in rows])
    span = Span.of_packed(cu_queries, cu_keys)
    assert (span.queries, span.keys) == (max(lengths), max(map(sum, rows)))
    q = torch.arange(sum(lengths)).view(1, 1, -1, 1)
    k = torch.arange(sum(map(sum, rows))).view(1, 1, -1, 1)
    gathered, keys = span.gather_queries(q), span.gather_keys(k)
    for row, (start, length) in enumerate(rows):
        assert span.table[row].tolist() == [cu_queries[row], start, length, cu_keys[row]]
        assert torch.equal(gathered[row, 0, :length, 0], torch.arange(length) + cu_queries[row])
        assert torch.equal(keys[row, 0, : start + length, 0], torch.arange(start + length) + cu_keys[row])
    assert torch.equal(span.scatter_queries(gathered, torch.full_like(q, -1)), q)
    whole = Span.of_packed(cu_queries)
    assert whole.column(1).tolist() == [0] * len(rows)


def test_pages_give_the_same_keys():
    k = torch.randn(2, 3, 40, 5)
    pages = torch.full((7, 3, 16, 5), float("nan"))
    table = torch.tensor([[4, 0, 6], [1, 5, 2]], dtype=torch.int32)
    padded = torch.nn.functional.pad(k, (0, 0, 0, 8)).unflatten(2, (3, 16))
    for row in range(2):
        for place, page in enumerate(table[row]):
            pages[page] = padded[row, :, place]
    span = Span.of_rows(4, 40, start=torch.tensor([36, 36]), length=torch.tensor([4, 4]), pages=Pages(table, 16))
    assert torch.equal(span.gather_keys(pages), k)
    span.check("op", k=pages, block_size=8)
    with pytest.raises(ValueError, match="whole blocks of 32"):
        span.check("op", k=pages, block_size=32)
    with pytest.raises(ValueError, match="pages hold 16 tokens"):
        span.check("op", k=k)


@pytest.mark.parametrize(
    ("queries", "keys"), [(1, 1), (5, 5), (3, 64), (65, 65), (64, 128), (1, 65), (10, 130), (0, 7)]
)
@pytest.mark.parametrize("block_size", [32, 64])
def test_the_default_equals_its_own_table(queries, keys, block_size):
    plain = Span(2, queries, keys)
    start, length = torch.full((2,), keys - queries), torch.full((2,), queries)
    table = Span.of_rows(queries, keys, start=start, length=length)
    assert plain.plain
    assert not table.plain
    for index in range(4):
        assert torch.equal(plain.column(index), table.column(index))
    valid = table.valid_rows(block_size)
    for row in range(2):
        assert torch.equal(
            table.row_blocks(block_size)[row][valid[row]], plain.row_blocks(block_size)[0][: valid[row].sum()]
        )
        assert int(valid[row].sum()) == (plain.num_rows(block_size) if queries else 0)
    x = torch.randn(2, 1, queries, 3)
    assert plain.gather_queries(x) is x


def test_lengths_of_right_padded_rows():
    span = Span.of_padded(3, 10, 100, torch.tensor([100, 93, 50]))
    assert span.column(1).tolist() == [90, 90, 90]
    assert span.column(2).tolist() == [10, 3, 0]
    assert span.valid_rows(8)[2].sum() == 0
    assert Span.of_padded(3, 10, 100).plain


def test_what_does_not_fit_is_said():
    with pytest.raises(ValueError, match="at most as many queries as keys"):
        Span(1, 5, 4)
    with pytest.raises(ValueError, match=r"int32 \[2, 4\], got torch.int64"):
        Span(2, 5, 5, torch.zeros(2, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="need a table"):
        Span(2, 5, 5, packed=True)
    with pytest.raises(ValueError, match="begin at different blocks"):
        Span.of_padded(1, 5, 5, torch.tensor([4])).first_row(64)
    with pytest.raises(ValueError, match=r"2 rows of 5 slots, but q is \(1, 1, 5, 2\)"):
        Span(2, 5, 5).check("op", q=torch.zeros(1, 1, 5, 2))
    pages = Pages(torch.zeros(1, 1, dtype=torch.int32), 64)
    with pytest.raises(ValueError, match="page table has 1 rows for a batch of 2"):
        Span.of_rows(1, 9, start=torch.tensor([1, 1]), length=torch.tensor([1, 1]), pages=pages)
