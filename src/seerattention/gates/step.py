"""A decoding step of one layer: a token's scores, the lists that they choose, and attention to these.

All of that is a handful of launches, which follow from the geometry of their tensors. That of the lists changes where a
block is completed, that of attention in each step, as the cache grows; in all layers of a step both are the same. One
layer records them, and the others replay them.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor

from ..ops import dispatch
from ..ops.block_sparse_decode import block_sparse_decode
from ..ops.custom_op import tracing
from ..ops.indices import ordered_lists, read_lists
from ..ops.replay import Recording, Replays
from ..ops.span import Span
from ..policies import REPLAYED, Policy
from .by_token import select_by_token
from .decode import DecodeGate
from .query_state import Recent

_LISTS = Replays(passing=True)
_ATTENTION = Replays(passing=True)


class Recorded(NamedTuple):
    """What a step replays: of :attr:`TokenStep.asked`, and of :attr:`TokenStep.attended` and the lists."""

    lists: Recording
    attention: Recording


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
        """Whether a step may be one; where nobody replays launches, lists are made by other ways."""
        return type(policy) in REPLAYED and dispatch.device_type(device) == "cuda" and not tracing()

    @property
    def asked(self) -> tuple[Tensor, ...]:
        """What lists are made of: the query and what it is encoded with, and the keys."""
        if isinstance(self.query, Recent):
            return self.query.queries, self.keys
        return self.query, *token_tables(self.gate, self.tables), *token_parameters(self.gate), self.keys

    def run(self) -> Tensor:
        """``[B, Hq, 1, D]``."""
        lists = _LISTS.call(self._lists, self.asked, *self._settings)
        return _ATTENTION.call(lambda: self._attend(*lists), (*self.attended, *lists), *self._attention_settings)[0]

    def recorded(self) -> Recorded | None:
        """What :meth:`run` replays; None: it calls."""
        lists = _LISTS.recorded(self.asked, *self._settings)
        if lists is None:
            return None
        attention = _ATTENTION.recorded((*self.attended, *lists.new_results()), *self._attention_settings)
        return None if attention is None else Recorded(lists, attention)

    @property
    def _span(self) -> Span:
        q, k, _ = self.attended
        return Span(q.shape[0], 1, k.shape[2])

    @property
    def _settings(self) -> tuple[Hashable, ...]:
        gate, tokens = self.gate, self.attended[1].shape[2]
        whole = tokens % gate.block_size == 0  # whether the token's own block is complete
        return gate.config, gate.block_size, gate.scale, self.policy, tokens // gate.block_size, whole

    @property
    def _attention_settings(self) -> tuple[Hashable, ...]:
        return self.gate.block_size, self.scale

    def _lists(self) -> tuple[Tensor, Tensor]:
        """Indices ``[B, Hkv, 1, capacity]`` and counts ``[B, Hkv, 1]``."""
        gate, recent = self.gate, self.query
        if not isinstance(recent, Recent):
            recent = Recent(gate.encode_queries(recent, *self.tables))
        scores = gate.score_window(recent, self.keys, span=self._span)
        return read_lists(select_by_token(self.policy, scores, block_size=gate.block_size, span=self._span))

    def _attend(self, indices: Tensor, counts: Tensor) -> tuple[Tensor]:
        span, size = self._span, self.gate.block_size
        blocks = ordered_lists(indices, counts, span.num_key_blocks(size), size, True, span)
        return (cast(Tensor, block_sparse_decode(*self.attended, blocks, scale=self.scale)),)


def token_tables(gate: DecodeGate, tables: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Of the rotary table, what a token's query is rotated by."""
    return tables if gate.config.rope else ()


def token_parameters(gate: DecodeGate) -> tuple[Tensor, ...]:
    """What a token's query is projected and normalised by."""
    return (gate.q_linear,) if gate.q_norm is None else (gate.q_linear, gate.q_norm)
