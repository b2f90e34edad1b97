"""How many blocks each row keeps: a share of its causal blocks, or a number."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from .. import dispatch
from ..replay import capturing, current_stream, facts_of_capture, unrecorded

# Slack against the rounding of density * (i + 1): 0.1 * 30 is 3.0000000000000004 in floating point and must give 3.
CEIL_SLACK = 1e-9
# Of the latest shapes, by all that they follow from; policies that differ by layer have one for each, of some KB.
_KEPT: dict[Hashable, Tensor] = {}
_MOST_KEPT = 512


def share_of_causal(density: float, num_rows: int, num_keys: int, device: torch.device) -> Tensor:
    """``ceil(density * causal blocks)`` of each row, int64 ``[num_rows]`` on the device; nothing waits for it."""

    def make() -> Tensor:
        where = device if device.type != "mps" else None  # Apple's has no float64
        return share_of(density, torch.arange(num_keys - num_rows + 1, num_keys + 1, device=where))

    return kept_for_device(make, device, density, num_rows, num_keys)


def number_of_blocks(number: int, num_rows: int, device: torch.device) -> Tensor:
    """The same number for each row, int64 ``[num_rows]``."""
    return kept_for_device(
        lambda: torch.full((num_rows,), number, dtype=torch.int64, device=device), device, number, num_rows
    )


def kept_for_device(make: Callable[[], Tensor], device: torch.device, *arguments: Hashable) -> Tensor:
    """What ``make`` makes of ``arguments``.

    Every layer of a forward asks for the same: on CUDA devices the answer, a few launches, is kept for its stream.
    While a graph is captured, whose memory is not this process's to keep, that is until the forward ends; where
    something is traced, not at all.
    """
    if dispatch.device_type(device) != "cuda" or torch.compiler.is_compiling():
        return make()
    kept: dict[Hashable, Tensor] | None = facts_of_capture() if capturing(device) else _KEPT
    if kept is None:
        return make()
    key = ("kept", arguments, device, current_stream(device))
    found = kept.get(key)
    if found is None:
        with unrecorded(), torch.inference_mode(False):
            found = make()
        if type(found) is Tensor:  # not a stand-in of a tracer
            if kept is _KEPT and len(kept) >= _MOST_KEPT:
                kept.pop(next(iter(kept)), None)  # the oldest: what a layer has just asked for stays
            kept[key] = found
    return found


def share_of(density: float, causal: Tensor) -> Tensor:
    """``ceil(density * causal)`` of numbers of causal blocks, at least 1, int64."""
    if causal.device.type == "mps":  # Apple's has no float64
        return share_of(density, causal.cpu()).to(causal.device)
    return (causal.double() * density - CEIL_SLACK).ceil().long().clamp(min=1)
