"""pooled_attention on a GPU: its kernels against the reference, over the whole product of shapes."""

from __future__ import annotations

import contextlib
import functools

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpu_targets import lse_of, make, spoilt_padding
from seerattention.ops import pooled_attention
from seerattention.ops.dense import dense_attention_with_lse
from seerattention.ops.pooled_attention.arguments import REDUCTIONS, Wanted
from seerattention.ops.pooled_attention.interface import hopper_usable


def check(q, k, **arguments):
    # float32 products of the reference must not go through TF32, which is torch's default.
    assert not torch.backends.cuda.matmul.allow_tf32
    expected = pooled_attention(q, k, implementation="reference", **arguments)
    for implementation in implementations(q, k, **arguments):
        actual = pooled_attention(q, k, implementation=implementation, **arguments)
        assert actual.dtype == torch.float32
        assert not actual.isnan().any()
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def implementations(q, k, block_size=64, reduce="max", **_):
    """The kernels that can run here on these inputs."""
    return ["triton"] + ["hopper"] * (hopper_usable(q, k, Wanted(block_size, 1.0, reduce, True, None)) is None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("group", [1, 2, 4, 7, 8])
def test_equals_reference(dtype, head_dim, group, nan_filled_empty):
    for length in (1, 63, 64, 65, 127, 1000):
        q, k = make(length, length, group * 2, 2, head_dim, dtype)
        for reduce in REDUCTIONS:
            check(q, k, reduce=reduce)


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
    for normalize in (True, False):
        check(q, k, block_size=block_size, reduce="row_sum", normalize=normalize)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("head_dim", "block_size"), [(64, 64), (128, 64), (80, 64), (128, 32), (128, 128), (256, 64)])
@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 7, 8])
def test_given_the_lse(dtype, head_dim, block_size, group, nan_filled_empty):
    for tokens in ((1, 1), (65, 65), (1000, 1000), (300, 500)):
        q, k = make(*tokens, group * 2, 2, head_dim, dtype)
        lse = lse_of(q, k)
        for reduce in REDUCTIONS:
            check(q, k, block_size=block_size, lse=lse, reduce=reduce)
        lengths = torch.tensor([tokens[1], tokens[1] - tokens[0] // 2], device="cuda")
        rows = torch.tensor([(tokens[1] - 1) // block_size, (tokens[1] - tokens[0]) // block_size], device="cuda")
        for reduce in ("max", "row_sum"):
            check(q, k, block_size=block_size, lse=lse, lengths=lengths, rows=rows, normalize=False, reduce=reduce)


def test_padding_and_its_lse_are_never_used(nan_filled_empty):
    for reduce in REDUCTIONS:
        q, k, lse, lengths, expected = spoilt_padding(functools.partial(pooled_attention, reduce=reduce))
        for implementation in implementations(q, k, reduce=reduce):
            common = {"lengths": lengths, "lse": lse, "reduce": reduce}
            actual = pooled_attention(q, k, implementation=implementation, **common)
            torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", [None, SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(8, 2, 128), (4, 4, 64), (7, 1, 128)])
@pytest.mark.parametrize("length", [1, 65, 1000, 4096])
def test_the_dense_forward_gives_it(backend, heads, kv_heads, head_dim, length):
    """Its output is that of SDPA through the same kernel, and the target is the same as from scratch."""
    q, k = make(length, length, heads, kv_heads, head_dim, torch.bfloat16)
    v = torch.randn_like(k)
    try:
        with contextlib.nullcontext() if backend is None else sdpa_kernel(backend):
            expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    except RuntimeError as error:
        pytest.skip(f"SDPA cannot either: {error}")
    found = dense_attention_with_lse(q, k, v, backend=backend)
    if found is None:
        assert backend is None
        pytest.skip("SDPA chooses a kernel that gives no log-sum-exp")
    torch.testing.assert_close(found[0], expected, atol=1e-2, rtol=1e-2)
    assert found[1].shape == q.shape[:3]
    torch.testing.assert_close(found[1], lse_of(q, k), atol=2e-3, rtol=1e-4)
    torch.testing.assert_close(pooled_attention(q, k, lse=found[1]), pooled_attention(q, k), atol=1e-3, rtol=2e-3)


def test_repeated_runs_are_equal():
    q, k = make(5000, 5000, 32, 8, 128, torch.bfloat16, batch=1)
    lse = dense_attention_with_lse(q, k, k)[1]
    for reduce in REDUCTIONS:
        for implementation in implementations(q, k, reduce=reduce):
            common = {"lse": lse, "reduce": reduce, "implementation": implementation}
            first = pooled_attention(q, k, **common)
            for _ in range(3):
                assert torch.equal(pooled_attention(q, k, **common), first)


@pytest.mark.parametrize("implementation", ["triton", "hopper"])
@pytest.mark.parametrize("group", [1, 4, 7, 8])
@pytest.mark.parametrize("reduce", ["max", "row_sum"])
def test_long_prompts_given_the_lse(reduce, group, implementation):
    """Every row of a real size, and a random quarter of them; the reference judges some."""
    length, kv_heads = 32768, 2
    q, k = make(length, length, group * kv_heads, kv_heads, 128, torch.bfloat16, batch=1)
    if implementation not in implementations(q, k, reduce=reduce):
        pytest.skip("cannot run here")
    lse = dense_attention_with_lse(q, k, k)[1]
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    target = pooled_attention(q, k, lse=lse, reduce=reduce, implementation=implementation)
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before
    assert extra <= 1.05 * target.numel() * 4  # the map and nothing else
    rows = torch.randperm(length // 64, device="cuda")[: length // 256]
    some = pooled_attention(q, k, lse=lse, rows=rows, reduce=reduce, implementation=implementation)
    assert torch.equal(some, target[:, :, rows])
    judged = torch.tensor([511, 100, 1], device="cuda")
    expected = pooled_attention(q, k, rows=judged, reduce=reduce, implementation="reference")
    torch.testing.assert_close(target[:, :, judged], expected, atol=1e-4, rtol=1e-3)


def test_rows_lengths_and_chunks():
    q, k = make(500, 830, 4, 2, 64, torch.bfloat16)
    rows = torch.tensor([12, 5, 9], device="cuda")
    for reduce in REDUCTIONS:
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
