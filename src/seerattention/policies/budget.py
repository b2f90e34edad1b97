"""A density that is spent where attention is: how much, and where, apart.

A :class:`Budget` is a relative threshold whose factor follows from a row's position. :class:`Budgets` hold what was
fitted for a set of gates (:func:`seerattention.calibrate`), and give the budget of any density in between.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from torch import Tensor

from ..ops.indices import BlockIndices
from .by_layer import ByLayer
from .policy import How, check_count, check_number, check_numbers
from .rules import Dense

__all__ = ["Budget", "Budgets", "check_densities", "floor_of", "least_blocks"]

# Blocks that every row of a fitted budget keeps, the diagonal among them: by density, between these.
MIN_FLOOR, MAX_FLOOR = 2, 4
# Tokens of the shortest prompt that a budget is held to, where nothing else is asked for.
SHORTEST = 4096


@dataclass(frozen=True)
class Budget(ByLayer):
    """Keep the blocks that get more than ``factor(n)`` times what uniform attention gives, in a row that may see n.

    Under one factor for all rows (:class:`RelativeThreshold`) the density falls with the length. Here the factor is a
    function of the row's own position, fitted so that prompts of any length come out at the density asked for, while
    rows, heads and layers of the same position compete. It knows nothing of the length of the prompt, so a
    prompt in chunks reads what it reads in one shot.

    Attributes:
        density: what the factors were fitted for, in (0, 1); it is the factors that decide.
        blocks: numbers of blocks that a row may see, ascending, at which ``factors`` stand; in between, logarithms are
            interpolated by logarithms, and outside the nearest factor holds.
        factors: one for each of ``blocks``, above 0.
        min_blocks: a row keeps at least so many blocks, its best ones.
        first_blocks: the first this many blocks, the attention sink, are kept by every row.
        last_blocks_dense: the last this many query blocks of each sequence read everything.
        layers: what the factors are multiplied by in each layer of the model; (): the same in all.
    """

    density: float
    blocks: tuple[float, ...] = field(repr=False)
    factors: tuple[float, ...] = field(repr=False)
    min_blocks: int = 2
    first_blocks: int = 1
    last_blocks_dense: int = 0
    layers: tuple[float, ...] = field(default=(), repr=False)
    kind: ClassVar[str] = "budget"

    def __post_init__(self) -> None:
        _check_density("Budget", self.density)
        for name in ("blocks", "factors"):
            object.__setattr__(self, name, check_numbers("Budget", name, getattr(self, name)))
        if len(self.blocks) != len(self.factors) or not self.blocks:
            raise ValueError(
                f"Budget: needs a factor for each of blocks, got {len(self.factors)} for {len(self.blocks)}"
            )
        if self.blocks[0] < 1 or any(a >= b for a, b in itertools.pairwise(self.blocks)):
            raise ValueError(f"Budget: blocks must ascend from 1 or more, got {self.blocks}")
        for name in ("min_blocks", "first_blocks", "last_blocks_dense"):
            check_count(name, getattr(self, name))
        self._set_layers()

    def factor(self, blocks: float) -> float:
        """The factor of a row that may see so many blocks."""
        place = bisect.bisect_left(self.blocks, blocks)
        if place in (0, len(self.blocks)):
            return self.factors[min(place, len(self.blocks) - 1)]
        (x0, x1), (y0, y1) = (map(math.log, values[place - 1 : place + 1]) for values in (self.blocks, self.factors))
        return math.exp(y0 + (y1 - y0) * (math.log(blocks) - x0) / (x1 - x0))

    def _select(self, logits: Tensor, how: How) -> BlockIndices:
        return self._rules[0]._select(logits, how)

    def _curve(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        return self.blocks, self.factors

    def _floors(self) -> tuple[tuple[str, int], ...]:
        return (("min_blocks", self.min_blocks), ("first_blocks", self.first_blocks))


@dataclass(frozen=True)
class Budgets:
    """Budgets of a set of gates: for each of some densities, the factors that spend it (:class:`Budget`).

    Attributes:
        curves: fitted budgets by ascending density.
        default: the density of gates that are attached without one.
        tokens: the longest prompt that they were fitted on. Longer ones go by what its last rows did.
        block_size: tokens a block.
        shortest: tokens of the shortest prompt that they hold a density to; shorter ones are denser.
        layers: what the factors are multiplied by in each layer of the model, whatever the density; (): nothing.
    """

    curves: tuple[Budget, ...]
    default: float
    tokens: int
    block_size: int
    shortest: int = SHORTEST
    layers: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "curves", tuple(self.curves))
        object.__setattr__(self, "layers", check_numbers("Budgets", "layers", self.layers))
        if not self.curves or any(a.density >= b.density for a, b in itertools.pairwise(self.curves)):
            raise ValueError(f"Budgets: densities must ascend and be at least one, got {list(self.densities)}")
        for name in ("tokens", "block_size", "shortest"):
            check_count(name, getattr(self, name))
        self.policy(self.default)

    @property
    def densities(self) -> tuple[float, ...]:
        """What was fitted."""
        return tuple(curve.density for curve in self.curves)

    def holds_from(self, density: float) -> int:
        """Tokens of the shortest prompt whose total density is about that; shorter ones are denser."""
        return least_blocks(density, self.block_size, self.shortest) * self.block_size

    def policy(self, density: float | None = None) -> Budget | Dense:
        """The policy that spends a density (None: the default): between the two nearest of those that were fitted.

        Raises:
            ValueError: a density outside of what was fitted.
        """
        density = self.default if density is None else density
        check_number("a budget", "density", density)
        if density == 1:
            return Dense()
        low, high = self.densities[0], self.densities[-1]
        if not low <= density <= high:
            raise ValueError(
                f"these gates have budgets for densities from {low:g} to {high:g} (and 1, dense), got {density:g}; "
                f"seerattention.calibrate(model, batches, densities=({density:g},)) fits others"
            )
        place = bisect.bisect_left(self.densities, density)
        above = self.curves[place]
        if above.density == density:
            return replace(above, layers=self.layers) if self.layers else above
        below = self.curves[place - 1]
        share = math.log(density / below.density) / math.log(above.density / below.density)
        blocks = tuple(sorted({*below.blocks, *above.blocks}))
        factors = tuple(below.factor(n) ** (1 - share) * above.factor(n) ** share for n in blocks)
        return Budget(density, blocks, factors, below.min_blocks, below.first_blocks, layers=self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Plain types only; :meth:`from_dict` is the inverse."""
        curves = [curve.to_dict() for curve in self.curves]
        data = {"default": self.default, "tokens": self.tokens, "block_size": self.block_size, "curves": curves}
        newer = {"shortest": self.shortest} if self.shortest != SHORTEST else {}
        return {**data, **newer, **({"layers": list(self.layers)} if self.layers else {})}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Budgets:
        """Inverse of :meth:`to_dict`.

        Raises:
            ValueError, TypeError, KeyError: what is no such dict.
        """
        curves = []
        for curve in data["curves"]:
            arguments = dict(curve)
            if arguments.pop("kind", None) != Budget.kind:
                raise ValueError(f"budgets hold policies of kind {Budget.kind!r}, got {curve!r}")
            curves.append(Budget(**arguments))
        newer = {name: data[name] for name in ("shortest", "layers") if name in data}
        return cls(tuple(curves), data["default"], data["tokens"], data["block_size"], **newer)


def least_blocks(density: float, block_size: int, shortest: int = SHORTEST) -> int:
    """Blocks of the shortest prompt that a budget is held to: at least ``shortest`` tokens, and rows that may read
    three blocks each on average. The diagonal and the sink alone are two, so that shorter prompts cannot be so sparse.
    """
    return max(-(-shortest // block_size), math.ceil(6.4 / density))


def floor_of(density: float, block_size: int, shortest: int = SHORTEST) -> int:
    """How many blocks every row keeps: about two thirds of what rows of the shortest prompt may read on average, but
    the diagonal and another one at least, and not more than four, which is enough."""
    return min(max(round(0.31 * density * least_blocks(density, block_size, shortest)), MIN_FLOOR), MAX_FLOOR)


def check_densities(densities: Any) -> tuple[float, ...]:
    """Targets of a fit, ascending.

    Raises:
        ValueError, TypeError: not a sequence of different densities in (0, 1).
    """
    if not isinstance(densities, Sequence) or isinstance(densities, str) or not densities:
        raise TypeError(f"densities must be a sequence of numbers, got {densities!r}")
    for density in densities:
        _check_density("densities", density)
    if len(set(densities)) != len(densities):
        raise ValueError(f"densities must differ, got {densities}")
    return tuple(sorted(float(density) for density in densities))


def _check_density(owner: str, density: Any) -> None:
    check_number(owner, "density", density)
    if not 0 < density < 1:
        raise ValueError(f"{owner}: density must lie between 0 and 1, got {density}")
