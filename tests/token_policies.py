"""What policies choose for one token, spelled out on lists of floats."""

from __future__ import annotations

import math

import seerattention as seer
from seerattention.policies import Budget, PublishedDecode, RelativeThreshold


def probabilities(scores: list[float]) -> list[float]:
    """The softmax of scores, 0 where one is -inf, also where all are."""
    finite = [x for x in scores if x > -math.inf]
    total = sum(math.exp(x - max(finite)) for x in finite)
    return [math.exp(x - max(finite)) / total if x > -math.inf else 0.0 for x in scores]


def naive(policy: seer.Policy, scores: list[float], block_size: int) -> set[int]:
    """Blocks that a token reads, from its scores of the blocks up to its own, which comes last."""
    own = len(scores) - 1
    best = sorted(range(own), key=lambda block: -scores[block])
    if isinstance(policy, PublishedDecode):
        scores = [x if x > -math.inf else 0.0 for x in scores]
        first = {0} if policy.first_block else set()
        if policy.tokens is not None:
            ranked = sorted(range(own + 1), key=lambda block: -scores[block])
            return {own, *ranked[: policy.tokens // block_size]} | first
        return {own, *(b for b, x in enumerate(probabilities(scores)) if x > policy.threshold)} | first
    if isinstance(policy, seer.TokenBudget):
        return {own, *best[: -(-policy.tokens // block_size) - 1]}
    if isinstance(policy, seer.TopK):
        return {own, *best[: max(1, math.ceil(policy.density * (own + 1) - 1e-9)) - 1]}
    if isinstance(policy, seer.Dense) or policy == seer.TopP(1.0):
        return set(range(own + 1))
    shares = probabilities(scores)
    if isinstance(policy, Budget):
        policy = RelativeThreshold(policy.factor(own + 1), policy.min_blocks, policy.first_blocks, dense_rows=0)
    if isinstance(policy, RelativeThreshold):
        if own < policy.dense_rows:
            return set(range(own + 1))
        above = {block for block in range(own) if shares[block] * (own + 1) > policy.factor_of(own + 1)}
        return {own} | above | set(range(policy.first_blocks)) | set(best[: max(0, policy.min_blocks - 1)])
    if isinstance(policy, seer.Threshold):
        return {own, *(block for block in range(own) if shares[block] > policy.threshold)}
    chosen, mass = {own}, shares[own]
    for block in best:
        if mass >= policy.p:
            break
        chosen.add(block)
        mass += shares[block]
    return chosen
