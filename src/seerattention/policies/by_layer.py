"""Relative thresholds that may be others in each layer of a model."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..ops.block_selection import select_threshold
from ..ops.indices import BlockIndices
from ..ops.span import Span
from .by_row import factors_by_row
from .policy import How, Policy, ScorePolicy, check_numbers

__all__ = ["ByLayer", "LayerThreshold"]


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
    _rules: tuple[LayerThreshold, ...]  # of each layer, or the one for all

    @abstractmethod
    def _curve(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Numbers of blocks that a row may see, and the factors there."""

    @abstractmethod
    def _floors(self) -> tuple[tuple[str, int], ...]:
        """What rows keep besides, by name."""

    def _set_layers(self) -> None:
        """Check the numbers, and find the rules of single layers once: layers ask in every forward."""
        object.__setattr__(self, "layers", check_numbers(type(self).__name__, "layers", self.layers))
        object.__setattr__(self, "_rules", tuple(self._times(times) for times in self.layers or (1.0,)))

    def _times(self, times: float) -> LayerThreshold:
        """The rule with its factors multiplied by that."""
        blocks, factors = self._curve()
        scaled = tuple(factor * times for factor in factors)
        return LayerThreshold(blocks, scaled, self._floors(), self.last_blocks_dense)

    def of_layer(self, layer: int) -> Policy:
        if not self.layers:
            return self
        if not 0 <= layer < len(self.layers):
            raise ValueError(f"{self} is for models of {len(self.layers)} layers, and this is layer {layer}")
        return self._rules[layer]

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
