"""block_pooling on a GPU: the Triton kernel against the reference."""

from __future__ import annotations

import pytest
import torch

from seerattention.ops import block_pooling

KINDS = [("avg",), ("max", "min", "avg"), ("min", "max")]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("head_dim", "block_size"),
    [(32, 32), (64, 64), (80, 64), (128, 64), (128, 128), (256, 128), (64, 8), (128, 8), (80, 4), (96, 20)],
)
@pytest.mark.parametrize("kinds", KINDS, ids="-".join)
def test_equals_reference(dtype, head_dim, block_size, kinds, nan_filled_empty):
    for length in (1, 63, 64, 65, 127, 1000):
        x = torch.randn(2, length, 3, head_dim, device="cuda").to(dtype).transpose(1, 2)
        lengths = torch.tensor([length, max(1, length // 2)], device="cuda")
        for content in (None, lengths):
            actual, expected = (
                block_pooling(x, kinds, block_size=block_size, lengths=content, implementation=name)
                for name in ("triton", "reference")
            )
            assert actual.dtype == dtype
            # Sums in another order may round a half-precision average to its neighbour.
            rounding = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
            torch.testing.assert_close(actual, expected, rtol=rounding, atol=1e-6)
            for slot, kind in enumerate(kinds):
                if kind != "avg":
                    part = slice(slot * head_dim, (slot + 1) * head_dim)
                    assert torch.equal(actual[..., part], expected[..., part])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("heads", "head_dim"), [(32, 128), (28, 128), (40, 64), (8, 96)])
def test_more_heads_than_a_program_takes(heads, head_dim, dtype, nan_filled_empty):
    """As models have them (heads of a token side by side) and head by head."""
    x = torch.randn(1, 4100, heads, head_dim, device="cuda").to(dtype).transpose(1, 2)
    expected = block_pooling(x, ("max", "min", "avg"), implementation="reference")
    rounding = {torch.float32: 1e-6, torch.bfloat16: 8e-3}[dtype]
    for same in (x, x.contiguous()):
        actual = block_pooling(same, ("max", "min", "avg"), implementation="triton")
        torch.testing.assert_close(actual, expected, rtol=rounding, atol=1e-6)
        assert torch.equal(block_pooling(same, ("max", "min", "avg"), implementation="triton"), actual)


def test_more_than_2_to_the_31_elements():
    """Addresses past 2^31 elements: the last heads of a large input equal the same heads alone, as many as a program
    takes at a time: with fewer, sums are made in another order."""
    if torch.cuda.mem_get_info()[0] < 10 * 2**30:
        pytest.skip("needs 10 GiB of free GPU memory")
    x = torch.randn(1, 1, 1 << 18, 128, dtype=torch.bfloat16, device="cuda").repeat(1, 66, 1, 1)
    assert x.numel() > 2**31
    x[:, -1] *= 2
    pooled = block_pooling(x, ("max", "avg"), implementation="triton")
    assert torch.equal(pooled[:, -8:], block_pooling(x[:, -8:].clone(), ("max", "avg"), implementation="triton"))
    assert torch.equal(pooled[:, -1], 2 * pooled[:, 0])


def test_padding_is_not_read_into_the_result():
    x = torch.randn(2, 3, 300, 64, device="cuda")
    x[1, :, 100:] = float("nan")
    pooled = block_pooling(x, ("max", "min", "avg"), lengths=torch.tensor([300, 100], device="cuda"))
    assert not pooled.isnan().any()
    assert (pooled[1, :, 2:] == 0).all()
