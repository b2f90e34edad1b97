"""Fit budgets: which factor, by the position of a row, spends a density; for many densities from one pass.

Rows, heads and layers of one position compete under one factor, so all that is needed of a model's prompts is how many
blocks lie above any value of ``p n``, for each number n of blocks that a row may see. That is a histogram of
logarithms a row, whatever the number of prompts: 19 MB at 128K tokens, four times (see :class:`Seen`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..blocks import BlockIndices
from ..hf.state import state_of
from ..policies import Budget, Budgets, causal_softmax
from ..policies.budget import MAX_FLOOR, MIN_FLOOR, SHORTEST, floor_of, least_blocks
from ..selectors import LayerInputs
from .layers import LAYERS_DENSITY, fit_layers
from .passes import NOTHING_SEEN, put_in_force, read_prompts

DENSITIES = (0.05, 0.07, 0.1, 0.14, 0.2, 0.3, 0.5)
"""What is fitted where nothing else is asked for."""

DEFAULT_DENSITY = 0.3
"""That of gates which are attached without one; ``docs/experiments.md`` says why."""

# What is aimed at, of the density asked for: texts differ, and what was asked for is a promise.
_AIM = 0.97

# Bins of log2(p n), and the last one: blocks that every row keeps.
_LOWEST, _HIGHEST, _STEPS = -16, 20, 32
_BINS = (_HIGHEST - _LOWEST) * _STEPS + 1
_ALWAYS = _BINS - 1
# Best blocks of a row that are told apart: what floors may keep besides the diagonal.
_RANKS = MAX_FLOOR - 1
# Scores looked at at a time.
_SLICE = 1 << 24
# The power of n with which the factor grows within the shortest prompt: with 1, a plain threshold, later rows find too
# little; with 0, a relative one, short rows lose more perplexity than they save. The second is for those who ask for
# longer prompts than the shortest that is usual, and so for the text as a whole.
_GROWTH, _LONG_GROWTH = 0.25, 0.5
# Ranges of rows with a factor of their own, in an octave, and rounds that fit them together.
_RANGES, _ROUNDS = 2, 4


class Seen:
    """Histograms of ``p n`` by row, of all layers with a gate, heads and prompts.

    Beside that of all blocks there is one for the best of each row, for the second best and so on: floors take these.

    Args:
        layers: what factors are multiplied by in each layer, so that ``p n`` counts as so much less there; (): nothing.
    """

    def __init__(self, layers: Sequence[float] = ()) -> None:
        self.layers = layers
        self.block_size = 0
        self.tokens = 0
        self._counts: dict[torch.device, Tensor] = {}

    def __call__(self, inputs: LayerInputs, blocks: BlockIndices | None) -> None:
        if inputs.gate is None:
            return
        logits = inputs.gate_logits(masked=False)
        batch, heads, rows, keys = logits.shape
        self.block_size = inputs.gate.block_size
        self.tokens = max(self.tokens, inputs.q.shape[2])
        ends = None if inputs.lengths is None else -(-inputs.lengths // self.block_size)
        counts = self._room(logits.device, rows)
        step = max(1, _SLICE // (batch * heads * keys))
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            self._count(counts, logits[:, :, start:stop, : keys - rows + stop], start, ends, inputs.layer)

    def _count(self, counts: Tensor, logits: Tensor, start: int, ends: Tensor | None, layer: int) -> None:
        rows, keys = logits.shape[2:]
        own = torch.arange(start, start + rows, device=logits.device)[:, None]
        block = torch.arange(keys, device=logits.device)
        values = causal_softmax(logits) * ((own + 1) / (self.layers[layer] if self.layers else 1.0))
        known = block <= own
        if ends is not None:
            known = known & (own < ends[:, None, None, None])
        always = (block == own) | (block < Budget.first_blocks)
        best = values.masked_fill(block >= own, -1.0).topk(min(_RANKS, keys), dim=-1)
        chosen = (best.values >= 0) & (best.indices >= Budget.first_blocks)
        bins = _bins(values).masked_fill_(always, _ALWAYS)
        self._add(counts[0, start : start + rows], bins, known.expand(values.shape))
        bins = _bins(best.values)
        for rank in range(bins.shape[-1]):
            mine = slice(rank, rank + 1)
            valid = chosen if ends is None else chosen & (own < ends[:, None, None, None])
            self._add(counts[rank + 1, start : start + rows], bins[..., mine], valid[..., mine])

    @staticmethod
    def _add(counts: Tensor, bins: Tensor, known: Tensor) -> None:
        rows = counts.shape[0]
        bins = bins + torch.arange(rows, device=bins.device)[:, None] * _BINS
        counts += torch.bincount(bins[known], minlength=rows * _BINS).view(rows, _BINS)

    def _room(self, device: torch.device, rows: int) -> Tensor:
        known = self._counts.get(device)
        if known is None or known.shape[1] < rows:
            more = torch.zeros(1 + _RANKS, rows, _BINS, dtype=torch.int64, device=device)
            if known is not None:
                more[:, : known.shape[1]] += known
            self._counts[device] = more
        return self._counts[device]

    def above(self, min_blocks: int) -> Tensor:
        """Float64 ``[rows, bins + 1]`` on the CPU: blocks of each row in each bin and all above it, where every row
        keeps ``min_blocks``.

        Raises:
            ValueError: nothing was seen.
        """
        if not self._counts:
            raise ValueError(NOTHING_SEEN)
        rows = max(counts.shape[1] for counts in self._counts.values())
        total = torch.zeros(1 + _RANKS, rows, _BINS, dtype=torch.float64)
        for counts in self._counts.values():
            total[:, : counts.shape[1]] += counts.cpu()
        floor = total[1:min_blocks].sum(0)
        total = total[0] - floor
        total[:, _ALWAYS] += floor.sum(-1)
        return nn.functional.pad(total.flip(-1).cumsum(-1).flip(-1), (0, 1))


def _bins(values: Tensor) -> Tensor:
    return ((values.clamp(min=2.0**_LOWEST).log2() - _LOWEST) * _STEPS).clamp(max=_ALWAYS - 1).long()


class _Curve:
    """One density's factors by position, on the way to be right."""

    def __init__(self, above: Tensor, density: float, first: int, growth: float) -> None:
        self.above, self.growth = above, growth
        rows = above.shape[0]
        self.wanted = density * above[:, 0]
        self.seen = torch.arange(1, rows + 1, dtype=torch.float64)
        edges = [0, first]
        while (edge := round(first * 2 ** ((len(edges) - 1) / _RANGES))) <= rows:
            edges.append(edge)
        edges[-1] = rows
        self.ranges = list(itertools.pairwise(edges))
        # Within the first range the factor grows a little with n, which leaves more to short rows; the other ranges are
        # around knots of their own.
        self.knots = [1.0, float(first)]
        self.knots += [math.sqrt(start * stop) for start, stop in self.ranges[1:]]
        self.logs = torch.zeros(len(self.knots), dtype=torch.float64)

    def fit(self) -> bool:
        """Whether the density can be reached by the least number of rows."""
        start, stop = self.ranges[0]
        least = self._shift(0, self.growth * self.seen.log()[start:stop])
        if least is None:
            return False
        self.logs[0], self.logs[1] = least, least + self.growth * math.log(self.knots[1])
        for place in range(1, len(self.ranges)):
            start, stop = self.ranges[place]
            found = self._shift(place, torch.zeros(stop - start, dtype=torch.float64))
            self.logs[place + 1] = self.logs[place] if found is None else found
        for _ in range(_ROUNDS):
            curve = self._curve()
            for place, (start, stop) in enumerate(self.ranges):
                shift = self._shift(place, curve[start:stop])
                if shift is not None:
                    self.logs[slice(0, 2) if place == 0 else slice(place + 1, place + 2)] += shift
        return True

    def _curve(self) -> Tensor:
        """Logarithms of the factors of all rows."""
        budget = self.budget(0.5)
        return torch.tensor([math.log(budget.factor(float(n))) for n in self.seen.tolist()], dtype=torch.float64)

    def _shift(self, place: int, logs: Tensor) -> float | None:
        """What to add to the logarithms of the factors of a range, so that its rows keep what is wanted; None: they
        cannot keep so little."""
        start, stop = self.ranges[place]
        above, wanted = self.above[start:stop], float(self.wanted[start:stop].sum())
        if float(above[:, _ALWAYS].sum()) > wanted:
            return None
        low, high = -40.0, 40.0
        for _ in range(60):
            middle = (low + high) / 2
            if self._kept(above, logs + middle) > wanted:
                low = middle
            else:
                high = middle
        return high

    @staticmethod
    def _kept(above: Tensor, logs: Tensor) -> float:
        place = ((logs / math.log(2) - _LOWEST) * _STEPS).clamp(0, _ALWAYS)
        index = place.floor().long().clamp(max=_ALWAYS - 1)[:, None]
        share = (place[:, None] - index).clamp(0, 1)
        return float((above.gather(1, index) * (1 - share) + above.gather(1, index + 1) * share).sum())

    def budget(self, density: float, *, min_blocks: int = MIN_FLOOR) -> Budget:
        """Behind the last knot its factor stays: scores of rows that gates have not been trained on spread more, and a
        factor that went on falling would spend up to a fifth more than was asked for at twice the length."""
        return Budget(density, tuple(self.knots), tuple(self.logs.exp().tolist()), min_blocks)


@torch.no_grad()
def fit_budgets(
    model: nn.Module,
    prompts: Sequence[Mapping[str, Any]],
    densities: Sequence[float],
    *,
    passes: int,
    strict: bool,
    shortest: int = SHORTEST,
    by_layer: bool = False,
) -> Budgets:
    """Fit budgets for the gates of an attached model, which is left with the default one in force in all layers.

    Args:
        model: attached with gates.
        prompts: as :func:`~seerattention.hf.prompts.check_batch` gives them.
        densities: ascending.
        passes: the first goes along a dense forward, others along the sparse one of the default density found so far.
        strict: raise for densities that prompts of this length cannot have; False: leave them out.
        shortest: tokens of the shortest prompt that is held to its density.
        by_layer: find out what a block is worth in each layer (:func:`~seerattention.measure.layers.fit_layers`), at
            the density nearest to :data:`LAYERS_DENSITY`, and fit again with factors by layer.

    Raises:
        ValueError: no gated layer read a prompt as a whole, or a density (strict), or each, is out of reach; or as
            :func:`~seerattention.measure.layers.fit_layers`, after which budgets without factors by layer are in force.
    """
    state, alike = state_of(model), _fit(model, prompts, densities, strict, shortest, passes=passes)
    state.budgets = alike
    if not by_layer:
        return alike
    try:
        put_in_force(model, alike.policy(_nearest(alike.densities, LAYERS_DENSITY)))
        layers = fit_layers(model, prompts)
        if layers:
            state.budgets = _fit(model, prompts, densities, strict, shortest, passes=2, layers=layers)
    finally:
        put_in_force(model, state.budgets.policy())  # those for all layers alike where that failed
    return state.budgets


def _fit(
    model: nn.Module,
    prompts: Sequence[Mapping[str, Any]],
    densities: Sequence[float],
    strict: bool,
    shortest: int,
    *,
    passes: int,
    layers: tuple[float, ...] = (),
) -> Budgets:
    """Budgets, whose default is then in force. With ``layers`` no pass is dense: the policy in force is near."""
    budgets = None
    for _ in range(max(1, passes)):
        seen = Seen(layers)
        read_prompts(model, prompts, seen, densely=budgets is None and not layers)
        budgets = _budgets(seen, densities, strict, shortest)
        put_in_force(model, budgets.policy())
    assert budgets is not None
    return budgets


def _budgets(seen: Seen, densities: Sequence[float], strict: bool, shortest: int) -> Budgets:
    curves, wrong, size = [], [], seen.block_size or 64
    growth = _GROWTH if shortest <= SHORTEST else _LONG_GROWTH
    for density in densities:
        floor, first = floor_of(density, size, shortest), least_blocks(density, size, shortest)
        above = seen.above(floor)
        curve = _Curve(above, _AIM * density, first, growth) if first <= above.shape[0] else None
        if curve is None or not curve.fit():
            wrong.append(f"{density:g} (needs {first * size} tokens)")
            continue
        curves.append(curve.budget(density, min_blocks=floor))
    if not curves or (wrong and strict):
        raise ValueError(
            f"prompts of up to {seen.tokens} tokens are too short to fit budgets of density {', '.join(wrong)}: the "
            "diagonal and the first block, which every row keeps, leave no choice; use longer ones or higher densities"
        )
    default = _nearest([curve.density for curve in curves], DEFAULT_DENSITY)
    return Budgets(tuple(curves), default, seen.tokens, seen.block_size, shortest, tuple(seen.layers))


def _nearest(densities: Sequence[float], wanted: float) -> float:
    return min(densities, key=lambda density: abs(math.log(density / wanted)))
