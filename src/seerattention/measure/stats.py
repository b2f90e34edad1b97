"""How much of the attention map an attached model really read, from the lists that the kernels got."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..blocks import BlockIndices, first_query_block
from ..hf.forward import RECORD, watch
from ..hf.state import state_of
from ..ops.indices import read_lists


class Statistics:
    """Densities of the attention calls made inside ``record``. Sums stay on the device until they are read.

    A call is one forward of one attention layer. Its density is the selected blocks over the causal blocks of its query
    blocks, over all heads and batch rows; blocks that are wholly padding do not count.
    """

    def __init__(self) -> None:
        self.sparse_calls = 0
        self.dense_calls = 0
        self._layers: dict[int, Tensor] = {}
        self._prompts: dict[int, Tensor] = {}  # the same of calls of more than one token
        self._shares: dict[torch.device, Tensor] = {}  # sums of the sparse calls' densities

    def add(
        self,
        layer: int,
        blocks: BlockIndices | None,
        lengths: Tensor | None,
        query: Tensor,
        key_length: int,
        block_size: int,
    ) -> None:
        """Count one call; ``blocks`` is None for a dense one. Called by the attention function."""
        if blocks is not None:
            block_size = blocks.block_size
        batch, heads, query_length, _ = query.shape
        span = None if blocks is None else blocks.span
        first = first_query_block(query_length, key_length, block_size)
        rows = torch.arange(first, -(-key_length // block_size), device=query.device)
        if span is not None and not span.plain:
            rows, valid = span.row_blocks(block_size), span.valid_rows(block_size)
        elif lengths is None:
            valid = torch.ones(batch, len(rows), dtype=torch.bool, device=query.device)
        else:
            valid = rows[None, :] * block_size < lengths.to(query.device)[:, None]
        causal = (valid * (rows + 1)).sum(dtype=torch.float64) * heads
        if blocks is None:
            selected = causal
            self.dense_calls += 1
        else:
            counts = read_lists(blocks)[1]
            shared = heads // counts.shape[1]  # lists may be shared by the query heads of a group
            selected = (counts * valid[:, None]).sum(dtype=torch.float64) * shared
            self.sparse_calls += 1
            share, device = selected / causal, query.device
            self._shares[device] = self._shares[device] + share if device in self._shares else share
        counted = torch.stack((selected, causal))
        for sums in (self._layers, self._prompts) if query_length > 1 else (self._layers,):
            sums[layer] = sums[layer] + counted if layer in sums else counted

    @property
    def density(self) -> float:
        """Mean density of the sparse calls; 1.0 where no call was sparse."""
        if not self.sparse_calls:
            return 1.0
        return sum(float(share) for share in self._shares.values()) / self.sparse_calls

    @property
    def total_density(self) -> float:
        """Selected over causal blocks of every layer, row and call, decoding too, dense ones counted as 1."""
        return _share(self._layers)

    @property
    def prompt_density(self) -> float:
        """Like ``total_density``, without decoding steps (calls of one token)."""
        return _share(self._prompts)

    @property
    def per_layer(self) -> dict[int, float]:
        """Like ``total_density``, for each layer that was called."""
        return {layer: float(counted[0] / counted[1]) for layer, counted in sorted(self._layers.items())}

    def __repr__(self) -> str:
        return (
            f"Statistics(density={self.density:.4f}, total_density={self.total_density:.4f}, "
            f"sparse_calls={self.sparse_calls}, dense_calls={self.dense_calls})"
        )


@contextmanager
def record(model: nn.Module) -> Iterator[Statistics]:
    """Count what attention reads while the context is open::

        with seerattention.record(model) as stats:
            model.generate(...)
        stats.density, stats.total_density  # of the layers that ran sparsely, and of all

    Raises:
        ValueError: nothing is attached to ``model``.
    """
    statistics = Statistics()
    with watch(RECORD, state_of(model), statistics):
        yield statistics


def _share(sums: dict[int, Tensor]) -> float:
    """Selected over causal blocks of all layers; 1.0 where nothing was called."""
    if not sums:
        return 1.0
    selected, causal = torch.stack([counted.cpu() for counted in sums.values()]).sum(0).tolist()
    return selected / causal
