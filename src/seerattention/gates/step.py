"""A decoding step of one layer: what a token's scores choose, read at once.

Encoding, scores, lists and attention of one token are a handful of launches, which follow from the geometry of their
tensors. In each step that is another one, and the same in all layers: one of them records it, and the others replay it.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from ..ops import dispatch
from ..ops.block_sparse_decode import block_sparse_decode
from ..ops.custom_op import tracing
from ..ops.replay import Recording, Replays
from ..ops.span import Span
from ..policies import REPLAYED, Policy
from .by_token import select_by_token
from .decode import DecodeGate
from .query_state import Recent

_STEPS = Replays(passing=True)


@dataclass(eq=False)
class TokenStep:
    """Attention of one token a row to the blocks that a gate scores and a policy chooses.

    Attributes:
        gate: of decoding.
        policy: decides token by token, and is one of the package's own (:meth:`takes`).
        query: ``[B, Hq, 1, D]`` before RoPE, of a gate without a window; else the encoded queries of the token, after
            those of its window that came before it.
        tables: the rotary table at the token, ``[B or 1, 1, rotary_dim]`` each.
        keys: ``[B, Hkv, N * parts, W]``, the encoded keys of all complete blocks.
        attended: q ``[B, Hq, 1, D]`` after RoPE, and k, v ``[B, Hkv, Tk, D]``, in rows without padding.
        scale: of the attention.
    """

    gate: DecodeGate
    policy: Policy
    query: Tensor | Recent
    tables: tuple[Tensor, Tensor]
    keys: Tensor
    attended: tuple[Tensor, Tensor, Tensor]
    scale: float

    @staticmethod
    def takes(policy: Policy, device: torch.device) -> bool:
        """Whether a step may be one; where nobody replays launches, lists are made first."""
        return type(policy) in REPLAYED and dispatch.device_type(device) == "cuda" and not tracing()

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that changes from call to call: of the queries, then the keys, then what is attended."""
        if isinstance(self.query, Recent):
            return self.query.queries, self.keys, *self.attended
        return self.query, *token_tensors(self.gate, self.tables), self.keys, *self.attended

    @property
    def settings(self) -> tuple[Hashable, ...]:
        """All else."""
        return self.gate.config, self.gate.block_size, self.gate.scale, self.policy, self.scale

    def run(self) -> Tensor:
        """``[B, Hq, 1, D]``."""
        return _STEPS.call(lambda: (self._run(),), self.tensors, *self.settings)[0]

    def recording(self) -> Recording | None:
        """What :meth:`run` replays, of :attr:`tensors`; None: it calls."""
        return _STEPS.recorded(self.tensors, *self.settings)

    def _run(self) -> Tensor:
        gate, (q, k, v) = self.gate, self.attended
        recent = self.query
        if not isinstance(recent, Recent):
            recent = Recent(gate.encode_queries(recent, *self.tables))
        span = Span(q.shape[0], 1, k.shape[2])
        scores = gate.score_window(recent, self.keys, span=span)
        blocks = select_by_token(self.policy, scores, block_size=gate.block_size, span=span)
        return cast(Tensor, block_sparse_decode(q, k, v, blocks, scale=self.scale))


def token_tensors(gate: DecodeGate, tables: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """What a token's query is encoded with."""
    norm = () if gate.q_norm is None else (gate.q_norm,)
    return (*(tables if gate.config.rope else ()), gate.q_linear, *norm)
