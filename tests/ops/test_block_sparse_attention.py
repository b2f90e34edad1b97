"""Every implementation of block-sparse attention that runs without a GPU, against masked dense attention."""

from __future__ import annotations

import importlib
import logging
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from helpers import (
    LIST_KINDS,
    assert_as_accurate_as,
    check_attention,
    exact_attention,
    make_blocks,
    make_qkv,
    masked_sdpa,
)
from seerattention.ops import dispatch
from seerattention.ops.block_sparse_attention import block_sparse_attention
from seerattention.ops.indices import BlockIndices

MODULE = "seerattention.ops.block_sparse_attention"
LENGTHS = [(1, 1), (63, 63), (64, 64), (65, 65), (127, 127), (1000, 1000), (1, 65), (37, 200), (130, 333), (64, 192)]


def run_and_check(implementation, q, k, v, blocks, with_lse=True):
    """One call against the exact result, held to the error of masked SDPA in the same dtype."""
    if with_lse:
        check_attention(implementation, q, k, v, blocks)
    else:
        out = block_sparse_attention(q, k, v, blocks, implementation=implementation)
        assert_as_accurate_as(out, masked_sdpa(q, k, v, blocks), exact_attention(q, k, v, blocks)[0])


# -- the reference itself ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LIST_KINDS)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_reference(lengths, kind, nan_filled_empty):
    q, k, v = make_qkv(*lengths, batch=2)
    blocks = make_blocks(kind, q, k)
    run_and_check("reference", q, k, v, blocks)
    _, lse = block_sparse_attention(q, k, v, blocks, return_lse=True, implementation="reference")
    assert bool((lse == float("-inf")).any()) == bool((blocks.counts == 0).any())


def test_reference_in_chunks_is_the_same(monkeypatch):
    q, k, v = make_qkv(300, 433, batch=2)
    blocks = make_blocks("random", q, k)
    whole = block_sparse_attention(q, k, v, blocks, return_lse=True, implementation="reference")
    monkeypatch.setattr(importlib.import_module(f"{MODULE}.reference"), "MAX_SCORES", 1)
    for a, b in zip(
        block_sparse_attention(q, k, v, blocks, return_lse=True, implementation="reference"), whole, strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_reference_lse_is_the_log_of_the_sum():
    q, k, v = make_qkv(70, 70, heads=1, kv_heads=1, head_dim=8)
    blocks = make_blocks("all", q, k)
    _, lse = block_sparse_attention(q, k, v, blocks, scale=0.3, return_lse=True, implementation="reference")
    expected = torch.log(torch.exp(0.3 * (q[0, 0, 69] @ k[0, 0].T)).sum())
    torch.testing.assert_close(lse[0, 0, 69], expected)


# -- gathered ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LIST_KINDS)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_gathered_lengths(lengths, kind, nan_filled_empty):
    q, k, v = make_qkv(*lengths, batch=2)
    run_and_check("cpu_gathered", q, k, v, make_blocks(kind, q, k))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("group", [1, 2, 4, 7, 8])
@pytest.mark.parametrize("kind", ["random", "shared"])
def test_gathered_groups_and_dtypes(group, dtype, kind, nan_filled_empty):
    q, k, v = make_qkv(150, 260, heads=2 * group, kv_heads=2, dtype=dtype)
    run_and_check("cpu_gathered", q, k, v, make_blocks(kind, q, k))


@pytest.mark.parametrize("block_size", [32, 64, 128])
@pytest.mark.parametrize("head_dim", [32, 64, 80, 128, 256])
def test_gathered_head_dims_and_block_sizes(head_dim, block_size, nan_filled_empty):
    q, k, v = make_qkv(200, 300, head_dim=head_dim)
    run_and_check("cpu_gathered", q, k, v, make_blocks("empty_rows", q, k, block_size))


def test_gathered_in_buckets_of_one_row(monkeypatch):
    monkeypatch.setattr(importlib.import_module(f"{MODULE}.cpu_gathered"), "BUCKET_ELEMENTS", 1)
    q, k, v = make_qkv(300, 333)
    run_and_check("cpu_gathered", q, k, v, make_blocks("random", q, k))


def test_gathered_with_and_without_lse_and_inputs_untouched():
    """Results overwrite a copy of the queries, never the queries."""
    inputs = [x.contiguous() for x in make_qkv(256, 256)]
    copies = [x.clone() for x in inputs]
    blocks = make_blocks("random", *inputs[:2])
    out, _ = block_sparse_attention(*inputs, blocks, return_lse=True, implementation="cpu_gathered")
    assert torch.equal(block_sparse_attention(*inputs, blocks, implementation="cpu_gathered"), out)
    for x, copy in zip(inputs, copies, strict=True):
        assert torch.equal(x, copy)


@pytest.mark.parametrize("diagonal", [True, False])
def test_gathered_pads_lists_of_similar_lengths(diagonal, nan_filled_empty):
    """Lists of 16 and 17 blocks share a bucket; keys that nobody may see yet are hidden whatever they hold."""
    q, k, v = make_qkv(1100, 1100, heads=2, kv_heads=1)
    mask = torch.ones(1, 2, 18, 18, dtype=torch.bool)
    mask[:, 1, :, 3] = False
    if not diagonal:
        mask[:, 0] &= ~torch.eye(18, dtype=torch.bool)
    blocks = BlockIndices.from_mask(mask)
    run_and_check("cpu_gathered", q, k, v, blocks)
    spoilt = k.clone()
    spoilt[:, :, 1099] = float("nan")
    out = block_sparse_attention(q, spoilt, v, blocks, implementation="cpu_gathered")
    exact, _ = exact_attention(q, k, v, blocks)
    torch.testing.assert_close(out[:, :, :1099].double(), exact[:, :, :1099].double(), rtol=1e-5, atol=2e-6)


# -- Triton, interpreted: a fixed subset in which values of the columns meet pairwise ---------------------------------

# (Tq, Tk), heads, KV heads, head_dim, block size, dtype, kind
TRITON_CASES = [
    ((1, 1), 4, 4, 64, 64, torch.float32, "all"),
    ((63, 63), 4, 2, 32, 64, torch.float16, "random"),
    ((64, 64), 7, 1, 80, 32, torch.float32, "shared"),
    ((65, 65), 8, 1, 128, 64, torch.float16, "empty_rows"),
    ((127, 127), 2, 2, 256, 64, torch.float32, "single"),
    ((127, 127), 4, 1, 64, 128, torch.float16, "shared"),
    ((1, 65), 8, 2, 16, 64, torch.float32, "random"),
    ((37, 200), 4, 2, 80, 64, torch.float16, "random"),
    ((37, 200), 7, 1, 64, 32, torch.float32, "empty_rows"),
    ((130, 333), 2, 1, 32, 128, torch.float32, "random"),
    ((64, 192), 2, 2, 128, 128, torch.float32, "all"),
    ((64, 192), 4, 4, 80, 64, torch.float16, "single"),
    ((200, 200), 2, 1, 256, 32, torch.float16, "all"),
    ((200, 200), 4, 2, 64, 64, torch.float32, "empty_rows"),
    ((1, 129), 8, 1, 128, 32, torch.float16, "shared"),
    ((1000, 1000), 1, 1, 64, 64, torch.float32, "random"),
]


@pytest.mark.parametrize("case", TRITON_CASES, ids=str)
def test_triton_interpreted(case, nan_filled_empty):
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("tests/gpu covers it")
    lengths, heads, kv_heads, head_dim, block_size, dtype, kind = case
    q, k, v = make_qkv(*lengths, heads=heads, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype)
    run_and_check("triton", q, k, v, make_blocks(kind, q, k, block_size))


@pytest.mark.parametrize(
    ("head_dim", "kind", "dtype"),
    [(128, "random", torch.float16), (80, "empty_rows", torch.float16), (96, "all", torch.float16)],
)
def test_triton_interpreted_in_halves(head_dim, kind, dtype, monkeypatch, nan_filled_empty):
    """As on GPUs whose tensor cores take operands from registers."""
    module = pytest.importorskip("seerattention.ops.block_sparse_attention.triton")
    if torch.cuda.is_available():
        pytest.skip("tests/gpu covers it")
    monkeypatch.setattr(dispatch, "capability", lambda device: 8)
    for lengths in ((65, 65), (37, 200)):
        q, k, v = make_qkv(*lengths, head_dim=head_dim, dtype=dtype)
        assert module._in_halves(q, 64)
        run_and_check("triton", q, k, v, make_blocks(kind, q, k))


def test_what_is_in_halves(monkeypatch):
    module = pytest.importorskip("seerattention.ops.block_sparse_attention.triton")
    for capability, halves in ((0, False), (8, True), (9, False), (10, False), (12, True)):
        monkeypatch.setattr(dispatch, "capability", lambda device, value=capability: value)
        for head_dim in (64, 128, 256):
            q = torch.zeros(1, 1, 64, head_dim, dtype=torch.float16)
            assert module._in_halves(q, 64) == (halves and head_dim == 128)
        assert not module._in_halves(torch.zeros(1, 1, 64, 128), 64)


def test_triton_batch_and_no_lse(nan_filled_empty):
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("tests/gpu covers it")
    q, k, v = make_qkv(70, 100, batch=2, heads=2, kv_heads=1)
    blocks = make_blocks("random", q, k)
    run_and_check("triton", q, k, v, blocks, with_lse=False)
    padded = torch.cat([blocks.indices, blocks.indices], -1)[..., : blocks.num_key_blocks + 1]
    strided = BlockIndices(padded, blocks.counts, blocks.num_key_blocks, 64)  # a capacity above Nk
    run_and_check("triton", q, k, v, strided)


# -- all implementations -----------------------------------------------------------------------------------------------

PORTABLE = ["reference", "cpu_gathered", "triton"]


@pytest.mark.parametrize("implementation", PORTABLE)
def test_all_blocks_equal_sdpa(implementation):
    q, k, v = make_qkv(130, 130)
    out = block_sparse_attention(q, k, v, make_blocks("all", q, k), implementation=implementation)
    dense = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(out, dense, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("implementation", PORTABLE)
def test_lists_without_room_give_empty_rows(implementation):
    q, k, v = make_qkv(70, 70)
    counts = torch.zeros(1, 4, 2, dtype=torch.int32)
    blocks = BlockIndices(torch.zeros(1, 4, 2, 0, dtype=torch.int32), counts, 2)
    out, lse = block_sparse_attention(q, k, v, blocks, return_lse=True, implementation=implementation)
    assert torch.equal(out, torch.zeros_like(out))
    assert bool((lse == float("-inf")).all())


@pytest.mark.parametrize("implementation", PORTABLE)
def test_scale_and_large_logits(implementation):
    q, k, v = make_qkv(100, 100)
    blocks = make_blocks("random", q, k)
    for factor, scale in ((1.0, 0.02), (60.0, None)):
        reference = block_sparse_attention(q * factor, k, v, blocks, scale=scale, implementation="reference")
        out = block_sparse_attention(q * factor, k, v, blocks, scale=scale, implementation=implementation)
        torch.testing.assert_close(out, reference, rtol=1e-4, atol=1e-4)


def test_autocast_does_not_lower_the_precision():
    q, k, v = make_qkv(200, 200)
    blocks = make_blocks("random", q, k)
    expected = block_sparse_attention(q, k, v, blocks)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(block_sparse_attention(q, k, v, blocks), expected)


def test_output_keeps_the_memory_order_of_q():
    q, k, v = make_qkv(100, 100)
    out = block_sparse_attention(q, k, v, make_blocks("random", q, k))
    assert out.stride() == q.stride()


def _arguments():
    q, k, v = make_qkv(100, 150)
    return {"q": q, "k": k, "v": v, "blocks": make_blocks("random", q, k)}


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda a: a | {"q": a["q"].double()}, TypeError, "float64"),
        (lambda a: a | {"k": a["k"].half()}, TypeError, "float16"),
        (lambda a: a | {"v": a["v"].half()}, TypeError, "float16"),
        (lambda a: a | {"v": a["v"][:, :, :99]}, ValueError, "k and v"),
        (lambda a: a | {"q": a["q"][:, :3]}, ValueError, "multiple"),
        (lambda a: a | {"q": a["q"][0]}, ValueError, r"\[B, Hq, Tq, D\]"),
        (lambda a: a | {"q": a["q"].repeat(1, 1, 2, 1)}, ValueError, "200 queries for 150 keys"),
        (lambda a: a | {"q": a["q"].mT.contiguous().mT}, ValueError, "last dimension of q"),
        (lambda a: a | {"q": a["q"][:, :, :10]}, ValueError, "query blocks"),
        (lambda a: a | {"blocks": a["blocks"].indices}, TypeError, "BlockIndices"),
        (lambda a: a | {"scale": -1.0}, ValueError, "scale"),
        (lambda a: a | {"implementation": "fast"}, ValueError, "fast"),
        (lambda a: a | {"q": a["q"].requires_grad_()}, NotImplementedError, "no_grad"),
    ],
)
def test_errors_say_what_is_wrong(change, error, words):
    arguments = change(_arguments())
    with pytest.raises(error, match=words):
        block_sparse_attention(**arguments)


def test_wrong_block_size_and_wrong_heads():
    q, k, v = make_qkv(100, 100)
    mask = torch.ones(1, 4, 7, 7, dtype=torch.bool)
    with pytest.raises(ValueError, match="block_size"):
        block_sparse_attention(q, k, v, BlockIndices.from_mask(mask, 16))
    with pytest.raises(ValueError, match="3 heads"):
        block_sparse_attention(q, k, v, BlockIndices.from_mask(mask[:, :3, :2, :2]))


def test_inputs_that_require_grad_are_fine_without_grad_mode():
    q, k, v = make_qkv(100, 100)
    blocks = make_blocks("random", q, k)
    with torch.no_grad():
        out = block_sparse_attention(q.requires_grad_(), k, v, blocks)
    assert not out.requires_grad


def test_a_gpu_without_triton_warns_once_and_takes_the_reference(monkeypatch, caplog):
    dispatch = importlib.import_module("seerattention.ops.dispatch")
    monkeypatch.setattr(dispatch, "triton_importable", lambda: False)
    dispatch.warn_once.cache_clear()
    device, table = torch.device("cuda"), {name: dispatch.Implementation(name) for name in ("triton", "reference")}
    with caplog.at_level(logging.WARNING, logger="seerattention"):
        for _ in range(2):
            name = dispatch.choose_implementation("op", None, device, table)
            assert name == "reference"
    assert len(caplog.records) == 1
    with pytest.raises(ValueError, match="needs triton"):
        dispatch.choose_implementation("op", "triton", device, table)


def test_importing_the_package_imports_neither_triton_nor_the_compiler():
    checks = ["'triton' not in sys.modules", "not torch.cuda.is_initialized()"]
    code = "import sys, torch, seerattention.ops; assert " + " and ".join(checks)
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
