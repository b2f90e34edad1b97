"""What a block more is worth in each layer: how much nearer it brings the model's output to that of dense attention.

One factor for all layers spends blocks where attention is. Layers differ by tens of times in what the same density of
blocks changes in what the model says next. So one layer after the other is made sparse, all others dense, at the factor
in force and at twice that: what is lost more, over the density that is saved. All others must be dense: beside errors
of other layers, some seem to lose nothing, those of look-ups among them (``docs/experiments.md``).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..hf.attach import set_policy
from ..hf.state import gated_layers, state_of
from ..policies import Budget, Dense, RelativeThreshold
from .output import DenseOutput

LAYERS_DENSITY = 0.1
"""At which layers are compared, or the nearest that is fitted: where blocks are few, it matters which."""

# What the factor is multiplied by to see what a layer loses with fewer blocks.
_NUDGE = 2.0
# Exponent of a layer's worth in its factor, and bounds of the logarithm of worth over the mean: two points of a curve
# say little of what is far away.
_EXPONENT, _BOUND = -0.5, 1.4
# Of the largest worth, below which none is told from noise.
_LEAST = 0.01


@torch.no_grad()
def fit_layers(model: nn.Module, prompts: Sequence[Mapping[str, Any]]) -> tuple[float, ...]:
    """What the factor of the policy in force is best multiplied by in each layer, 1 on geometric average.

    The policy stays in force. It takes one forward of each prompt, and two more for each layer with a gate.

    Args:
        model: attached with gates, a ``Budget`` or a ``RelativeThreshold`` in force; it has an LM head.
        prompts: as :func:`~seerattention.hf.prompts.check_batch` gives them.

    Returns:
        One number for each layer of the model, 1 where there is no gate: the lower, the more blocks it gets. None at
        all, with a warning, where a higher factor leaves out no block of any layer.

    Raises:
        ValueError: another policy is in force, the model has no LM head or changes its logits in a way that is not
            known here, or what it says is not finite.
    """
    state = state_of(model)
    policy, own, count = state.policy, {layer.index: layer.policy for layer in state.layers}, len(state.layers)
    if not isinstance(policy, Budget | RelativeThreshold):
        raise ValueError(f"factors by layer are for a Budget or a RelativeThreshold, got {policy!r}")
    output, worth = DenseOutput(model, prompts, "leave by_layer out (--no-by-layer)"), {}
    try:
        for layer in gated_layers(state):
            found = []
            for times in (1.0, _NUDGE):
                others = {index: Dense() if index != layer.index else None for index in range(count)}
                set_policy(model, replace(policy, layers=(times,) * count), layers=others)
                lost, seen = output.changed()
                found.append((lost, seen.per_layer[layer.index]))
            (less, dense_as), (more, sparse_as) = found
            if dense_as - sparse_as > 1e-4 * dense_as:  # else its blocks are floors, and there is nothing to compare
                worth[layer.index] = (more - less) / (dense_as - sparse_as)
    finally:
        set_policy(model, policy, layers=own)
    if not worth:
        warnings.warn(
            "seerattention: no factors by layer were fitted, as no layer reads fewer blocks of these prompts with a "
            "higher factor: prompts must be longer than min_context (attach with min_context=0) and than what is kept "
            "anyway",
            UserWarning,
            stacklevel=2,
        )
        return ()
    return _multipliers(worth, count)


def _multipliers(worth: Mapping[int, float], count: int) -> tuple[float, ...]:
    """From the worth of a unit of density in some layers."""
    top = max(worth.values(), default=0.0)
    if top <= 0:
        return (1.0,) * count
    logs = {layer: math.log(max(value, _LEAST * top)) for layer, value in worth.items()}
    mean = sum(logs.values()) / len(logs)
    found = {layer: _EXPONENT * min(max(log - mean, -_BOUND), _BOUND) for layer, log in logs.items()}
    middle = sum(found.values()) / len(found)
    return tuple(math.exp(found[layer] - middle) if layer in found else 1.0 for layer in range(count))
