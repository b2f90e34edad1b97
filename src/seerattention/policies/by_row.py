"""Factors of a relative threshold that follow from a row's position, as a table on the device."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops.block_selection.shares import kept_for_device

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


# A model has few policies at a time, some with a table for each layer, and a table is small: 8 KB at 128K tokens.
_kept_table = functools.lru_cache(maxsize=512)(_make_table)
