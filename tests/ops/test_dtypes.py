"""Torch's default dtype decides nothing: results of every op are the same, bit for bit, whatever it is."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

import seerattention.ops
from helpers import make_blocks, make_qkv
from seerattention.ops import (
    block_pooling,
    block_sparse_attention,
    dispatch,
    pooled_attention,
    pooled_attention_decode,
    select_threshold,
    select_topk,
    select_topp,
)
from seerattention.ops.dense import dense_attention_with_lse
from seerattention.ops.gate_scores import encode_blocks, gate_scores
from seerattention.policies import Dense, Threshold, TokenBudget, TopK, TopP

DEFAULTS = [torch.float64, torch.bfloat16, torch.float16]
# Without a dtype these give torch's default one, or may.
MAKERS = {"empty", "empty_strided", "zeros", "ones", "full", "rand", "randn", "tensor", "scalar_tensor", "eye"}
MAKERS |= {"linspace", "logspace"}


@pytest.fixture(params=DEFAULTS, ids=str)
def another_default(request):
    yield request.param
    torch.set_default_dtype(torch.float32)


def flat(result):
    """The tensors of a result."""
    if isinstance(result, torch.Tensor):
        return [result]
    if isinstance(result, seerattention.ops.BlockIndices):
        return [result.to_mask(), result.counts]
    return [tensor for part in result for tensor in flat(part)]


def calls(implementation, dtype):
    """What is called, on inputs of this dtype. Those of interpreted kernels are few and short."""
    q, k, v = make_qkv(70, 100, dtype=dtype, head_dim=16)
    blocks = make_blocks("empty_rows", q, k, 32)
    scores = torch.randn(1, 2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    common = {"block_size": 32, "implementation": implementation}
    lengths = torch.tensor([80])
    found = {
        "attention": lambda: block_sparse_attention(
            q, k, v, blocks, return_lse=True, implementation=implementation or "cpu_gathered"
        ),
        "target": lambda: pooled_attention(q, k, lengths=lengths, **common),
        "target given lse": lambda: pooled_attention(q, k, lse=q[..., 0].float(), reduce="sum", **common),
        "decode target": lambda: pooled_attention_decode(q[:, :, :3], k, **common),
        "pooling": lambda: block_pooling(q, ("max", "avg"), lengths=torch.tensor([60]), **common),
        "topk": lambda: select_topk(scores, [1, 2, 3], **common),
        "topp": lambda: select_topp(scores, 0.6, softmax=True, **common),
        "threshold": lambda: select_threshold(scores, 0.3, softmax=True, lengths=lengths, **common),
    }
    if implementation is None:
        table = make_qkv(96, 96, heads=1, dtype=dtype, head_dim=16)[0][:, 0]
        pooled = q[:, :, :3].contiguous()
        weight = make_qkv(16, 16, dtype=dtype, head_dim=16)[0][0]
        found |= {
            "encode": lambda: encode_blocks(pooled, weight, table, table, pitch=32),
            "gate": lambda: gate_scores(pooled, pooled[:, :2].contiguous(), block_size=32),
            "dense": lambda: dense_attention_with_lse(q, q[:, :2], q[:, :2]),
            "clean": lambda: seerattention.ops.BlockIndices(blocks.indices, blocks.counts, 4, 32).checked(),
        }
        for policy in (Threshold(0.2), TopK(0.5), TopK(0.5, uniform=True), TopP(0.6), TokenBudget(64), Dense()):
            found[str(policy)] = lambda policy=policy: policy.select(scores, block_size=32, lengths=lengths)
    return found


@pytest.mark.parametrize("implementation", [None, "reference", "triton"])
def test_results_do_not_depend_on_the_default_dtype(implementation, another_default):
    if implementation == "triton" and not (dispatch.triton_importable() and dispatch.triton_interpreted()):
        pytest.skip("needs triton and TRITON_INTERPRET=1")
    for dtype in (torch.float32, torch.float16)[: 1 if implementation == "triton" else 2]:  # interpreted, it takes long
        for name, call in calls(implementation, dtype).items():
            torch.set_default_dtype(torch.float32)
            expected = flat(call())
            torch.set_default_dtype(another_default)
            for a, b in zip(flat(call()), expected, strict=True):
                assert a.dtype == b.dtype, name
                assert torch.equal(a, b), name


def test_every_allocation_names_its_dtype():
    """``arange`` of integers is int64 whatever the default; ``new_...`` and ``..._like`` take after a tensor."""
    missing = []
    for path in Path(seerattention.ops.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and isinstance(node.func.value, ast.Name)
                and node.func.value.id == "torch"
                and node.func.attr in MAKERS
                and not {"dtype", None} & {keyword.arg for keyword in node.keywords}  # None: ``**options``
            ):
                missing.append(f"{path.name}:{node.lineno}")
    assert not missing


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.complex64, torch.float8_e4m3fn])
def test_other_dtypes_are_refused_by_name(dtype):
    q = torch.zeros(1, 2, 64, 16, dtype=dtype)
    scores = torch.zeros(1, 1, 2, 2, dtype=dtype)
    for call in (
        lambda: block_pooling(q, ("avg",)),
        lambda: pooled_attention(q, q),
        lambda: pooled_attention_decode(q, q),
        lambda: block_sparse_attention(q, q, q, Dense().select(torch.zeros(1, 2, 1, 1), block_size=64)),
        lambda: select_threshold(scores, 0.1),
        lambda: select_topk(scores, [1, 1]),
        lambda: select_topp(scores, 0.1),
    ):
        with pytest.raises(TypeError, match=f"must be float32, float16 or bfloat16, got {dtype}"):
            call()
    assert dtype not in dispatch.FLOATING_DTYPES
