"""What a gate is trained for: the pooled attention map of its layer, for prompts or for decoding."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..gates import BlockGate
from ..ops import Span, pooled_attention, pooled_attention_decode
from ..selectors import LayerInputs
from .losses import kl_sum

Objective = Callable[[BlockGate, LayerInputs, Tensor, "Tensor | None", str], Tensor]
"""From a gate, a layer's inputs, int64 ``[R]`` rows, which of them are no padding, and ``DistillConfig.target``: the
loss, summed over rows."""

REDUCE_OF = {"max": "max", "row_mass": "row_sum"}
"""By target: ``reduce`` of pooled attention."""


def prefill_loss(
    gate: BlockGate, inputs: LayerInputs, rows: Tensor, valid: Tensor | None, target: str = "max"
) -> Tensor:
    """Of query blocks ``rows`` (SeerAttention, arXiv 2410.13276, section 3.2, where ``target`` is "max")."""
    true_map = _true_map(pooled_attention, gate, inputs, rows, target)
    logits = gate(inputs.q_pre, inputs.k_pre, inputs.cos, inputs.sin, rows=rows, lengths=inputs.lengths)
    return kl_sum(logits, true_map, valid)


def decode_loss(
    gate: BlockGate, inputs: LayerInputs, rows: Tensor, valid: Tensor | None, target: str = "max"
) -> Tensor:
    """Of query tokens ``rows`` (SeerAttention-R, arXiv 2506.08889, section 2, where ``target`` is "max"), none of them
    in the first block.

    A token's own block, which decoding always reads, is left out of map and scores alike; the others are divided by
    their sum again, as the published training does.
    """
    own = (rows // gate.block_size)[:, None]
    true_map = _true_map(pooled_attention_decode, gate, inputs, rows, target)
    others = torch.arange(true_map.shape[-1], device=rows.device) != own
    true_map = true_map * others
    true_map = true_map / true_map.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    table, tokens = (inputs.cos, inputs.sin), inputs.q.shape[2]
    keys = gate.encode_keys(inputs.k_pre, *table)
    queries = gate.encode_queries(inputs.q_pre, *table, rows=rows)
    logits = gate.score(queries, keys, rows=rows, span=Span(inputs.q.shape[0], tokens, tokens))
    return kl_sum(logits.masked_fill(~others, float("-inf")), true_map, valid)


@torch.no_grad()
def _true_map(op: Callable[..., Tensor], gate: BlockGate, inputs: LayerInputs, rows: Tensor, target: str) -> Tensor:
    return op(
        inputs.q,
        inputs.k,
        block_size=gate.block_size,
        scale=inputs.scale,
        rows=rows,
        lengths=inputs.lengths,
        lse=inputs.lse,
        reduce=REDUCE_OF[target],
    )


OBJECTIVES: dict[str, Objective] = {"prefill": prefill_loss, "decode": decode_loss}
