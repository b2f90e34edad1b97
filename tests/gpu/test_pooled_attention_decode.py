"""pooled_attention_decode on a GPU: its kernel against the reference, over the whole product of shapes."""

from __future__ import annotations

import pytest
import torch

from gpu_targets import lse_of, make, spoilt_padding
from seerattention.ops import pooled_attention_decode
from seerattention.ops.dense import dense_attention_with_lse
from seerattention.ops.pooled_attention.arguments import REDUCTIONS

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def some_rows(query_length, key_length):
    """Half of the queries, in no order."""
    return torch.randperm(query_length, device="cuda")[: (query_length + 1) // 2] + key_length - query_length


def check(q, k, **arguments):
    # float32 products of the reference must not go through TF32, which is torch's default.
    assert not torch.backends.cuda.matmul.allow_tf32
    expected = pooled_attention_decode(q, k, implementation="reference", **arguments)
    actual = pooled_attention_decode(q, k, implementation="triton", **arguments)
    assert actual.dtype == torch.float32
    assert not actual.isnan().any()
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("group", [1, 2, 4, 7, 8])
def test_equals_reference(dtype, head_dim, group, nan_filled_empty):
    for length in (1, 63, 64, 65, 127, 300, 1000):
        q, k = make(length, length, group * 2, 2, head_dim, dtype)
        for lse in (None, lse_of(q, k)):
            for reduce in REDUCTIONS:
                check(q, k, reduce=reduce, lse=lse)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("head_dim", "block_size", "group"),
    [(16, 64, 3), (80, 16, 7), (80, 128, 1), (128, 16, 4), (128, 32, 16), (128, 128, 33), (256, 64, 2), (256, 16, 1)],
)
def test_other_block_sizes_head_dims_and_groups(dtype, head_dim, block_size, group, nan_filled_empty):
    q, k = make(300, 700, group, 1, head_dim, dtype)
    for lse in (None, lse_of(q, k)):
        for reduce in REDUCTIONS:
            check(q, k, block_size=block_size, reduce=reduce, lse=lse)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [1, 2, 4, 7, 8])
@pytest.mark.parametrize("tokens", [(1, 1), (1, 500), (65, 65), (1000, 1000), (300, 830)])
def test_rows_lengths_and_chunks(dtype, group, tokens, nan_filled_empty):
    q, k = make(*tokens, group * 2, 2, 128, dtype)
    lengths = torch.tensor([tokens[1], tokens[1] - tokens[0] // 2], device="cuda")
    for lse in (None, lse_of(q, k)):
        for reduce in REDUCTIONS:
            check(q, k, rows=some_rows(*tokens), reduce=reduce, lse=lse)
            check(q, k, rows=some_rows(*tokens).sort().values, reduce=reduce, lse=lse, lengths=lengths)
            check(q, k, reduce=reduce, lse=lse, lengths=lengths, normalize=False)


def test_padding_and_its_lse_are_never_used(nan_filled_empty):
    q, k, lse, lengths, expected = spoilt_padding(pooled_attention_decode)
    for given_lse in (None, lse):
        actual = pooled_attention_decode(q, k, lengths=lengths, lse=given_lse, implementation="triton")
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_rows_out_of_range_are_zero(nan_filled_empty):
    """They are not checked on a GPU, and must not be read from memory either."""
    q, k = make(100, 300, 4, 2, 64, torch.bfloat16)
    rows = torch.tensor([250, -1, 199, 300, 1 << 30, 299], device="cuda")
    out = pooled_attention_decode(q, k, rows=rows, implementation="triton")
    assert torch.equal(out.sum(-1) > 0.5, torch.tensor([1, 0, 0, 0, 0, 1], device="cuda").bool().expand(2, 2, 6))


def test_repeated_runs_are_equal():
    q, k = make(5000, 5000, 32, 8, 128, torch.bfloat16, batch=1)
    for lse in (None, dense_attention_with_lse(q, k, k)[1]):
        for reduce in REDUCTIONS:
            first = pooled_attention_decode(q, k, lse=lse, reduce=reduce)
            for _ in range(3):
                assert torch.equal(pooled_attention_decode(q, k, lse=lse, reduce=reduce), first)


@pytest.mark.parametrize("group", [1, 4, 7, 8])
@pytest.mark.parametrize("given", [False, True])
def test_long_context_on_sampled_rows(group, given):
    """64K keys, rows as training takes them: no memory but that of the result, whatever the order."""
    length, kv_heads = 65536, 2
    q, k = make(length, length, group * kv_heads, kv_heads, 128, torch.bfloat16, batch=1)
    lse = dense_attention_with_lse(q, k, k)[1] if given else None
    rows = torch.randperm(length, device="cuda")[:1024].sort().values
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    target = pooled_attention_decode(q, k, rows=rows, lse=lse)
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before <= 1.05 * target.numel() * 4
    torch.testing.assert_close(target.sum(-1), torch.ones_like(target.sum(-1)), atol=1e-4, rtol=0)
    order = torch.randperm(1024, device="cuda")
    shuffled = pooled_attention_decode(q, k, rows=rows[order], lse=lse)
    torch.testing.assert_close(shuffled, target[:, :, order], atol=1e-6, rtol=1e-5)
    judged = torch.tensor([0, 1, 500, 1022, 1023], device="cuda")
    expected = pooled_attention_decode(q, k, rows=rows[judged], implementation="reference")
    torch.testing.assert_close(target[:, :, judged], expected, atol=1e-4, rtol=1e-3)


def test_cuda_graph():
    """One recording, replayed on other inputs and other rows, equals the op called by itself."""
    q, k = make(700, 700, 8, 2, 128, torch.bfloat16)
    rows = some_rows(700, 700)
    with torch.inference_mode():
        pooled_attention_decode(q, k, rows=rows)  # compiles the kernel
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = pooled_attention_decode(q, k, rows=rows)
        q.copy_(q.flip(2))
        rows.copy_(rows.flip(0))
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, pooled_attention_decode(q, k, rows=rows))
