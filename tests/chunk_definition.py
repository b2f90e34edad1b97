"""What a prompt in chunks gives by definition, computed from one forward of all tokens: no cache, no chunks."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

import seerattention as seer
from seerattention.blocks import dense_indices
from seerattention.ops.span import Span
from seerattention.selectors import Selector


@dataclass(frozen=True)
class InPieces(Selector, registered=False):
    """Makes the mask of every token: those of a piece are scored from the tokens that the piece holds of their block,
    against the keys up to its end.

    Attributes:
        policy: chooses.
        pieces: first and last token (exclusive) of each piece that is a prompt; all others attend to everything.
        masks: what was chosen, bool ``[B, H, T, T]``, layer by layer.
    """

    policy: seer.Policy
    pieces: tuple[tuple[int, int], ...]
    masks: list

    kind, needs_gate, rowwise = "in_pieces", True, True

    def select(self, inputs):
        gate, length, (batch, heads) = inputs.gate, inputs.q.shape[2], inputs.q.shape[:2]
        size = gate.block_size
        mask = torch.ones(batch, heads, length, length, dtype=torch.bool)
        for begin, end in self.pieces:
            tables = [table[:, begin:end] for table in (inputs.cos, inputs.sin)]
            span = Span(batch, end - begin, end)
            keys = gate.encode_keys(inputs.k_pre[:, :, :end], inputs.cos[:, :end], inputs.sin[:, :end])
            queries = gate.encode_queries(inputs.q_pre[:, :, begin:end], *tables, span=span)
            chosen = self.policy.select(gate.score(queries, keys, span=span), block_size=size, span=span).to_mask()
            rows = torch.arange(begin, end) // size - begin // size
            mask[:, :, begin:end, :end] = chosen[:, :, rows].repeat_interleave(size, -1)[..., :end]
        self.masks.append(mask & torch.ones(length, length, dtype=torch.bool).tril())
        return dense_indices(batch, heads, -(-length // size), -(-length // size), block_size=size)


@torch.inference_mode()
def by_definition(attach, model, ids, policy, pieces):
    """Logits ``[B, T, vocabulary]``, and the share of blocks that is not read.

    Args:
        attach: gives the model gates, as ``attach(model, None, selector=...)``.
        model: without gates.
        ids: ``[B, T]``, all tokens.
        policy, pieces: see :class:`InPieces`.
    """
    selector = InPieces(policy, tuple(pieces), [])

    def attend(q, k, v, blocks, *, scale):
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        return (q @ k.mT * scale).masked_fill(~selector.masks[-1], float("-inf")).softmax(-1) @ v

    attach(model, None, selector=selector)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("seerattention.hf.attention.block_sparse_attention", attend)
        logits = model(ids, use_cache=False).logits
    seer.detach(model)
    read = torch.stack([mask.sum() for mask in selector.masks]).sum() / len(selector.masks)
    return logits, float(read) / (ids.numel() * (ids.shape[1] + 1) / 2 * selector.masks[0].shape[1])
