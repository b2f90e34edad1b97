"""Policies: what each keeps, what all guarantee, and the way through JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seerattention.baselines import Oracle, Selector
from seerattention.ops import BlockIndices, pooled_attention
from seerattention.policies import (
    Budget,
    Dense,
    Policy,
    RelativeThreshold,
    Threshold,
    TokenBudget,
    TopK,
    TopP,
    causal_softmax,
    policy_from_dict,
)

last = st.integers(0, 3)
policies = st.one_of(
    st.builds(Threshold, st.floats(0, 0.5), last),
    st.builds(TopK, st.floats(0.01, 1), last, st.booleans()),
    st.builds(TopP, st.floats(0.01, 1), last),
    st.builds(TokenBudget, st.integers(1, 2000), last),
    st.builds(RelativeThreshold, st.floats(0, 8), *[st.integers(0, 6)] * 3, last, st.sampled_from([1.0, 0.5, 0.0])),
    st.builds(
        Budget, st.just(0.1), st.just((1, 5, 9)), st.tuples(*[st.floats(0.1, 8)] * 3), *[st.integers(0, 6)] * 2, last
    ),
    st.just(Dense()),
)


def make_logits(num_rows, num_keys, batch=2, heads=2, seed=0):
    return torch.randn(batch, heads, num_rows, num_keys, generator=torch.Generator().manual_seed(seed)) * 2


@given(
    policy=policies, num_keys=st.integers(1, 20), missing=st.integers(0, 19), seed=st.integers(0, 99), data=st.data()
)
@settings(max_examples=200, deadline=None)
def test_every_policy_keeps_the_rules(policy, num_keys, missing, seed, data):
    """Valid rows hold their diagonal, ascending and causal; padded rows are empty; what is above is ignored."""
    num_rows = max(1, num_keys - missing)
    lengths = torch.tensor([data.draw(st.integers(1, num_keys * 32)), num_keys * 32])
    logits = make_logits(num_rows, num_keys, seed=seed)
    blocks = policy.select(logits, block_size=32, lengths=lengths)
    assert isinstance(blocks, BlockIndices)
    assert (blocks.block_size, blocks.num_key_blocks, blocks.num_rows) == (32, num_keys, num_rows)
    for b, length in enumerate(lengths.tolist()):
        for row in range(num_rows):
            query = num_keys - num_rows + row
            for head in range(2):
                entries = blocks.indices[b, head, row, : blocks.counts[b, head, row]].tolist()
                if query * 32 >= length:
                    assert entries == []
                else:
                    assert entries == sorted(set(entries))
                    assert entries[-1] == query
                    assert entries[0] >= 0
    causal = torch.ones(num_rows, num_keys, dtype=torch.bool).tril(num_keys - num_rows)
    hidden = logits.masked_fill(~causal, float("-inf"))
    assert torch.equal(policy.select(hidden, block_size=32, lengths=lengths).to_mask(), blocks.to_mask())


@given(policy=policies, num_keys=st.integers(2, 20), seed=st.integers(0, 99), data=st.data())
@settings(max_examples=100, deadline=None)
def test_padding_changes_nothing(policy, num_keys, seed, data):
    content = data.draw(st.integers(1, num_keys))
    logits = make_logits(num_keys, num_keys, batch=1, seed=seed)
    alone = policy.select(logits[:, :, :content, :content], block_size=32).to_mask()
    padded = policy.select(logits, block_size=32, lengths=torch.tensor([content * 32])).to_mask()
    assert torch.equal(padded[:, :, :content, :content], alone)
    assert not padded[:, :, content:].any()


def test_what_was_written_before_exponents_came_is_written_still():
    old = {"kind": "relative_threshold", "factor": 2.0, "min_blocks": 4, "first_blocks": 1, "dense_rows": 16}
    old["last_blocks_dense"] = 0
    assert RelativeThreshold(2.0).to_dict() == old
    assert policy_from_dict(old) == RelativeThreshold(2.0, exponent=1)


@given(policy=policies)
def test_json_round_trip(policy):
    assert policy_from_dict(json.loads(json.dumps(policy.to_dict()))) == policy


@pytest.mark.parametrize(
    "policy",
    [
        Threshold(0.01),
        TopK(0.3),
        TopK(0.3, uniform=True),
        TopP(0.9),
        TokenBudget(128),
        RelativeThreshold(2.0),
        RelativeThreshold(0.5, exponent=0.25),
        Budget(0.1, (1,), (2.0,)),
        Dense(),
    ],
)
def test_nan_and_empty_rows(policy):
    logits = make_logits(6, 6)
    logits[0] = float("nan")
    logits[1] = float("-inf")
    blocks = policy.select(logits, block_size=64)
    assert (blocks.counts >= 1).all()
    assert blocks.to_mask().diagonal(dim1=-2, dim2=-1).all()


@given(
    factor=st.floats(0, 6),
    floors=st.tuples(*[st.integers(0, 7)] * 3),
    exponent=st.sampled_from([1, 0.75, 0.5, 0.0]),
    num_keys=st.integers(1, 40),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_relative_threshold_by_hand(factor, floors, exponent, num_keys, seed):
    min_blocks, first_blocks, dense_rows = floors
    factor *= 0.3 if exponent < 1 else 1
    logits = make_logits(num_keys, num_keys, 1, 1, seed)
    policy = RelativeThreshold(factor, min_blocks, first_blocks, dense_rows, exponent=exponent)
    found = policy.select(logits, block_size=64).to_mask()
    for row in range(num_keys):
        probabilities = logits[0, 0, row, : row + 1].softmax(-1)
        wanted = {row} | {i for i in range(row) if probabilities[i] * (row + 1) ** exponent > factor}
        if len(wanted) < min_blocks:
            best = sorted(range(row), key=lambda i: (-float(probabilities[i]), i))
            wanted |= set(best[: min_blocks - 1])
        wanted |= set(range(min(first_blocks, row + 1)))
        if row < dense_rows:
            wanted = set(range(row + 1))
        assert set(found[0, 0, row].nonzero().flatten().tolist()) == wanted


def test_a_toy_policy_is_known_by_its_kind(monkeypatch):
    """Being defined is enough for JSON."""
    from seerattention.policies import policy as module

    monkeypatch.setattr(module, "KINDS", dict(module.KINDS))

    @dataclasses.dataclass(frozen=True)
    class Every(Policy):
        step: int
        kind = "toy_every"

        def select(self, logits, *, block_size, lengths=None, span=None):
            num_rows, num_keys = logits.shape[-2:]
            mask = (torch.arange(num_keys) % self.step == 0) | torch.ones(num_rows, num_keys).tril().triu().bool()
            return BlockIndices.from_mask(mask.expand(logits.shape), block_size)

    policy = policy_from_dict({"kind": "toy_every", "step": 3})
    assert policy == Every(3)
    assert policy_from_dict(policy.to_dict()) == policy
    assert policy.select(make_logits(7, 7), block_size=64).to_mask()[0, 0, 6].tolist() == [1, 0, 0, 1, 0, 0, 1]
    with pytest.raises(ValueError, match="two policies of kind 'toy_every'"):

        class Another(Policy):
            kind = "toy_every"


@pytest.mark.parametrize("density", ["0.1", "0.3", "0.05", "0.7", "0.001", "0.12"])
def test_topk_counts(density):
    """ceil(density * (i + 1)) of the decimal number, not of its rounded float: 0.1 of 30 blocks are 3."""
    num = 150
    counts = TopK(float(density)).select(make_logits(num, num, 1, 1), block_size=64).counts[0, 0].tolist()
    assert counts == [max(1, math.ceil(Fraction(density) * (row + 1))) for row in range(num)]
    chunk = TopK(float(density)).select(make_logits(20, num, 1, 1), block_size=64).counts[0, 0].tolist()
    assert chunk == counts[-20:]


@given(density=st.floats(0.02, 1), num=st.integers(64, 200))
@settings(max_examples=30, deadline=None)
def test_topk_density_is_close_to_the_one_asked_for(density, num):
    measured = TopK(density).select(make_logits(num, num, 1, 1), block_size=64).density()
    # Rounding up adds less than one block a row, of (num + 1) / 2 on average.
    assert density - 1e-9 <= measured <= density + 2 / (num + 1)


def test_topk_takes_the_best():
    logits = make_logits(20, 20, 1, 1)
    mask = TopK(0.2).select(logits, block_size=64).to_mask()[0, 0]
    row = logits[0, 0, 19, :19]
    assert set(mask[19].nonzero().flatten().tolist()) == {19, *row.topk(3).indices.tolist()}


@pytest.mark.parametrize("density", [0.1, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("num", [1, 5, 8, 40])
def test_uniform_topk_is_the_published_rule(density, num):
    logits = make_logits(num, num)
    keep = max(1, int((1 - math.sqrt(1 - density)) * num))
    causal = torch.ones(num, num, dtype=torch.bool).tril()
    masked = logits.masked_fill(~causal, torch.finfo(torch.float32).min)
    official = torch.zeros_like(causal).expand(logits.shape).clone()
    official.scatter_(-1, masked.topk(keep, dim=-1).indices, True)
    expected = (official & causal) | torch.eye(num, dtype=torch.bool)
    assert torch.equal(TopK(density, uniform=True).select(logits, block_size=64).to_mask(), expected)


def test_threshold_is_strict_on_the_causal_softmax():
    logits = make_logits(16, 16)
    probabilities = causal_softmax(logits)
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(2, 2, 16))
    assert (probabilities.triu(1) == 0).all()
    expected = (probabilities > 0.05) | torch.eye(16, dtype=torch.bool)
    assert torch.equal(Threshold(0.05).select(logits, block_size=64).to_mask(), expected)


@given(p=st.floats(0.05, 0.99), seed=st.integers(0, 20))
@settings(max_examples=30, deadline=None)
def test_topp_reaches_its_mass_and_no_more(p, seed):
    logits = make_logits(16, 16, seed=seed)
    probabilities = causal_softmax(logits)
    mask = TopP(p).select(logits, block_size=64).to_mask()
    mass = (probabilities * mask).sum(-1)
    assert (mass >= p - 1e-6).all()
    # Without its least block (the diagonal aside) a row falls short.
    optional = mask & ~torch.eye(16, dtype=torch.bool)
    least = torch.where(optional, probabilities, 2.0).amin(-1)
    assert (((mass - least) < p + 1e-6) | ~optional.any(-1)).all()


def test_token_budget():
    assert TokenBudget(129).select(make_logits(6, 6), block_size=64).counts[0, 0].tolist() == [1, 2, 3, 3, 3, 3]
    assert TokenBudget(129).select(make_logits(6, 6), block_size=128).counts[0, 0].tolist() == [1, 2, 2, 2, 2, 2]


@pytest.mark.parametrize("policy", [Dense(), TopK(1.0), TopK(1.0, uniform=True), TopP(1.0)])
def test_policies_that_keep_everything(policy):
    assert policy.select(make_logits(7, 9), block_size=64).density() == 1.0


@pytest.mark.parametrize(
    "policy", [Threshold(0.3, 2), TopK(0.1, 2), TopK(0.1, 2, uniform=True), TopP(0.1, 2), TokenBudget(1, 2)]
)
def test_last_blocks_dense(policy):
    """Counted from the last valid block of each batch row."""
    counts = policy.select(make_logits(8, 8), block_size=64, lengths=torch.tensor([512, 321])).counts
    assert counts[0, :, 6:].tolist() == [[7, 8]] * 2
    assert counts[1, :, 4:].tolist() == [[5, 6, 0, 0]] * 2
    assert (counts[0, :, 5] < 6).all()


@pytest.mark.parametrize(
    "make",
    [
        lambda: Threshold(1.0),
        lambda: Threshold(-0.1),
        lambda: Threshold(float("nan")),
        lambda: Threshold("0.1"),
        lambda: TopK(0.0),
        lambda: TopK(1.1),
        lambda: TopK(0.1, last_blocks_dense=-1),
        lambda: TopP(0.0),
        lambda: TopP(1.5),
        lambda: TokenBudget(0),
        lambda: TokenBudget(64.0),
        lambda: policy_from_dict({"kind": "top_q"}),
        lambda: policy_from_dict({"density": 0.1}),
        lambda: policy_from_dict({"kind": "top_k"}),
        lambda: policy_from_dict({"kind": "top_k", "density": 0.1, "ratio": 1}),
        lambda: policy_from_dict({"kind": "top_k", "density": 2}),
    ],
)
def test_wrong_values(make):
    with pytest.raises(ValueError):
        make()


def test_policy_cannot_be_made_without_select():
    with pytest.raises(TypeError):
        Policy()


def test_oracle_selects_by_the_true_maxima():
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 300, 32, generator=generator)
    k = torch.randn(2, 2, 300, 32, generator=generator)
    lengths = torch.tensor([300, 130])
    oracle = Oracle(Threshold(0.15), block_size=32)
    assert isinstance(oracle, Selector)
    blocks = oracle(q, k, layer=3, scale=0.5, lengths=lengths)
    target = pooled_attention(q, k, block_size=32, scale=0.5, lengths=lengths)
    rows = torch.arange(10)
    valid = (rows * 32 < lengths[:, None])[:, None, :, None]
    expected = ((target > 0.15) | torch.eye(10, dtype=torch.bool)) & valid
    differs = blocks.to_mask() != expected
    # The way through logarithm and softmax may move a probability by a rounding.
    assert (target[differs] - 0.15).abs().max() < 1e-6 if differs.any() else True
    assert 0 < blocks.density() < 0.9


def test_first_factors_of_a_calibration_reach_long_prompts():
    """At an exponent of 0 the factor is a probability: in a prompt of 64K tokens uniform attention gives 0.001."""
    from seerattention.measure.calibrate import _Factors

    for exponent in (0.0, 0.5, 1.0):
        tried = _Factors(RelativeThreshold(1.0, exponent=exponent), None).seen.policies
        relative = [policy.factor_of(1024) for policy in tried]
        assert min(relative) <= 2**-6
        assert max(relative) >= 2**8
