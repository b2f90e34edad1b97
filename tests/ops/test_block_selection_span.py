"""Selections and policies of a span: every row that holds a query selects what it selects alone, the others nothing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seerattention.ops import Span, dense_indices, select_threshold, select_topk, select_topp
from seerattention.ops.block_selection import causal_softmax
from seerattention.policies import Dense, Threshold, TokenBudget, TopK, TopP

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu covers it")
ROWS = st.lists(st.tuples(st.integers(0, 90), st.integers(0, 50)), min_size=1, max_size=3)  # start, length
POLICIES = [
    Threshold(0.15),
    Threshold(0.3, last_blocks_dense=1),
    TopK(0.4),
    TopK(0.3, last_blocks_dense=2),
    TopK(0.5, uniform=True),
    TopK(1.0),
    TopP(0.7),
    TokenBudget(33),
    Dense(),
]


def span_and_scores(rows, block_size, seed=0):
    start, length = torch.tensor(rows).T
    queries = max(1, int(length.max()))
    span = Span.of_rows(queries, max(queries, int((start + length).max())), start=start, length=length)
    generator = torch.Generator().manual_seed(seed)
    shape = len(rows), 2, span.num_rows(block_size), span.num_key_blocks(block_size)
    # What a row does not see may hold anything.
    scores = torch.randn(shape, generator=generator)
    return span, scores.masked_fill(~span.causal_blocks(block_size)[:, None], float("nan"))


def check_rows(select, span, scores, block_size):
    """``select(scores, span=...)`` against the same of each batch row alone, whose queries are the last of its keys."""
    blocks = select(scores, span)
    assert blocks.span is span
    assert (blocks.counts.transpose(1, 2)[~span.valid_rows(block_size)] == 0).all()
    mask = blocks.to_mask()
    assert torch.equal(blocks.counts, mask.sum(-1).int())
    for row, (start, length) in enumerate(zip(span.column(1).tolist(), span.column(2).tolist(), strict=True)):
        if length:
            alone = Span(1, length, start + length)
            size = alone.num_rows(block_size), alone.num_key_blocks(block_size)
            one = scores[row : row + 1, :, : size[0], : size[1]]
            assert torch.equal(mask[row : row + 1, :, : size[0], : size[1]], select(one, None, row).to_mask())


@settings(deadline=None, max_examples=30)
@given(rows=ROWS, block_size=st.sampled_from([8, 16]), policy=st.sampled_from(POLICIES), seed=st.integers(0, 99))
def test_policies(rows, block_size, policy, seed):
    span, scores = span_and_scores(rows, block_size, seed)
    check_rows(
        lambda logits, span, row=None: policy.select(logits, block_size=block_size, span=span), span, scores, block_size
    )


def check_selections(implementation, rows, block_size, last, seed):
    span, scores = span_and_scores(rows, block_size, seed)
    probabilities = causal_softmax(scores, block_size=block_size, span=span)
    keep = torch.randint(1, 6, (len(rows), scores.shape[2]), generator=torch.Generator().manual_seed(seed))
    common = {"block_size": block_size, "last_blocks_dense": last, "implementation": implementation}

    def topk(extra):
        def select(x, span, row=None):
            mine = keep if row is None else keep[row : row + 1, : x.shape[2]]
            return select_topk(x, mine, diagonal_extra=extra, span=span, **common)

        return select

    check_rows(topk(False), span, scores, block_size)
    check_rows(topk(True), span, scores, block_size)
    check_rows(lambda x, span, row=None: select_topp(x, 0.6, span=span, **common), span, probabilities, block_size)
    check_rows(lambda x, span, row=None: select_threshold(x, 0.2, span=span, **common), span, probabilities, block_size)


@settings(deadline=None, max_examples=20)
@given(rows=ROWS, block_size=st.sampled_from([8, 16]), last=st.integers(0, 2), seed=st.integers(0, 99))
def test_reference(rows, block_size, last, seed):
    check_selections("reference", rows, block_size, last, seed)


@pytest.mark.parametrize("last", [0, 1])
def test_triton_interpreted(last):
    pytest.importorskip("triton")
    check_selections("triton", [(5, 20), (40, 3), (24, 0)], 16, last, last)


def test_the_softmax_in_the_kernel():
    pytest.importorskip("triton")
    span, logits = span_and_scores([(5, 20), (40, 3)], 16)
    common = {"block_size": 16, "span": span, "softmax": True}
    for select, bound in ((select_threshold, 0.3), (select_topp, 0.5)):
        expected = select(logits, bound, implementation="reference", **common)
        assert torch.equal(select(logits, bound, implementation="triton", **common).to_mask(), expected.to_mask())


def test_lengths_and_the_span_that_they_mean():
    """A right-padded whole prompt, said in both ways."""
    lengths = torch.tensor([128, 70, 1])
    logits = torch.randn(3, 2, 4, 4)
    span = Span.of_padded(3, 128, 128, lengths)
    for policy in POLICIES:
        short = policy.select(logits, block_size=32, lengths=lengths)
        assert short.span is None
        assert torch.equal(short.to_mask(), policy.select(logits, block_size=32, span=span).to_mask())
    assert torch.equal(
        dense_indices(3, 2, 4, 4, block_size=32, span=span).counts,
        dense_indices(3, 2, 4, 4, block_size=32, lengths=lengths).counts,
    )


def test_what_does_not_fit_is_said():
    span, logits = span_and_scores([(5, 20), (40, 3)], 16)
    with pytest.raises(ValueError, match="got lengths and a span"):
        Threshold(0.1).select(logits, block_size=16, span=span, lengths=torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="2 batch rows of 3 query blocks and 3 key blocks of 16 tokens, got scores"):
        select_topp(logits[:, :, :2], 0.5, block_size=16, span=span)
    with pytest.raises(ValueError, match="the lists have 1 with 3 over 3"):
        dense_indices(1, 2, 3, 3, block_size=16, span=span)
