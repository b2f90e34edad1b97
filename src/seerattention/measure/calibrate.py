"""``calibrate``: fit budgets, or find the one threshold that reaches a density, on a model's own prompts."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeVar, overload

import torch
from torch import Tensor, nn

from ..blocks import BlockIndices, causal_block_mask
from ..hf.phases import PREFILL
from ..hf.prompts import check_batch
from ..hf.state import gated_layers, state_of
from ..policies import Budgets, Policy, RelativeThreshold, Threshold, causal_softmax
from ..policies.budget import SHORTEST, check_densities
from ..selectors import LayerInputs
from .budgets import DENSITIES, fit_budgets
from .factors import KeptByFactor
from .layers import fit_layers
from .passes import NOTHING_SEEN, ToldPrompts, put_in_force, read_prompts

# The histogram of block probabilities is logarithmic from 1 down to this; smaller ones share the last bin.
_SMALLEST = 1e-8
_LOG_SMALLEST = math.log(_SMALLEST)
_BINS = 1 << 14
_STEPS = 60

Found_co = TypeVar("Found_co", bound=Policy, covariant=True)
Found = TypeVar("Found", bound=Policy)


class _Pass(Protocol[Found_co]):
    """Sees the layers of one pass over the prompts, and says which policy has a density on them."""

    @property
    def causal(self) -> int:
        """Causal blocks of all layers with a gate, heads and rows."""

    def __call__(self, inputs: LayerInputs, blocks: BlockIndices | None) -> None: ...

    def policy(self, density: float) -> Found_co:
        """Raises ValueError if what is always kept is more than that."""


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

    def policy(self, density: float) -> Threshold:
        least = self.density(1.0)
        if density < least:
            last = self.last_blocks_dense
            raise ValueError(
                f"density {density} is out of reach on these prompts: the blocks that are always kept (the diagonal"
                + (f", and all of the last {last} rows" if last else "")
                + f") alone are {least:.4f}; use longer prompts or a higher density"
            )
        return Threshold(self._threshold(density), last_blocks_dense=self.last_blocks_dense)

    def _threshold(self, density: float) -> float:
        """Bisection, in log space because probabilities of blocks span many orders of magnitude."""
        low, high = _SMALLEST, 1.0
        for _ in range(_STEPS):
            middle = (low * high) ** 0.5
            if self.density(middle) > density:
                low = middle
            else:
                high = middle
        return min(high, 1.0 - 1e-6)


class _Factors:
    """What a ``RelativeThreshold`` keeps of what gates score, with each of some factors.

    Args:
        given: whose factor is to be found.
        found: what the pass before has found; None: there was none, and factors of a wide range are tried.
    """

    def __init__(self, given: RelativeThreshold, found: RelativeThreshold | None) -> None:
        policy = given if found is None else found
        if found is None:
            # Below the exponent of 1 factors shrink with the number of blocks that a row may see, a thousand at most.
            least = -12 - round(20 * (1 - given.exponent))
            factors = [2.0 ** (step / 2) for step in range(least, 17)]
        else:
            factors = [found.factor * 2.0 ** (step / 8) for step in range(-8, 9)]
        self.tried, self.seen = policy, KeptByFactor(policy, factors)

    @property
    def causal(self) -> int:
        return self.seen.causal

    def __call__(self, inputs: LayerInputs, blocks: BlockIndices | None) -> None:
        if inputs.gate is not None:
            self.seen.add(inputs.gate_logits(), inputs.layer, inputs.gate.block_size, inputs.lengths)

    def policy(self, density: float) -> RelativeThreshold:
        if density < self.seen.least:
            raise ValueError(
                f"density {density} is out of reach on these prompts: what {self.tried} always keeps is "
                f"{self.seen.least:.4f}; use longer prompts, a higher density, or smaller floors"
            )
        return dataclasses.replace(self.tried, factor=self.seen.factor(density))


def _one_policy(
    model: nn.Module,
    prompts: Sequence[Mapping[str, Any]],
    density: float,
    begin: Callable[[Found | None], _Pass[Found]],
    passes: int,
    found: Found | None = None,
) -> Found:
    """The policy of a density for all rows and layers, which is then in force.

    Args:
        begin: what looks at a pass, from what was found by the pass before; None: it is the first.
        passes: the first goes along a dense forward, others along the sparse one of what was found so far.
        found: what is in force and near; no pass is dense then.
    """
    for _ in range(max(1, passes)):
        seen = begin(found)
        read_prompts(model, prompts, seen, densely=found is None)
        if not seen.causal:
            raise ValueError(NOTHING_SEEN)
        found = seen.policy(density)
        put_in_force(model, found)
    assert found is not None
    return found


def readings(model: nn.Module, *, by_layer: bool) -> int:
    """How many times :func:`calibrate` reads each prompt to fit budgets, in its usual two passes."""
    layers = sum(1 for _ in gated_layers(state_of(model)))
    return 2 + (3 + 2 * layers if by_layer else 0)


def _prompts(
    model: nn.Module, batches: Iterable[Mapping[str, Any] | Tensor], advance: Callable[[int], None] | None
) -> Sequence[Mapping[str, Any]]:
    """All of them, checked before any work."""
    state = state_of(model)
    if state.phases[PREFILL].selector is not None or not any(True for _ in gated_layers(state)):
        raise ValueError("calibrate needs a model attached with gates and without a selector")
    prompts = [check_batch({"input_ids": batch} if isinstance(batch, Tensor) else batch, model) for batch in batches]
    if not prompts:
        raise ValueError("calibrate needs at least one batch")
    return prompts if advance is None else ToldPrompts(prompts, advance)


@overload
def calibrate(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any] | Tensor],
    *,
    densities: Sequence[float] | None = None,
    passes: int = 2,
    shortest: int = SHORTEST,
    by_layer: bool = False,
    advance: Callable[[int], None] | None = None,
) -> Budgets: ...


@overload
def calibrate(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any] | Tensor],
    *,
    density: float,
    passes: int = 2,
    policy: RelativeThreshold | None = None,
    by_layer: bool = False,
    advance: Callable[[int], None] | None = None,
) -> Threshold | RelativeThreshold: ...


@torch.no_grad()
def calibrate(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any] | Tensor],
    *,
    densities: Sequence[float] | None = None,
    density: float | None = None,
    passes: int = 2,
    policy: RelativeThreshold | None = None,
    shortest: int = SHORTEST,
    by_layer: bool = False,
    advance: Callable[[int], None] | None = None,
) -> Budgets | Threshold | RelativeThreshold:
    """Fit the budgets of a model's gates: what spends a density at every length of prompt.

    After it ``seer.set_policy(model, density=0.1)`` works, ``seer.save_gates`` stores the budgets with the gates, and
    whoever loads these can say ``seer.attach(model, gates, density=0.1)``. The budget of the default density is then in
    force for every layer; policies of single layers are taken away. The first pass reads the gates along a dense
    forward; later ones along the sparse forward found so far, which is what the model will see. What is kept meanwhile
    are histograms, of a size that does not grow with the number of prompts.

    With ``density`` it finds, and puts in force, the one :class:`~seerattention.Threshold` for all rows and layers that
    has this density, or the factor of the ``RelativeThreshold`` given as ``policy``: good for the length of these
    prompts only, as longer ones come out sparser. Such a policy keeps the ``last_blocks_dense`` of the one in force
    before, whose blocks count towards the density.

    Density counts the layers that have a gate, over all heads, rows and prompts.

    Args:
        model: a model attached with gates (a selector must not be set).
        batches: prompts of the length that matters, for budgets the longest one: mappings as in
            :func:`~seerattention.hf.prompts.check_batch`, or tensors of input_ids ``[B, T]``. A few do.
        densities: what to fit budgets for, in (0, 1); those in between are interpolated. A budget holds for prompts of
            4,096 tokens or more, of densities below 0.1 from 8,192 (0.05) or 6.4 / density blocks on. None: from 0.05
            to 0.5, as far as the prompts are long enough.
        density: the target of one threshold for everything, in (0, 1), instead.
        passes: forward passes over the batches; always two for a ``RelativeThreshold``.
        policy: whose factor is to be found for ``density``; what it keeps besides counts towards the density.
        shortest: tokens of the shortest prompt that budgets hold to a density, 4,096 or more. Holding it in short
            prompts takes blocks from the first rows, which long prompts pay for, too: whoever reads long ones only asks
            for that (16,384, say), and loses less (``docs/experiments.md``). Shorter prompts are denser then.
        by_layer: also find out what a block is worth in each layer (:func:`~seerattention.measure.layers.fit_layers`),
            and give factors of their own to layers: less is lost at the same density. It takes three forwards of each
            prompt and two for each layer with a gate, besides; of ``densities`` and of a ``policy``.
        advance: called with 1 for each prompt that has been read (for progress bars).

    Returns:
        The budgets; or the policy that ``density`` asks for.

    Raises:
        ValueError: no gates, no batches, prompts that no gated layer reads as a whole, both density and densities, or
            a density below that of the blocks that are always kept in prompts of this length; a ``shortest`` below
            4,096; with ``by_layer`` a model without an LM head, after which budgets without factors by layer are in
            force.
        TypeError: a batch of the wrong type.
    """
    if density is not None and densities is not None:
        raise ValueError("calibrate takes densities, to fit budgets, or one density, for a threshold; got both")
    if density is None:
        if policy is not None:
            raise ValueError("a policy is for a single density: calibrate(model, batches, density=..., policy=...)")
        asked = DENSITIES if densities is None else check_densities(densities)
        if not isinstance(shortest, int) or shortest < SHORTEST:
            raise ValueError(f"shortest must be a whole number of tokens, {SHORTEST} or more, got {shortest!r}")
        prompts, strict = _prompts(model, batches, advance), densities is not None
        how: dict[str, Any] = {"passes": passes, "strict": strict, "shortest": shortest, "by_layer": by_layer}
        return fit_budgets(model, prompts, asked, **how)
    if shortest != SHORTEST:
        raise ValueError("shortest is for budgets (densities), and one density is for the length of the prompts alone")
    if not 0 < density < 1:
        raise ValueError(f"density must lie between 0 and 1, got {density}")
    state, prompts = state_of(model), _prompts(model, batches, advance)
    if policy is not None:
        if not isinstance(policy, RelativeThreshold):
            raise TypeError(f"calibrate finds the factor of a RelativeThreshold, got {policy!r}")
        begin = functools.partial(_Factors, policy)
        found = _one_policy(model, prompts, density, begin, passes=2)
        if not by_layer:
            return found
        layers = fit_layers(model, prompts)
        if not layers:
            return found
        found = dataclasses.replace(found, layers=layers)
        put_in_force(model, found)
        return _one_policy(model, prompts, density, begin, passes=2, found=found)
    if by_layer:
        raise ValueError("a Threshold is the same in all layers; by_layer is for budgets, or policy=RelativeThreshold")
    last_blocks_dense = getattr(state.policy, "last_blocks_dense", 0)
    return _one_policy(model, prompts, density, lambda found: _Probabilities(last_blocks_dense), passes)
