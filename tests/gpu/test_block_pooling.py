"""block_pooling on a GPU: the Triton kernel against the reference."""

from __future__ import annotations

import pytest
import torch

from seerattention.ops import block_pooling

KINDS = [("avg",), ("max", "min", "avg"), ("min", "max")]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("head_dim", "block_size"), [(32, 32), (64, 64), (80, 64), (128, 64), (128, 128), (256, 128)])
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


def test_padding_is_not_read_into_the_result():
    x = torch.randn(2, 3, 300, 64, device="cuda")
    x[1, :, 100:] = float("nan")
    pooled = block_pooling(x, ("max", "min", "avg"), lengths=torch.tensor([300, 100], device="cuda"))
    assert not pooled.isnan().any()
    assert (pooled[1, :, 2:] == 0).all()
