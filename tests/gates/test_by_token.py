"""Policies token by token, on the scores of a decode gate, against naive ones; and the lists in attention."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import seerattention as seer
from seerattention.gates import build_gate, select_by_token
from seerattention.ops import block_selection, block_sparse_decode
from seerattention.ops.span import LENGTH, START, Span
from seerattention.policies import Budget, PublishedDecode, RelativeThreshold, policy_from_dict
from token_policies import naive

BLOCK, HEADS = 16, 2
POLICIES = {
    "budget": seer.TokenBudget(3 * BLOCK),
    "small budget": seer.TokenBudget(1),
    "threshold": seer.Threshold(0.1),
    "share": seer.TopK(0.4),
    "mass": seer.TopP(0.7),
    "everything": seer.TopP(1.0),
    "relative": RelativeThreshold(1.0, min_blocks=3, dense_rows=2),
    "between": RelativeThreshold(0.4, min_blocks=2, dense_rows=2, exponent=0.5),
    "by position": Budget(0.3, (1, 6), (0.5, 1.5), min_blocks=3),
    "dense": seer.Dense(),
    "published budget": PublishedDecode(tokens=3 * BLOCK),
    "published threshold": PublishedDecode(threshold=0.1),
    "published mask": PublishedDecode(tokens=3 * BLOCK, first_block=False),
}
SPANS = {
    "one token": lambda: Span(2, 1, 150),
    "last of a block": lambda: Span(2, 1, 144),
    "first of a block": lambda: Span(2, 1, 145),
    "first block": lambda: Span(2, 1, 5),
    "candidates": lambda: Span(2, 21, 150),
    "whole": lambda: Span(1, 40, 40),
    "rows that differ": lambda: Span.of_rows(3, 150, start=torch.tensor([147, 14]), length=torch.tensor([3, 2])),
    "a row without a token": lambda: Span.of_rows(1, 50, start=torch.tensor([49, 70]), length=torch.tensor([1, 0])),
}


def make_scores(span):
    """As of a gate: -inf in blocks that are not complete at the token, NaN nowhere."""
    columns = span.num_key_blocks(BLOCK)
    scores = 2 * torch.randn(span.batch, HEADS, span.queries, columns, generator=torch.Generator().manual_seed(1))
    positions = span.column(START)[:, None] + torch.arange(span.queries)
    complete = torch.where(torch.arange(span.queries) < span.column(LENGTH)[:, None], (positions + 1) // BLOCK, 0)
    return scores.masked_fill((torch.arange(columns) >= complete[..., None])[:, None], -math.inf)


@pytest.mark.parametrize("kind", SPANS)
@pytest.mark.parametrize("name", POLICIES)
def test_each_token_reads_what_it_would_alone(name, kind):
    policy, span = POLICIES[name], SPANS[kind]()
    scores = make_scores(span)
    blocks = select_by_token(policy, scores, block_size=BLOCK, span=span)
    assert blocks.by_token
    assert blocks.span is span
    assert blocks.block_size == BLOCK
    mask, start, length = blocks.to_mask(), span.column(START).tolist(), span.column(LENGTH).tolist()
    assert mask.shape == scores.shape
    assert torch.equal(blocks.counts, mask.sum(-1))
    for row in range(span.batch):
        for token in range(span.queries):
            own = (start[row] + token) // BLOCK
            for head in range(HEADS):
                found = set(mask[row, head, token].nonzero().flatten().tolist())
                alone = scores[row, head, token, : own + 1].double().tolist()
                assert found == (naive(policy, alone, BLOCK) if token < length[row] else set())


@pytest.mark.parametrize("name", POLICIES)
def test_lists_go_into_attention_as_they_are(name):
    """Nothing looks at them again; attention reads each token's own keys too."""
    policy, span = POLICIES[name], Span(2, 5, 150)
    blocks = select_by_token(policy, make_scores(span), block_size=BLOCK, span=span)
    assert blocks.checked() is blocks
    q, k, v = (torch.randn(2, heads, tokens, 8) for heads, tokens in ((4, 5), (HEADS, 150), (HEADS, 150)))
    visible = blocks.to_mask()[..., torch.arange(150) // BLOCK] & torch.ones(5, 150, dtype=torch.bool).tril(145)
    expected = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=visible.repeat_interleave(2, 1), enable_gqa=True
    )
    torch.testing.assert_close(block_sparse_decode(q, k, v, blocks), expected)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of NumPy, which interprets the kernels
@pytest.mark.parametrize("select", ["select_threshold", "select_topp"])
def test_kernels_take_open_blocks_as_the_reference_does(select):
    """Scores of -inf at the diagonal, and rows that have no other: the softmax of those is no number."""
    span = Span.of_rows(1, 150, start=torch.tensor([3, 15, 20, 149, 0]), length=torch.tensor([1, 1, 1, 1, 0]))
    scores, function = make_scores(span), getattr(block_selection, select)
    masks = [
        function(scores, 0.3, block_size=BLOCK, span=span, softmax=True, implementation=name).to_mask()
        for name in ("reference", "triton")
    ]
    assert torch.equal(*masks)
    assert masks[0].sum((1, 2, 3)).tolist()[:2] == [HEADS, HEADS]


class NoReads(TorchDispatchMode):
    """Raises where the host asks for a value of a tensor, or for a shape that follows from values."""

    READS = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket.__name__ not in self.READS, func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("tokens", [1, 3])
@torch.no_grad()
def test_a_step_of_decoding_reads_no_values(tokens):
    """On a GPU nothing waits then; state and span know on the host how long rows are."""
    gate = build_gate(seer.DecodeGateConfig(), block_size=BLOCK, num_heads=4, num_kv_heads=HEADS, head_dim=8)
    q, k, table = (torch.randn(*shape, 47 + tokens, 8) for shape in ((2, 4), (2, HEADS), (1,)))
    state = gate.new_state()
    gate.encode_keys(k[:, :, :47], table[:, :47], table[:, :47], state=state)
    plain = Span(2, tokens, 47 + tokens)
    rows = Span.of_rows(tokens, 47 + tokens, start=torch.tensor([47, 47]), length=torch.tensor([tokens, tokens]))
    new = table[:, 47:]
    with NoReads():
        keys = gate.encode_keys(k[:, :, 47:], new, new, state=state)
        for span in (plain, rows):
            scores = gate.score(gate.encode_queries(q[:, :, 47:], new, new, span=span), keys, span=span)
            for policy in POLICIES.values():
                select_by_token(policy, scores, block_size=BLOCK, span=span)


def test_a_policy_of_ones_own_may_order_its_lists_as_it_likes():
    @dataclasses.dataclass(frozen=True)
    class Backwards(seer.Policy):
        def select(self, logits, *, block_size, lengths=None, span=None):
            num = logits.shape[-1]
            lists = torch.arange(num - 1, -1, -1, dtype=torch.int32).expand(logits.shape)
            counts = torch.full(logits.shape[:3], num, dtype=torch.int32)
            return seer.BlockIndices(lists, counts, num, block_size, span=span)

    for span in (Span(1, 1, 40), Span(1, 3, 40)):
        blocks = select_by_token(Backwards(), make_scores(span), block_size=BLOCK, span=span)
        assert blocks.to_mask().all()
        assert blocks.checked().indices[0, 0, 0].tolist() == [0, 1, 2]


def test_errors():
    span = Span(1, 1, 40)
    for policy in (seer.Threshold(0.1, last_blocks_dense=1), seer.TopK(0.5, uniform=True)):
        with pytest.raises(ValueError, match="token by token"):
            select_by_token(policy, make_scores(span), block_size=BLOCK, span=span)
    with pytest.raises(ValueError, match="got logits"):
        select_by_token(seer.Dense(), make_scores(span), block_size=BLOCK, span=Span(1, 1, 60))


def test_the_published_policy_is_checked_and_goes_through_a_dict():
    for policy in (PublishedDecode(tokens=128), PublishedDecode(threshold=4e-3, first_block=False)):
        assert policy_from_dict(policy.to_dict()) == policy
    for options in ({}, {"tokens": 64, "threshold": 0.1}, {"tokens": 0}, {"threshold": 1.5}, {"threshold": math.nan}):
        with pytest.raises(ValueError):
            PublishedDecode(**options)
    with pytest.raises(TypeError, match="first_block"):
        PublishedDecode(tokens=64, first_block=1)
