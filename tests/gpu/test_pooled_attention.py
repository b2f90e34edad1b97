"""pooled_attention on a GPU: the Triton kernel against the reference, over the whole product of shapes."""

from __future__ import annotations

import pytest
import torch

from seerattention.ops import pooled_attention


def make(query_length, key_length, heads, kv_heads, head_dim, dtype, batch=2):
    generator = torch.Generator("cuda").manual_seed(query_length + 7 * heads)
    q = torch.randn(batch, query_length, heads, head_dim, device="cuda", generator=generator) * 2
    k = torch.randn(batch, key_length, kv_heads, head_dim, device="cuda", generator=generator)
    return q.to(dtype).transpose(1, 2), k.to(dtype).transpose(1, 2)


def check(q, k, **arguments):
    # float32 products of the reference must not go through TF32, which is torch's default.
    assert not torch.backends.cuda.matmul.allow_tf32
    actual = pooled_attention(q, k, implementation="triton", **arguments)
    expected = pooled_attention(q, k, implementation="reference", **arguments)
    assert actual.dtype == torch.float32
    assert not actual.isnan().any()
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("group", [1, 2, 4, 7, 8])
def test_equals_reference(dtype, head_dim, group, nan_filled_empty):
    for length in (1, 63, 64, 65, 127, 1000):
        q, k = make(length, length, group * 2, 2, head_dim, dtype)
        check(q, k)
        check(q, k, reduce="sum")


@pytest.mark.parametrize(
    ("head_dim", "block_size", "dtype"),
    [
        (32, 32, torch.bfloat16),
        (80, 64, torch.float16),
        (64, 128, torch.bfloat16),
        (256, 128, torch.bfloat16),
        (128, 32, torch.float32),
        (64, 128, torch.float32),
    ],
)
def test_other_block_sizes_and_head_dims(head_dim, block_size, dtype):
    q, k = make(700, 700, 4, 2, head_dim, dtype)
    check(q, k, block_size=block_size)
    check(q, k, block_size=block_size, reduce="sum", normalize=False)


def test_rows_lengths_and_chunks():
    q, k = make(500, 830, 4, 2, 64, torch.bfloat16)
    rows = torch.tensor([12, 5, 9], device="cuda")
    for reduce in ("max", "sum"):
        for lengths in (None, torch.tensor([830, 401], device="cuda")):
            check(q, k, reduce=reduce, lengths=lengths, rows=rows)
            check(q, k, reduce=reduce, lengths=lengths)
    lengths = torch.tensor([830, 401], device="cuda")
    q[1, :, 71:] = float("nan")  # queries start at position 330
    k[1, :, 401:] = float("nan")
    assert not pooled_attention(q, k, lengths=lengths).isnan().any()


def test_long_prompt_needs_no_buffer():
    """At 32K the memory beside inputs and result stays far below one float per query and key block."""
    q, k = make(32768, 32768, 8, 2, 64, torch.bfloat16, batch=1)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    target = pooled_attention(q, k)
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before - target.numel() * 4
    assert extra < 8 * 32768 * 512 * 4 / 8
    torch.testing.assert_close(target.sum(-1), torch.ones_like(target.sum(-1)), atol=1e-4, rtol=0)
    rows = torch.tensor([511, 100], device="cuda")
    expected = pooled_attention(q, k, rows=rows, implementation="reference")
    torch.testing.assert_close(target[:, :, rows], expected, atol=1e-5, rtol=1e-4)
