"""block_pooling against a loop over blocks."""

from __future__ import annotations

import itertools

import pytest
import torch

from seerattention.ops import Span, block_pooling
from seerattention.ops.dispatch import triton_importable, triton_interpreted
from seerattention.ops.indices import num_blocks
from seerattention.ops.span import cumulative

needs_interpreter = pytest.mark.skipif(
    not (triton_importable() and triton_interpreted()), reason="needs triton and TRITON_INTERPRET=1"
)
ORDERS = [order for size in (1, 2, 3) for order in itertools.permutations(("max", "min", "avg"), size)]


def definition(x, kinds, block_size, lengths=None):
    batch, heads, length, head_dim = x.shape
    num = num_blocks(length, block_size)
    out = torch.zeros(batch, heads, num, len(kinds), head_dim, dtype=torch.float64)
    for b, block, (slot, kind) in itertools.product(range(batch), range(num), enumerate(kinds)):
        end = length if lengths is None else int(lengths[b])
        tokens = x[b, :, block * block_size : min(end, (block + 1) * block_size)].double()
        if tokens.shape[1]:
            out[b, :, block, slot] = {"max": tokens.amax(1), "min": tokens.amin(1), "avg": tokens.mean(1)}[kind]
    return out.flatten(-2)


def check(x, kinds, block_size, implementation, lengths=None):
    expected = definition(x, kinds, block_size, lengths)
    actual = block_pooling(x, kinds, block_size=block_size, lengths=lengths, implementation=implementation)
    assert actual.dtype == x.dtype
    assert actual.shape == expected.shape
    # Averages are taken in float32 and rounded once.
    rounding = {torch.float32: 5e-7, torch.float16: 5e-4, torch.bfloat16: 4e-3}[x.dtype]
    torch.testing.assert_close(actual.double(), expected, rtol=rounding, atol=5e-7)
    for slot, kind in enumerate(kinds):
        if kind != "avg":
            part = slice(slot * x.shape[-1], (slot + 1) * x.shape[-1])
            assert torch.equal(actual[..., part].double(), expected[..., part])


def make(length, head_dim, dtype=torch.float32, batch=2, heads=3):
    generator = torch.Generator().manual_seed(length + head_dim)
    return torch.randn(batch, length, heads, head_dim, generator=generator).to(dtype).transpose(1, 2)


@pytest.mark.parametrize("length", [1, 63, 64, 65, 127, 1000])
@pytest.mark.parametrize("block_size", [32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_equals_definition(length, block_size, dtype):
    for head_dim in (32, 80):
        check(make(length, head_dim, dtype), ("max", "min", "avg"), block_size, None)


@pytest.mark.parametrize("block_size", [4, 8, 12, 16, 20, 48])
@pytest.mark.parametrize("length", [1, 3, 8, 100])
def test_short_blocks_equal_definition(length, block_size):
    for lengths in (None, torch.tensor([length, max(1, length // 3)])):
        for dtype in (torch.float32, torch.bfloat16):
            check(make(length, 16, dtype), ("max", "min", "avg"), block_size, None, lengths)


@pytest.mark.parametrize("kinds", ORDERS, ids="-".join)
def test_kinds_keep_their_order(kinds):
    check(make(100, 16), kinds, 32, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding(dtype):
    x = make(200, 32, dtype)
    check(x, ("avg", "max", "min"), 64, None, lengths=torch.tensor([200, 65]))
    alone = block_pooling(x[1:, :, :65], ("avg", "max", "min"))
    x[1, :, 65:] = float("nan")
    padded = block_pooling(x, ("avg", "max", "min"), lengths=torch.tensor([200, 65]))
    torch.testing.assert_close(padded[1:, :, :2], alone)
    assert (padded[1, :, 2:] == 0).all()


@needs_interpreter
@pytest.mark.parametrize(
    ("length", "head_dim", "block_size", "dtype", "kinds"),
    [
        (1, 64, 64, torch.float32, ("avg",)),
        (63, 128, 64, torch.float16, ("max", "min", "avg")),
        (65, 32, 32, torch.float32, ("avg", "max")),
        (127, 80, 64, torch.float32, ("min", "avg", "max")),
        (300, 256, 128, torch.float16, ("max",)),
    ],
)
def test_triton_interpreted(length, head_dim, block_size, dtype, kinds, monkeypatch):
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **kwargs: empty(*size, **kwargs).fill_(float("nan")))
    x = make(length, head_dim, dtype)
    check(x, kinds, block_size, "triton")
    lengths = torch.tensor([length, max(1, length // 2)])
    x[1, :, int(lengths[1]) :] = float("nan")
    check(x, kinds, block_size, "triton", lengths=lengths)


@needs_interpreter
@pytest.mark.parametrize("block_size", [4, 8, 12, 16, 20])
@pytest.mark.parametrize("length", [1, 21, 64])
def test_triton_interpreted_short_blocks(length, block_size, nan_filled_empty):
    """Several blocks of 4 and 8 tokens a program, the last of which may have no block or no token left."""
    for heads, head_dim, dtype in ((3, 16, torch.float32), (9, 80, torch.float16)):
        x = make(length, head_dim, dtype, heads=heads)
        check(x, ("min", "avg", "max"), block_size, "triton")
        lengths = torch.tensor([max(1, length - 3), max(1, length // 2)])
        x[1, :, int(lengths[1]) :] = float("nan")
        check(x, ("min", "avg", "max"), block_size, "triton", lengths=lengths)


# -- chunks: blocks are cut from the content ---------------------------------------------------------------------------


def chunk_definition(x, kinds, block_size, align, rows):
    """``rows``: for each row its batch row in x, the slot of its first token, its position and the number of tokens."""
    results = []
    for batch, slot, start, length in rows:
        tokens = x[batch, :, slot : slot + length]
        before = start // align * align
        count = num_blocks(start + length - before, block_size) if length else 0
        blocks = []
        for block in range(count):
            begin = max(before + block * block_size - start, 0)
            part = tokens[:, begin : max(0, before + (block + 1) * block_size - start)]
            empty = torch.zeros(x.shape[1], 1, len(kinds) * x.shape[3], dtype=torch.float64)
            whole = part.shape[1] > 0
            blocks.append(definition(part[None], kinds, 128)[0] if whole else empty)
        results.append(torch.cat(blocks, 1) if blocks else torch.zeros(x.shape[1], 0, len(kinds) * x.shape[3]))
    return results


IMPLEMENTATIONS = [pytest.param("reference"), pytest.param("triton", marks=needs_interpreter)]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("block_size", "align"), [(32, None), (8, None), (8, 32), (4, 64), (12, 24)])
def test_chunks(block_size, align, implementation, nan_filled_empty):
    """The last of many positions, rows that begin anywhere, packed rows; blocks begin where those of the prompt do."""
    kinds, step = ("max", "avg"), align or block_size
    padded, packed = make(50, 16, batch=3, heads=2), make(60, 16, batch=1, heads=2)
    start, length = torch.tensor([0, 45, 13]), torch.tensor([50, 7, 0])
    cu_queries, cu_keys = cumulative([20, 33, 7]), cumulative([20, 70, 39])
    cases = [
        (padded, Span(3, 50, 50), [(b, 0, 0, 50) for b in range(3)]),
        (padded, Span(3, 50, 99), [(b, 0, 49, 50) for b in range(3)]),
        (padded, Span.of_rows(50, 100, start=start, length=length), [(0, 0, 0, 50), (1, 0, 45, 7), (2, 0, 13, 0)]),
        (packed, Span.of_packed(cu_queries, cu_keys), [(0, 0, 0, 20), (0, 20, 37, 33), (0, 53, 32, 7)]),
    ]
    for x, span, rows in cases:
        result = block_pooling(
            x, kinds, block_size=block_size, span=span, align=align, implementation=implementation
        )  # fmt: skip
        assert result.shape == (len(rows), 2, span.num_rows(step) * (step // block_size), 2 * 16)
        for row, expected in zip(result, chunk_definition(x, kinds, block_size, step, rows), strict=True):
            count = expected.shape[1]
            torch.testing.assert_close(row[:, :count].double(), expected.double(), rtol=1e-6, atol=1e-6)
            assert (row[:, count:] == 0).all()


def test_chunks_on_block_boundaries_are_the_blocks_of_the_prompt():
    x = make(96, 16)
    parts = [
        block_pooling(x[:, :, i : i + 32], ("avg", "max"), block_size=16, span=Span(2, 32, i + 32)) for i in (0, 32, 64)
    ]
    assert torch.equal(torch.cat(parts, 2), block_pooling(x, ("avg", "max"), block_size=16))


@needs_interpreter
@pytest.mark.parametrize(
    ("heads", "head_dim", "dtype"), [(16, 64, torch.float16), (20, 64, torch.float32), (9, 128, torch.float16)]
)
def test_triton_interpreted_with_more_heads_than_a_program_takes(heads, head_dim, dtype, monkeypatch):
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **kwargs: empty(*size, **kwargs).fill_(float("nan")))
    x = make(130, head_dim, dtype, heads=heads)
    check(x, ("max", "min", "avg"), 64, "triton")
    check(x, ("avg",), 64, "triton", lengths=torch.tensor([130, 65]))
    check(x.contiguous(), ("max", "avg"), 64, "triton")


def test_wrong_arguments():
    x = make(70, 16)
    for kinds in ((), ("max", "max"), ("median",)):
        with pytest.raises(ValueError, match="kinds"):
            block_pooling(x, kinds)
    with pytest.raises(ValueError, match="block_size"):
        block_pooling(x, ("max",), block_size=2)
    for size in (0, -4, 6, 132):
        with pytest.raises(ValueError, match="multiple of 4 from 4 to 128"):
            block_pooling(x, ("max",), block_size=size)
    with pytest.raises(ValueError, match="needs a span"):
        block_pooling(x, ("max",), align=64)
    with pytest.raises(ValueError, match="align must be a multiple"):
        block_pooling(x, ("max",), span=Span(2, 70, 70), align=32)
    with pytest.raises(ValueError, match="not both"):
        block_pooling(x, ("max",), span=Span(2, 70, 70), lengths=torch.tensor([70, 70]))
    with pytest.raises(ValueError, match="slots"):
        block_pooling(x, ("max",), span=Span(2, 69, 69))
    with pytest.raises(ValueError, match="lengths"):
        block_pooling(x, ("max",), lengths=torch.tensor([1]))
    with pytest.raises(ValueError, match="x must be"):
        block_pooling(x[0], ("max",))
    with pytest.raises(TypeError, match="float"):
        block_pooling(x.double(), ("max",))
