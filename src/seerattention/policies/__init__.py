"""Policies: which blocks a query block reads, given the block logits of a gate or of another scorer.

A policy is a small frozen dataclass. ``policy.select(logits, block_size=...)`` gives :class:`BlockIndices`;
``policy.to_dict()`` and :func:`policy_from_dict` take it through JSON. To add one, subclass :class:`Policy` and give
it a ``kind``.
"""

from __future__ import annotations

from ..ops.block_selection import causal_softmax
from .budget import Budget, Budgets
from .policy import KINDS, Policy, policy_from_dict, read_kind
from .rules import Dense, PublishedDecode, RelativeThreshold, Threshold, TokenBudget, TopK, TopP

__all__ = [
    "KINDS",
    "Budget",
    "Budgets",
    "Dense",
    "Policy",
    "PublishedDecode",
    "RelativeThreshold",
    "Threshold",
    "TokenBudget",
    "TopK",
    "TopP",
    "causal_softmax",
    "policy_from_dict",
    "read_kind",
]
