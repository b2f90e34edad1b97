"""How much of the attention map an attached model really read, from the lists that the kernels got."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..hf.forward import RECORD, Attended, watch
from ..hf.state import state_of
from ..ops.indices import read_lists

_NO_REASON = "its gate was not asked"


class Statistics:
    """Densities of the attention calls made inside ``record``. Sums stay on the device until they are read.

    A call is one forward of one attention layer (two, where a forward brings a prompt and decoded tokens). Its density
    is the selected blocks over the causal blocks of its query blocks, over all heads and batch rows; blocks that are
    wholly padding do not count.
    """

    def __init__(self) -> None:
        self.sparse_calls = 0
        self.dense_calls = 0
        self.min_context: int | None = None
        self._reasons: dict[int, Counter[str]] = {}
        self._layers: dict[int, Tensor] = {}
        self._prompts: dict[int, Tensor] = {}  # the same of prompts
        self._shares: dict[torch.device, Tensor] = {}  # sums of the sparse calls' densities

    def add(self, layer: int, attended: Attended) -> None:
        """Count one call, or a part of one. Called by the attention function; nothing waits for the device."""
        blocks, (batch, heads, queries, _), device = attended.blocks, attended.shape, attended.device
        block_size = attended.block_size if blocks is None else blocks.block_size
        by_token = blocks is not None and blocks.by_token
        span = None if blocks is None else blocks.span
        self.min_context = attended.min_context
        if span is not None and (by_token or not span.plain):
            rows, valid = span.row_blocks(block_size, device, by_token), span.valid_rows(block_size, device, by_token)
            rows, valid = (x.expand(batch, -1) for x in (rows, valid))
        elif attended.decoding:
            ends = attended.lengths
            ends = torch.full((batch,), attended.keys, device=device) if ends is None else ends.to(device)
            rows = (ends[:, None] - queries + torch.arange(queries, device=device)) // block_size
            valid = rows >= 0
        else:
            first = attended.keys - queries
            rows = torch.arange(first // block_size, -(-attended.keys // block_size), device=device)
            if attended.lengths is None:
                valid = torch.ones(batch, len(rows), dtype=torch.bool, device=device)
            else:
                valid = rows[None, :] * block_size < attended.lengths.to(device)[:, None]
        causal = (valid * (rows + 1)).sum(dtype=torch.float64) * heads
        if blocks is None:
            selected = causal
            self.dense_calls += 1
            self._reasons.setdefault(layer, Counter())[attended.reason or _NO_REASON] += 1
        else:
            counts = read_lists(blocks)[1]
            shared = heads // counts.shape[1]  # lists may be shared by the query heads of a group
            selected = (counts * valid[:, None]).sum(dtype=torch.float64) * shared
            if attended.share is not None:  # of pairs of tokens, not of lists
                selected = attended.share * causal
            self.sparse_calls += 1
            share = selected / causal
            self._shares[device] = self._shares[device] + share if device in self._shares else share
        counted = torch.stack((selected, causal))
        for sums in (self._layers,) if attended.decoding else (self._layers, self._prompts):
            sums[layer] = sums[layer] + counted if layer in sums else counted

    @property
    def dense_reasons(self) -> dict[int, dict[str, int]]:
        """How often each layer was dense, by reason; layers that never were are left out."""
        return {layer: dict(reasons.most_common()) for layer, reasons in sorted(self._reasons.items())}

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
        """Like ``total_density``, without decoded tokens."""
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
        stats.dense_reasons                 # why layers were dense: {layer: {reason: calls}}

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
