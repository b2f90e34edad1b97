"""A decoding step of one layer: what a token's scores choose, read at once.

Scores, lists and attention of one token are five launches at most, which follow from the geometry of their tensors. In
each step that is another one, and the same in all layers: one of them records it, and the others replay it.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from ..ops import dispatch
from ..ops.block_sparse_decode import block_sparse_decode
from ..ops.custom_op import tracing
from ..ops.replay import Replays
from ..ops.span import Span
from ..policies import REPLAYED, Policy
from .by_token import select_by_token
from .decode import DecodeGate
from .query_state import Recent

_STEPS = Replays(passing=True)


def attends_at_once(policy: Policy, device: torch.device) -> bool:
    """Whether :func:`attend_token` can take a step; where nobody replays launches, lists are made first."""
    return type(policy) in REPLAYED and dispatch.device_type(device) == "cuda" and not tracing()


@torch.no_grad()
def attend_token(
    gate: DecodeGate,
    policy: Policy,
    queries: Tensor,
    keys: Tensor,
    attended: tuple[Tensor, Tensor, Tensor],
    scale: float,
) -> Tensor:
    """Attention of one token a row to the blocks that a gate scores and a policy chooses.

    Args:
        gate: of decoding; its parameters have no part in this.
        policy: decides token by token, and is one of the package's own (:func:`attends_at_once`).
        queries: ``[B, Hv, R, W]``, encoded: of the token, after those of its window that came before it.
        keys: ``[B, Hkv, N * parts, W]``, the encoded keys of all complete blocks.
        attended: q ``[B, Hq, 1, D]`` after RoPE, and k, v ``[B, Hkv, Tk, D]``, in rows without padding.
        scale: of the attention.

    Returns:
        ``[B, Hq, 1, D]``.
    """
    q, k, v = attended

    def attend() -> tuple[Tensor]:
        span = Span(q.shape[0], 1, k.shape[2])
        scores = gate.score_window(Recent(queries), keys, span=span)
        blocks = select_by_token(policy, scores, block_size=gate.block_size, span=span)
        return (cast(Tensor, block_sparse_decode(q, k, v, blocks, scale=scale)),)

    settings = gate.block_size, gate.k_pitch, gate.query_window, gate.scale, policy, scale
    return _STEPS.call(attend, (queries, keys, q, k, v), *settings)[0]
