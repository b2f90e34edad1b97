"""A sparse layer as torch.compile and CUDA graphs run it: the ops wait for nothing and may be recorded."""

from __future__ import annotations

import pytest
import torch

import seerattention as seer
from helpers import make_qkv
from seerattention.ops import block_pooling, block_sparse_attention, dispatch, pooled_attention
from seerattention.ops.dense import dense_attention_with_lse

POLICIES = [seer.TopK(0.3), seer.Threshold(0.05), seer.TopP(0.7), seer.TokenBudget(256), seer.Dense()]


@pytest.fixture(params=["triton", "hopper"])
def implementation(request, monkeypatch):
    """Every attention kernel that this GPU can run."""
    if request.param == "hopper" and (reason := dispatch.hopper_unusable(torch.device("cuda", 0))):
        pytest.skip(reason)
    monkeypatch.setenv(dispatch.HOPPER_VARIABLE, str(int(request.param == "hopper")))
    return request.param


def make_layer(policy):
    def layer(q, k, v):
        queries, keys = block_pooling(q, ("avg",)), block_pooling(k, ("max",)).repeat_interleave(2, 1)
        scores = (queries @ keys.mT).float()
        blocks_of = scores.shape[-1]
        future = torch.ones(blocks_of, blocks_of, dtype=torch.bool, device=q.device).triu(1)
        blocks = policy.select(scores.masked_fill(future, float("-inf")), block_size=64)
        return block_sparse_attention(q, k, v, blocks)

    return layer


def inputs(length, seed):
    return [
        x.cuda() for x in make_qkv(length, length, heads=4, kv_heads=2, head_dim=64, dtype=torch.bfloat16, seed=seed)
    ]


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_cuda_graph(policy, implementation):
    """One recording, replayed on other inputs, equals the ops called one by one."""
    layer, static = make_layer(policy), inputs(1000, 0)
    with torch.inference_mode():
        layer(*static)  # compiles the kernels
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = layer(*static)
        for seed in (1, 2):
            fresh = inputs(1000, seed)
            for old, new in zip(static, fresh, strict=True):
                old.copy_(new)
            out.fill_(float("nan"))
            graph.replay()
            assert torch.equal(out, layer(*fresh))


def check_replay(step, static, fresh):
    """A recorded ``step`` gives, for other inputs, what the step itself gives."""
    with torch.inference_mode():
        step(*static)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = step(*static)
        for old, new in zip(static, fresh, strict=True):
            old.copy_(new)
        graph.replay()
        for a, b in zip(found, step(*fresh), strict=True):
            torch.testing.assert_close(a, b)


def test_cuda_graph_of_the_target():
    check_replay(lambda q, k: (pooled_attention(q, k),), inputs(700, 0)[:2], inputs(700, 1)[:2])


def test_cuda_graph_of_the_target_given_the_lse():
    """The target of a distillation step: the forward that returns its log-sum-exp, and the second pass."""

    def step(q, k, v):
        out, lse = dense_attention_with_lse(q, k, v)
        return out, pooled_attention(q, k, lse=lse)

    check_replay(step, inputs(700, 0), inputs(700, 1))


def test_compiled_layer(implementation):
    """Inductor around the ops: one graph, same result for several lengths."""
    layer = make_layer(seer.TopK(0.3))
    torch._dynamo.reset()
    function = torch.compile(layer, fullgraph=True, dynamic=True)
    with torch.inference_mode():
        for length in (500, 1000, 1301):
            qkv = inputs(length, length)
            # Sums may be taken in another order, and then a block on the edge of the choice be another one.
            torch.testing.assert_close(function(*qkv), layer(*qkv), rtol=2e-2, atol=2e-2)
