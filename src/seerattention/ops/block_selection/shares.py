"""How many blocks a share of the causal blocks of each row is."""

from __future__ import annotations

import torch
from torch import Tensor

# Slack against the rounding of density * (i + 1): 0.1 * 30 is 3.0000000000000004 in floating point and must give 3.
CEIL_SLACK = 1e-9
# Of the latest shapes, by all that they follow from.
_SHARES: dict[tuple[float, int, int, torch.device, int], Tensor] = {}
_MOST_SHARES = 64


def share_of_causal(density: float, num_rows: int, num_keys: int, device: torch.device) -> Tensor:
    """``ceil(density * causal blocks)`` of each row, int64 ``[num_rows]``, on the device, so that nothing waits for it.

    Every layer of a forward asks for the same: on CUDA devices the answer, six launches, is kept for its stream.
    Not while a graph is traced or recorded, whose memory is not this process's to keep.
    """
    kept = device.type == "cuda" and not torch.compiler.is_compiling() and not torch.cuda.is_current_stream_capturing()
    key = (density, num_rows, num_keys, device, torch.cuda.current_stream(device).cuda_stream if kept else 0)
    found = _SHARES.get(key) if kept else None
    if found is not None:
        return found
    where = device if device.type != "mps" else None  # Apple's has no float64
    share = share_of(density, torch.arange(num_keys - num_rows + 1, num_keys + 1, device=where))
    if kept and type(share) is Tensor:  # not a stand-in of a tracer
        if len(_SHARES) >= _MOST_SHARES:
            _SHARES.clear()
        _SHARES[key] = share
    return share


def share_of(density: float, causal: Tensor) -> Tensor:
    """``ceil(density * causal)`` of numbers of causal blocks, at least 1, int64."""
    if causal.device.type == "mps":  # Apple's has no float64
        return share_of(density, causal.cpu()).to(causal.device)
    return (causal.double() * density - CEIL_SLACK).ceil().long().clamp(min=1)
