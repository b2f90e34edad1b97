"""Relative thresholds whose factors follow from a row's position, as a table on the device, and from the layer."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..ops.block_selection import select_threshold
from ..ops.block_selection.shares import kept_for_device
from ..ops.indices import BlockIndices
from ..ops.span import Span
from .policy import How, Policy, ScorePolicy, check_number

# Tables are made for at least so many rows, and twice as many whenever that is too few.
LEAST_ROWS = 1024


def factors_by_row(blocks: Sequence[float], factors: Sequence[float], columns: int, device: torch.device) -> Tensor:
    """The factor of each row, kept: float32 ``[1, N]`` on the device, N at least ``columns``.

    Args:
        blocks: numbers of blocks that a row may see, ascending, at which ``factors`` stand; in between, logarithms are
            interpolated by logarithms, and outside the nearest factor holds. None of the first is below 1.
        factors: one for each of ``blocks``, above 0.
        columns: key blocks that are chosen from.
        device: of the scores.
    """
    rows = max(LEAST_ROWS, 1 << (columns - 1).bit_length())
    places, values = tuple(blocks), tuple(factors)
    if device.type != "cuda":
        return _kept_table(places, values, rows, device)
    return kept_for_device(lambda: _make_table(places, values, rows, device), device, places, values, rows)


@torch.no_grad()
def _make_table(blocks: tuple[float, ...], factors: tuple[float, ...], rows: int, device: torch.device) -> Tensor:
    """On the device, from numbers that go along with the launches: nothing is copied there, and nothing waits."""
    seen = torch.arange(1, rows + 1, dtype=torch.float32, device=device).log_()
    table = torch.full_like(seen, math.log(factors[0]))
    for (x0, x1), (y0, y1) in zip(itertools.pairwise(blocks), itertools.pairwise(factors), strict=True):
        low, high = math.log(x0), math.log(x1)
        table += (seen.clamp(low, high) - low) * (math.log(y1 / y0) / (high - low))
    return table.exp_()[None]


# A model has few policies at a time, and a table is small: 8 KB at 128K tokens.
_kept_table = functools.lru_cache(maxsize=64)(_make_table)


@dataclass(frozen=True)
class LayerThreshold(ScorePolicy):
    """A relative threshold as it is in one layer: what :class:`ByLayer` policies give for it.

    Attributes:
        blocks, factors: as of :func:`factors_by_row`.
        floors: ``min_blocks`` and others of :func:`~seerattention.ops.select_threshold`, by name.
        last_blocks_dense: the last this many query blocks of each sequence read everything.
    """

    blocks: tuple[float, ...]
    factors: tuple[float, ...]
    floors: tuple[tuple[str, int], ...]
    last_blocks_dense: int = 0

    def table(self, columns: int, device: torch.device) -> Tensor:
        """As :func:`factors_by_row` gives it."""
        return factors_by_row(self.blocks, self.factors, columns, device)

    def _select(self, logits: Tensor, how: How) -> BlockIndices:
        table = self.table(logits.shape[-1], logits.device)
        return select_threshold(logits, table, softmax=True, relative=True, **{**dict(self.floors), **how})


class ByLayer(ScorePolicy):
    """A relative threshold that may be another one in each layer: its factors, times the number of the layer.

    A model asks :meth:`of_layer`; the policy itself chooses where there is one rule for all layers. Layers differ
    widely in what a block more in them does to the output (``docs/experiments.md``); the numbers come from
    :func:`seerattention.calibrate`.
    """

    layers: tuple[float, ...]

    def _curve(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Numbers of blocks that a row may see, and the factors there."""
        raise NotImplementedError

    def _floors(self) -> tuple[tuple[str, int], ...]:
        """What rows keep besides, by name."""
        raise NotImplementedError

    def _set_layers(self) -> None:
        """Check the numbers, and find the rules of single layers once: layers ask in every forward."""
        name = type(self).__name__
        if not isinstance(self.layers, list | tuple):
            raise TypeError(f"{name}: layers must be a sequence of numbers, got {type(self.layers).__name__}")
        for value in self.layers:
            check_number(name, "layers", value)
            if value <= 0:
                raise ValueError(f"{name}: layers must be above 0, got {value}")
        object.__setattr__(self, "layers", tuple(float(value) for value in self.layers))
        if not self.layers:
            return
        (blocks, factors), floors = self._curve(), self._floors()
        own = [
            LayerThreshold(blocks, tuple(factor * times for factor in factors), floors, self.last_blocks_dense)
            for times in self.layers
        ]
        object.__setattr__(self, "_own", tuple(own))

    def of_layer(self, layer: int) -> Policy:
        if not self.layers:
            return self
        if not 0 <= layer < len(self.layers):
            raise ValueError(f"{self} is for models of {len(self.layers)} layers, and this is layer {layer}")
        own: LayerThreshold = self._own[layer]  # type: ignore[attr-defined]
        return own

    def tensors(self, layer: int, columns: int, device: torch.device) -> tuple[Tensor, ...]:
        own = self.of_layer(layer)
        return (own.table(columns, device),) if isinstance(own, LayerThreshold) else ()

    def select(
        self, logits: Tensor, *, block_size: int, lengths: Tensor | None = None, span: Span | None = None
    ) -> BlockIndices:
        """As of every policy.

        Raises:
            ValueError: it is not the same in all layers, so that :meth:`of_layer` is to be asked.
        """
        if self.layers:
            raise ValueError(f"{self} is not the same in all layers; policy.of_layer(layer) chooses in one")
        return super().select(logits, block_size=block_size, lengths=lengths, span=span)

    def to_dict(self) -> dict[str, Any]:
        """As other policies, without ``layers`` where there are none: results are found again by what they say."""
        told = super().to_dict()
        if not told["layers"]:
            del told["layers"]
        return told
