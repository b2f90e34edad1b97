"""block_pooling against a loop over blocks."""

from __future__ import annotations

import itertools

import pytest
import torch

from seerattention.ops import block_pooling
from seerattention.ops.dispatch import triton_importable, triton_interpreted
from seerattention.ops.indices import num_blocks

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
        block_pooling(x, ("max",), block_size=16)
    with pytest.raises(ValueError, match="lengths"):
        block_pooling(x, ("max",), lengths=torch.tensor([1]))
    with pytest.raises(ValueError, match="x must be"):
        block_pooling(x[0], ("max",))
    with pytest.raises(TypeError, match="float"):
        block_pooling(x.double(), ("max",))
