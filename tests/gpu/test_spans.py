"""Attention and selection of rows that begin and lie anywhere, on a GPU: each row is what it is alone."""

from __future__ import annotations

import pytest
import torch

from helpers import split_lists
from layouts import LAYOUTS, check_attention_layout, check_pooled_layout
from seerattention.ops import Span, dispatch, pooled_attention, pooled_attention_decode
from seerattention.policies import Dense, Threshold, TokenBudget, TopK, TopP

SIZES = [(300, 1000), (1, 65), (130, 130), (63, 640), (64, 128)]
POLICIES = [Threshold(0.02), Threshold(0.1, last_blocks_dense=1), TopK(0.3), TopP(0.8), TokenBudget(256), Dense()]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("implementation", ["triton", "hopper"])
def test_attention_of_any_layout(implementation, dtype, head_dim, parts, layout, monkeypatch, nan_filled_empty):
    if implementation == "hopper":
        if reason := dispatch.hopper_unusable(torch.device("cuda", 0)):
            pytest.skip(reason)
        if dtype == torch.float32:
            pytest.skip("16-bit dtypes only")
    split_lists(monkeypatch, parts)
    options = {"device": "cuda", "block_size": 64, "dtype": dtype, "head_dim": head_dim, "heads": 4, "kv_heads": 2}
    check_attention_layout(implementation, layout, SIZES, shared=layout == "pages", **options)


@pytest.mark.parametrize("policy", POLICIES)
def test_policies_equal_the_cpu(policy, nan_filled_empty):
    start, length = torch.tensor([0, 700, 64, 4000, 30]), torch.tensor([500, 300, 64, 96, 0])
    span = Span.of_rows(500, 4096, start=start, length=length)
    # Steps of 1/8, so that no two orders of a sum give different bits, and many scores are equal.
    scores = (
        torch.randn(5, 3, span.num_rows(64), span.num_key_blocks(64), generator=torch.Generator().manual_seed(0)) * 8
    )
    scores = scores.round() / 8
    expected = policy.select(scores, block_size=64, span=span)
    blocks = policy.select(scores.cuda(), block_size=64, span=span.to("cuda"))
    differ = (blocks.to_mask().cpu() != expected.to_mask()).sum()
    assert int(differ) <= (2 if isinstance(policy, Threshold | TopP) else 0)  # softmax differs in its last bits
    assert int(expected.to_mask().sum()) > 0


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("reduce", ["max", "sum", "row_sum"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("op", "implementation"),
    [(pooled_attention, "triton"), (pooled_attention, "hopper"), (pooled_attention_decode, "triton")],
)
def test_pooled_attention_of_any_layout(op, implementation, dtype, reduce, layout, nan_filled_empty):
    if implementation == "hopper":
        if reason := dispatch.hopper_unusable(torch.device("cuda", 0)):
            pytest.skip(reason)
        if dtype == torch.float32 or reduce == "sum":
            pytest.skip("16-bit dtypes and maxima over queries only")
    options = {"device": "cuda", "block_size": 64, "dtype": dtype, "head_dim": 128, "heads": 4, "kv_heads": 1}
    for given in (False, True):
        check_pooled_layout(op, implementation, layout, SIZES, reduce=reduce, given=given, **options)
