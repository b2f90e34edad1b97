"""Which target suits a model: what blocks chosen by its true maps change in what it says next.

A needle is the largest probability of its tile; attention that one query spreads over a block is none. Models that read
plain text have more of the second: ranked by their largest probabilities, blocks lose twice as much of SmolLM2's
perplexity as ranked by row masses, while models that were trained to look things up lose as much either way, and gates
that learn row masses forget look-ups there (``docs/experiments.md``). So the largest probability, the target of the
papers, is left only where it loses plainly more.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .. import hf
from ..baselines import Oracle
from ..blocks import BlockIndices
from ..hf.architectures import find_decoder, gated_indices
from ..hf.prompts import check_batch
from ..measure.factors import KeptByFactor
from ..measure.output import DenseOutput
from ..policies import RelativeThreshold
from ..selectors import LayerInputs
from .config import TARGETS

__all__ = ["TargetChoice", "choose_target"]

# At which maps are compared: where true maps of SmolLM2 differ by two points of perplexity. Of shorter prompts a little
# more than what every row keeps, up to where maps lose next to nothing, whatever they are ranked by.
_DENSITY, _ABOVE_FLOORS, _MOST = 0.15, 1.2, 0.25
# How far from it a map may be, as a share, after how many tries; and what is too far to compare at all.
_NEAR, _TRIES, _FAR = 0.03, 3, 0.1
# How many times as much the largest probability must lose, in nats: 1.50 to 1.75 were seen on SmolLM2, and 0.73 to 1.07
# on two models that look things up (of perplexity 2.1, 1.04 and 0.9). To take row masses by mistake costs more.
_PLAINLY = 1.3
# Factors that are tried, in half octaves.
_FACTORS = tuple(2.0 ** (step / 2) for step in range(-10, 17))


@dataclass(frozen=True)
class TargetChoice:
    """What was chosen, and why.

    Attributes:
        target: one of ``TARGETS``.
        lost: by target, the divergence in nats of the next token's distribution from the dense one's, when each layer
            reads the blocks that its true map ranks first.
        density: of blocks, at which that was.
    """

    target: str
    lost: Mapping[str, float]
    density: float


@torch.no_grad()
def choose_target(model: nn.Module, batches: Sequence[Mapping[str, Any]], *, block_size: int = 64) -> TargetChoice:
    """Which of ``TARGETS`` gates of prompts should learn, by what true maps ranked so lose of the model's own output.

    It takes one dense forward of the batches and two to six along true maps, which cost about a third more. Layers
    that get no gates are dense.

    Args:
        model: to which nothing is attached, and which has an LM head; it is left so.
        batches: as :func:`~seerattention.hf.prompts.check_batch` takes them, a few of the length that is trained at.
        block_size: tokens a block.

    Raises:
        ValueError: no batch, or too short ones: it takes about 64 blocks; the model has no LM head, or what it says is
            not finite; both maps cannot be brought to one density; something is attached already.
    """
    prompts = [check_batch(batch, model) for batch in batches]
    if not prompts:
        raise ValueError("a target is chosen on prompts, got none")
    _check_floors(prompts, block_size)
    decoder: Any = find_decoder(model)
    count = len(decoder.layers)
    seen = _Seen(block_size, gated_indices(decoder.config, count))
    with _attached(model, Oracle(RelativeThreshold(1.0), block_size)), hf.observe(model, seen):
        output = DenseOutput(model, prompts)
    if not seen.observed:
        raise ValueError("no layer that gets a gate read these prompts as a whole")
    density = _compared_at(max(kept.least for kept in seen.kept.values()), block_size)
    lost = {target: _lost(model, output, seen, target, density, count) for target in TARGETS}
    chosen = "row_mass" if lost["max"] > _PLAINLY * lost["row_mass"] else "max"
    return TargetChoice(chosen, lost, density)


def _check_floors(prompts: Sequence[Mapping[str, Any]], block_size: int) -> None:
    """Before any forward: whether what every row keeps at least leaves a choice."""
    floors = KeptByFactor(RelativeThreshold(1.0), (1e9,))
    for prompt in prompts:
        batch, tokens = prompt["input_ids"].shape
        blocks = -(-tokens // block_size)
        floors.add(torch.zeros(batch, 1, blocks, blocks), 0, block_size, None)
    _compared_at(floors.least, block_size)


def _compared_at(least: float, block_size: int) -> float:
    """The density at which targets are compared where every row keeps so much.

    Raises:
        ValueError: too much.
    """
    found = max(_DENSITY, _ABOVE_FLOORS * least)
    if found > _MOST:
        raise ValueError(
            f"prompts are too short to compare targets: what every row keeps is {least:.2f} of the blocks; use about "
            f"{64 * block_size:,} tokens or more"
        )
    return found


def _lost(model: nn.Module, output: DenseOutput, seen: _Seen, target: str, density: float, count: int) -> float:
    """By true maps of that density. Other layers' sparsity changes what a layer's map is, so that it is tried."""
    wanted = density
    others = () if len(seen.layers) == count else tuple(1.0 if i in seen.layers else 1e-9 for i in range(count))
    for _ in range(_TRIES):
        policy = RelativeThreshold(seen.kept[target].factor(wanted), layers=others)
        with _attached(model, Oracle(policy, seen.block_size, target)):
            lost, read = output.changed()
        found = [read.per_layer[layer] for layer in seen.observed]
        had = sum(found) / len(found)
        if abs(had / density - 1) < _NEAR:
            break
        wanted *= density / had
    if abs(had / density - 1) > _FAR:
        raise ValueError(
            f"true maps ranked by {target} keep {had:.3f} of the blocks where {density:.3f} was asked for, so that "
            "targets cannot be compared"
        )
    return lost


@contextmanager
def _attached(model: nn.Module, selector: Oracle) -> Iterator[None]:
    """A model with a selector, and none of it afterwards."""
    hf.attach(model, selector=selector, min_context=0)
    try:
        yield
    finally:
        hf.detach(model)


class _Seen:
    """What each factor keeps of true maps, by target, in the layers that get gates."""

    def __init__(self, block_size: int, layers: Sequence[int]) -> None:
        self.block_size, self.layers = block_size, frozenset(layers)
        self.observed: set[int] = set()
        self.kept = {target: KeptByFactor(RelativeThreshold(1.0), _FACTORS) for target in TARGETS}

    def __call__(self, inputs: LayerInputs, blocks: BlockIndices | None) -> None:
        if inputs.layer not in self.layers:
            return
        self.observed.add(inputs.layer)
        for target, kept in self.kept.items():
            scores = Oracle(block_size=self.block_size, reduce=target).scores(inputs)
            kept.add(scores, inputs.layer, self.block_size, inputs.lengths)
