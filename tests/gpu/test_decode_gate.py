"""Decode gates on a GPU: scores against float32 on the CPU, lists of tokens against the reference, and no waiting."""

from __future__ import annotations

import math

import pytest
import torch

import seerattention as seer
from seerattention.gates import build_gate, select_by_token
from seerattention.ops import block_sparse_decode
from seerattention.ops.span import Span
from seerattention.policies import PublishedDecode, RelativeThreshold

HEAD_DIM, KV_HEADS, PROMPT = 128, 2, 1000
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
POLICIES = [
    seer.TokenBudget(256),
    seer.Threshold(0.02),
    seer.TopK(0.3),
    seer.TopP(0.8),
    RelativeThreshold(1.0),
    seer.Dense(),
    PublishedDecode(tokens=256),
    PublishedDecode(threshold=0.02),
]


FINE = {"k_pitch": 8, "merge_heads": False}


def make(block_size, group, tokens, dtype, **form):
    torch.manual_seed(0)
    gate = build_gate(
        seer.DecodeGateConfig(**form),
        block_size=block_size,
        num_heads=group * KV_HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
    )
    length = PROMPT + tokens
    q, k = (torch.randn(2, heads, length, HEAD_DIM).to(dtype) for heads in (group * KV_HEADS, KV_HEADS))
    angles = torch.arange(length)[:, None] * 1e4 ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    angles = torch.cat((angles, angles), -1)[None]
    return gate.to(dtype), q, k, angles.cos(), angles.sin()


def spans(tokens):
    """All rows alike, and rows with a token less."""
    lengths = torch.tensor([tokens, tokens - 1])
    start = torch.tensor([PROMPT, PROMPT])
    return Span(2, tokens, PROMPT + tokens), Span.of_rows(tokens, PROMPT + tokens, start=start, length=lengths)


def step(gate, q, k, cos, sin, span):
    """Scores of the tokens behind the prompt."""
    state, prompt, new = gate.new_state(), slice(0, PROMPT), slice(PROMPT, None)
    gate.encode_keys(k[:, :, prompt], cos[:, prompt], sin[:, prompt], state=state)
    keys = gate.encode_keys(k[:, :, new], cos[:, new], sin[:, new], state=state)
    queries = gate.encode_queries(q[:, :, new], cos[:, new], sin[:, new], span=span)
    if gate.query_window == 1:
        return gate.score(queries, keys, span=span)
    recent, end = gate.new_query_state(), slice(PROMPT - 70, PROMPT)
    recent.append(gate.encode_queries(q[:, :, end], cos[:, end], sin[:, end]))
    return gate.score_window(recent.append(queries), keys, span=span)


def compare(inputs, tokens, tolerance):
    """Scores on the GPU with those of float32 on the CPU."""
    dtype = inputs[1].dtype
    tensors = [x.cuda() for x in inputs[1:]]
    exact = [inputs[0].float(), *(x.float() for x in inputs[1:])]
    expected = [step(*exact, span) for span in spans(tokens)]
    gate = inputs[0].to("cuda", dtype)
    for span, wanted in zip(spans(tokens), expected, strict=True):
        found = step(gate, *tensors, span.to("cuda")).cpu()
        assert torch.equal(found == -math.inf, wanted == -math.inf)
        finite = wanted > -math.inf
        assert (found[finite] - wanted[finite]).abs().max() <= tolerance


@pytest.mark.parametrize("form", [{}, {"k_pitch": 8}, FINE], ids=["published", "k_pitch", "fine"])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("block_size", "group"), [(16, 1), (64, 4), (32, 8), (128, 7)])
@pytest.mark.parametrize("tokens", [1, 30])
@torch.inference_mode()
def test_scores(tokens, block_size, group, dtype, form):
    inputs = make(block_size, group, tokens, dtype, **form)
    compare(inputs, tokens, TOLERANCE[dtype])


@pytest.mark.parametrize("form", [{"query_window": 8}, {**FINE, "query_window": 64}], ids=["published", "fine"])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("block_size", "group"), [(16, 1), (64, 4), (128, 7)])
@pytest.mark.parametrize("tokens", [1, 30])
@torch.inference_mode()
def test_scores_of_the_last_tokens_together(tokens, block_size, group, dtype, form):
    """Each is a score less a sum of scores, so that the errors of two add."""
    inputs = make(block_size, group, tokens, dtype, **form)
    compare(inputs, tokens, 2 * TOLERANCE[dtype])


@pytest.mark.parametrize("form", [{}, FINE, {**FINE, "query_window": 8}], ids=["published", "fine", "window"])
@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("tokens", [1, 30])
@torch.inference_mode()
def test_lists_without_waiting(tokens, policy, form):
    """A step of decoding leaves the host ahead; the lists are those of the reference."""
    gate, q, k, cos, sin = (x.cuda() for x in make(64, 4, tokens, torch.bfloat16, **form))
    for span in spans(tokens):
        there, new = span.to("cuda"), slice(PROMPT, None)
        state = gate.new_state()
        gate.encode_keys(k[:, :, :PROMPT], cos[:, :PROMPT], sin[:, :PROMPT], state=state)
        recent, end = gate.new_query_state(), slice(PROMPT - 70, PROMPT)
        recent.append(gate.encode_queries(q[:, :, end], cos[:, end], sin[:, end]))
        for turn in range(2):  # kernels are compiled and loaded in the first turn
            earlier = state.lengths[0]
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error" if turn else "default")
            try:
                keys = gate.encode_keys(k[:, :, new], cos[:, new], sin[:, new], state=state)
                queries = gate.encode_queries(q[:, :, new], cos[:, new], sin[:, new], span=there)
                scores = gate.score_window(recent.append(queries), keys, span=there)
                blocks = select_by_token(policy, scores, block_size=64, span=there)
                out = block_sparse_decode(q[:, :, new].contiguous(), k, k, blocks)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            state.crop(earlier)
            recent.crop(tokens)
        expected = select_by_token(policy, scores.cpu(), block_size=64, span=span)
        assert torch.equal(blocks.to_mask().cpu(), expected.to_mask())
        assert out.isfinite().all()


@torch.inference_mode()
def test_the_first_block_of_a_sequence():
    """No block is complete: the softmax of the scores is no number, and the open block is read."""
    for policy in POLICIES:
        for span in (Span(2, 1, 5), Span(2, 5, 5)):
            scores = torch.full((2, KV_HEADS, span.queries, 1), -math.inf, device="cuda")
            assert select_by_token(policy, scores, block_size=64, span=span).to_mask().all()
