"""Thresholds by head and row, and budgets, on a GPU: equal to the reference, no wait, no compilation by length."""

from __future__ import annotations

import pytest
import torch

from seerattention.ops import Span, select_threshold
from seerattention.policies import Budget

FLOORS = {"min_blocks": 4, "first_blocks": 1}
BUDGET = Budget(0.1, (1, 64, 512), (0.05, 4.0, 1.0))


def assert_identical(*args, **kwargs):
    actual, expected = (select_threshold(*args, implementation=name, **kwargs) for name in ("triton", "reference"))
    assert torch.equal(actual.counts, expected.counts)
    assert torch.equal(actual.to_mask(), expected.to_mask())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (17, 17), (5, 64), (256, 256), (40, 1000), (8, 4096)])
@pytest.mark.parametrize("kind", ["head and row", "head", "row"])
def test_equals_reference(shape, dtype, kind):
    num_keys = shape[1]
    probabilities = torch.randn(2, 3, *shape, device="cuda").mul(3).softmax(-1).to(dtype)
    bounds = 4 * torch.rand(3, num_keys + 7, device="cuda")
    bounds = {"head and row": bounds, "head": bounds[:, :1], "row": bounds[:1]}[kind]
    for floors in ({}, FLOORS):
        assert_identical(probabilities, bounds, relative=True, **floors)
    lengths = torch.tensor([num_keys * 64, max(1, num_keys * 64 - 65)], device="cuda")
    assert_identical(probabilities, bounds, relative=True, lengths=lengths, last_blocks_dense=2, **FLOORS)


def test_a_span_goes_by_positions():
    start, length = torch.tensor([[640, 64 * 30], [0, 64 * 10], [64 * 100, 64 * 27 - 5]], device="cuda").T
    span = Span.of_rows(64 * 30, 64 * 130, start=start, length=length)
    logits = torch.randn(3, 2, span.num_rows(64), 130, device="cuda") * 2
    probabilities = logits.softmax(-1)
    bounds = 4 * torch.rand(2, 130, device="cuda")
    assert_identical(probabilities, bounds, relative=True, span=span, **FLOORS)


def test_a_budget_waits_for_nothing_and_compiles_once():
    from seerattention.ops.block_selection.triton import select_kernel

    sizes = (200, 300, 500, 1000)
    inputs = [torch.randn(1, 4, num, num, device="cuda") * 2 for num in sizes]
    BUDGET.select(inputs[0], block_size=64)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = [BUDGET.select(logits, block_size=64) for logits in inputs]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for logits, blocks in zip(inputs, found, strict=True):
        expected = BUDGET.select(logits.cpu(), block_size=64)
        differ = blocks.to_mask().cpu() != expected.to_mask()
        assert differ.float().mean() < 1e-4  # softmax, and the factors, in their last bits
    compiled = select_kernel.device_caches[torch.cuda.current_device()][0]
    before = len(compiled)
    BUDGET.select(torch.randn(1, 4, 280, 280, device="cuda"), block_size=64)
    assert len(compiled) == before  # another length of a width that was there


def test_in_a_cuda_graph():
    logits = torch.randn(1, 2, 100, 100, device="cuda") * 2
    budget = Budget(0.1, (1, 50), (0.1, 3.0))
    expected = budget.select(logits, block_size=64)
    budget = Budget(0.1, (1, 50), (0.1, 3.000001))  # of which no table is kept yet
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        blocks = budget.select(logits, block_size=64)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(blocks.counts, expected.counts)
    assert budget.select(logits, block_size=64).density() == pytest.approx(expected.density())
