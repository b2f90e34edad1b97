"""Training-free selectors on the GPU choose and attend as on the CPU, and mean correction keeps its precision."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import baseline_cases as cases
from helpers import assert_as_accurate_as, make_blocks, make_qkv, sdpa_with_means
from seerattention.baselines import FlashPrefillV2, MInferenceExact, minference
from seerattention.ops import mean_corrected_attention


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (8, 2)])
@pytest.mark.parametrize("kind", ["random", "shared", "all"])
@pytest.mark.parametrize("lengths", [(64, 64), (1000, 1000), (130, 333)])
def test_mean_correction(dtype, heads, kv_heads, kind, lengths):
    q, k, v = make_qkv(*lengths, heads=heads, kv_heads=kv_heads, head_dim=128, batch=2, dtype=dtype, device="cuda")
    blocks = make_blocks(kind, q, k)
    exact = sdpa_with_means(q.double(), k.double(), v.double(), blocks)
    assert_as_accurate_as(mean_corrected_attention(q, k, v, blocks), sdpa_with_means(q, k, v, blocks), exact)


def test_mean_correction_takes_bounded_memory():
    """At 32K tokens: the means, one float32 copy of a chunk, and lists as masks; not the products of all queries."""
    q, k, v = make_qkv(32768, 32768, heads=32, kv_heads=8, head_dim=128, dtype=torch.bfloat16, device="cuda")
    blocks = FlashPrefillV2(0.5, 1, 1).select(inputs_of(q, k, v))
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = mean_corrected_attention(q, k, v, blocks)
    assert out.isfinite().all()
    assert torch.cuda.max_memory_allocated() - before < 3 * 2**30


def inputs_of(q, k, v):
    made = cases.make_inputs([1])
    return dataclasses.replace(made, q=q, k=k, v=v, scale=q.shape[-1] ** -0.5)


@pytest.mark.parametrize("start", [None, 77])
def test_selectors_do_as_on_the_cpu(monkeypatch, start):
    for name, value in {"LEAST_VERTICAL": 1, "LEAST_SLASH": 1, "FIRST_KEYS": 2, "NEAREST_DIAGONALS": 3}.items():
        monkeypatch.setattr(minference, name, value)
    inputs = cases.make_inputs([300], start=start, sharp=2.0)
    there = {name: getattr(inputs, name).cuda() for name in ("q", "k", "v", "q_pre", "k_pre", "cos", "sin")}
    moved = dataclasses.replace(inputs, **there)
    for selector in (FlashPrefillV2(0.5, 1, 1, mean_correction=True, block_size=32), MInferenceExact(4, 6)):
        blocks, on_gpu = selector.select(inputs), selector.select(moved)
        assert torch.equal(on_gpu.to_mask().cpu(), blocks.to_mask())
        expected, found = selector.attend(inputs, blocks), selector.attend(moved, on_gpu)
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-3, atol=1e-3)
    shares = [float(selector.share_read(each)) for each in (inputs, moved)]
    assert 0 < shares[0] < 1
    assert shares[0] == pytest.approx(shares[1])
