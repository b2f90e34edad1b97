"""``calibrate``: find the threshold that reaches a target density on a model's own prompts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..blocks import BlockIndices, causal_block_mask
from ..hf.attach import set_policy
from ..hf.contexts import dense, observe
from ..hf.phases import PREFILL
from ..hf.prompts import check_batch, run_prompt
from ..hf.state import gated_layers, state_of
from ..policies import Threshold, causal_softmax
from ..selectors import LayerInputs

# The histogram of block probabilities is logarithmic from 1 down to this; smaller ones share the last bin.
_SMALLEST = 1e-8
_LOG_SMALLEST = math.log(_SMALLEST)
_BINS = 1 << 14
_STEPS = 60


class _Probabilities:
    """How many blocks of all layers, heads and rows have a probability above any value, besides those always kept: the
    diagonal, and all causal blocks of the last ``last_blocks_dense`` rows of each prompt."""

    def __init__(self, last_blocks_dense: int) -> None:
        self.last_blocks_dense = last_blocks_dense
        self.counts = torch.zeros(_BINS, dtype=torch.int64)
        self.always = 0
        self.causal = 0

    def __call__(self, inputs: LayerInputs, blocks: BlockIndices | None) -> None:
        if inputs.gate is None:
            return
        probabilities = causal_softmax(inputs.gate_logits())
        batch, heads, rows, keys = probabilities.shape
        causal = causal_block_mask(rows, keys, 0, probabilities.device).expand(batch, 1, rows, keys)
        off_diagonal = causal_block_mask(rows, keys, -1, probabilities.device).expand(batch, 1, rows, keys)
        index = torch.arange(rows, device=probabilities.device)
        ends = torch.full((batch,), rows, device=probabilities.device)
        if inputs.lengths is not None:
            ends = -(-inputs.lengths // inputs.gate.block_size)
            causal = causal & (index < ends[:, None])[:, None, :, None]
        open_rows = (index < ends[:, None] - self.last_blocks_dense)[:, None, :, None]
        chosen = causal & off_diagonal & open_rows
        kept = probabilities.masked_select(chosen).clamp(min=_SMALLEST)
        bins = (kept.log() / _LOG_SMALLEST * _BINS).long().clamp(0, _BINS - 1)
        self.counts += torch.bincount(bins, minlength=_BINS).cpu()
        self.always += int(causal.sum() - chosen.sum()) * heads
        self.causal += int(causal.sum()) * heads

    def density(self, threshold: float) -> float:
        """Density of ``Threshold(threshold)``: what is always kept, and everything above the threshold."""
        edge = math.log(max(threshold, _SMALLEST)) / _LOG_SMALLEST * _BINS
        above = int(self.counts[: int(edge)].sum())
        return (self.always + above) / self.causal


@torch.no_grad()
def calibrate(
    model: nn.Module, batches: Iterable[Mapping[str, Any] | Tensor], *, density: float, passes: int = 2
) -> Threshold:
    """Find the one ``Threshold`` for all layers whose density over the given prompts is ``density``, and set it.

    Density counts the layers that have a gate, over all heads, rows and prompts. The first pass reads the gates along a
    dense forward; later ones along the sparse forward of the threshold found so far, which is what the model will see.

    Args:
        model: a model attached with gates (a selector must not be set).
        batches: prompts of the length that matters: mappings as in :func:`~seerattention.hf.prompts.check_batch`, or
            tensors of input_ids ``[B, T]``. A threshold is good for about that length only: at a fixed threshold,
            longer prompts come out sparser.
        density: the target, in (0, 1).
        passes: forward passes over the batches.

    Returns:
        The policy, which is then in force for every layer; policies of single layers are taken away. It keeps the
        ``last_blocks_dense`` of the policy that was in force for the model, whose blocks count towards the density.

    Raises:
        ValueError: no gates, no batches, prompts that no gated layer reads as a whole, or a density below that of the
            blocks that are always kept.
        TypeError: a batch of the wrong type.
    """
    if not 0 < density < 1:
        raise ValueError(f"density must lie between 0 and 1, got {density}")
    state = state_of(model)
    if state.phases[PREFILL].selector is not None or not any(True for _ in gated_layers(state)):
        raise ValueError("calibrate needs a model attached with gates and without a selector")
    prompts = [
        check_batch({"input_ids": batch} if isinstance(batch, Tensor) else batch, model)  # before any work
        for batch in batches
    ]
    if not prompts:
        raise ValueError("calibrate needs at least one batch")
    last_blocks_dense = getattr(state.policy, "last_blocks_dense", 0)
    policy = None
    for _ in range(max(1, passes)):
        seen = _Probabilities(last_blocks_dense)
        with observe(model, seen):
            for prompt in prompts:
                with dense(model) if policy is None else nullcontext():
                    run_prompt(model, prompt)
        if not seen.causal:
            raise ValueError(
                "calibrate saw no prompt in any gated layer; prompts must be longer than one token and not longer than "
                "the model's sliding window"
            )
        least = seen.density(1.0)
        if density < least:
            raise ValueError(
                f"density {density} is out of reach on these prompts: the blocks that are always kept (the diagonal"
                + (f", and all of the last {last_blocks_dense} rows" if last_blocks_dense else "")
                + f") alone are {least:.4f}; use longer prompts or a higher density"
            )
        policy = Threshold(_threshold(seen, density), last_blocks_dense=last_blocks_dense)
        set_policy(model, policy, layers={layer.index: None for layer in state.layers})
    assert policy is not None
    return policy


def _threshold(seen: _Probabilities, density: float) -> float:
    """Bisection, in log space because probabilities of blocks span many orders of magnitude."""
    low, high = _SMALLEST, 1.0
    for _ in range(_STEPS):
        middle = (low * high) ** 0.5
        if seen.density(middle) > density:
            low = middle
        else:
            high = middle
    return min(high, 1.0 - 1e-6)
