"""Block recall: the share of the true attention mass that lies inside the selected blocks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ..blocks import BlockIndices, num_blocks
from ..gates import DecodeGate, select_by_token
from ..hf.contexts import dense, observe
from ..hf.phases import DECODE, PREFILL
from ..hf.prompts import run_prompt
from ..hf.state import gates_of, state_of
from ..ops import Span, pooled_attention, pooled_attention_decode
from ..policies import Policy
from ..selectors import LayerInputs

__all__ = ["block_recall", "recall_sums"]

# Query tokens of a prompt on which decoding is judged, evenly spaced behind the first block.
_TOKENS = 512


def block_recall(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], policy: Policy | None = None, *, phase: str = PREFILL
) -> dict[int, float]:
    """Share of the attention mass inside the selected blocks, by layer index, averaged over heads and query blocks.

    In the phase ``"decode"`` it is the share that each of 512 evenly spaced tokens of a prompt, or all of a short one,
    would read if it were decoded on a cache of the tokens before it (SeerAttention-R, arXiv 2506.08889), averaged over
    heads and tokens.

    Args:
        model: an attached model.
        batches: iterable of prompts, each a mapping as in :func:`~seerattention.hf.prompts.check_batch`.
        policy: turns the gates' logits into blocks; the model itself runs densely, so every layer is judged on the
            queries and keys that distillation sees, and layers without a gate are left out. None: the model runs
            sparsely with what is attached to it (policies or a selector), and each layer is judged on what it then
            sees; a layer that ran densely has recall 1. In the phase ``"decode"`` the model runs densely in any case,
            and None is the policy of decoding in force for each layer.
        phase: ``"prefill"``, or ``"decode"`` for the gates of decoding.

    Raises:
        ValueError: nothing is attached, there is no batch, a batch is not one whole prompt per row, or ``policy`` is
            given and no layer has a gate; no layer has a gate for ``phase="decode"``, or its policy does not decide
            token by token.
        TypeError: a batch of the wrong type.
    """
    sums = recall_sums(model, batches, policy, phase=phase)
    if not sums:
        raise ValueError(
            "no batch, or no layer with a gate that reads these as whole prompts, to measure block recall on; prompts "
            "must be longer than one token and not longer than the model's sliding window"
        )
    device = next(iter(sums.values())).device
    layers = sorted(sums)
    host = torch.stack([sums[layer].to(device) for layer in layers]).tolist()
    return {layer: mass / pairs for layer, (mass, pairs) in zip(layers, host, strict=True)}


@torch.no_grad()
def recall_sums(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], policy: Policy | None = None, *, phase: str = PREFILL
) -> dict[int, Tensor]:
    """What :func:`block_recall` divides, so that several processes can add up theirs first.

    Returns:
        Layer index -> float64 ``[2]`` on the layer's device: the attention mass inside the selected blocks, each query
        block (or token) of each head counting 1 in all; and how many of those there were.
    """
    sums: dict[int, Tensor] = {}
    gates = gates_of(model, DECODE) if phase == DECODE else []
    if phase == DECODE and all(gate is None for gate in gates):
        raise ValueError("this model has no gates for decoding to measure; attach some: GateConfig(decode=...)")

    def measure(inputs: LayerInputs, blocks: BlockIndices | None) -> None:
        if phase == DECODE:
            gate = gates[inputs.layer]
            chosen = policy or state_of(model).layers[inputs.layer].decode_policy
            both = _of_tokens(inputs, gate, chosen) if isinstance(gate, DecodeGate) and chosen else None
        else:
            both = _of_blocks(inputs, blocks, policy)
        if both is not None:
            sums[inputs.layer] = sums[inputs.layer] + both if inputs.layer in sums else both

    with ExitStack() as stack:
        if policy is not None or phase == DECODE:
            stack.enter_context(dense(model))
        stack.enter_context(observe(model, measure))
        for batch in batches:
            run_prompt(model, batch)
    return sums


def _of_blocks(inputs: LayerInputs, blocks: BlockIndices | None, policy: Policy | None) -> Tensor | None:
    """Mass and number of all query blocks of a prompt."""
    if policy is not None:
        if inputs.gate is None:
            return None
        blocks = policy.select(inputs.gate_logits(), block_size=inputs.gate.block_size, lengths=inputs.lengths)
    block_size = 64 if blocks is None else blocks.block_size
    batch, heads, length, _ = inputs.q.shape
    if inputs.lengths is None:
        # Filled on the device: a copy from the host would wait for it in every layer.
        rows = torch.full((), batch * num_blocks(length, block_size), dtype=torch.int64, device=inputs.q.device)
    else:
        rows = ((inputs.lengths + block_size - 1) // block_size).sum()
    pairs = (rows * heads).double()
    mass = pairs
    if blocks is not None:
        tiles = pooled_attention(
            inputs.q,
            inputs.k,
            block_size=block_size,
            scale=inputs.scale,
            lengths=inputs.lengths,
            lse=inputs.lse,
            reduce="sum",
        )
        selected = blocks.to_mask()
        mass = tiles.mul_(selected.repeat_interleave(heads // selected.shape[1], dim=1)).sum(dtype=torch.float64)
    return torch.stack([mass, pairs])


def _of_tokens(inputs: LayerInputs, gate: DecodeGate, policy: Policy) -> Tensor | None:
    """Mass and number of some query tokens of a prompt; None: it ends with its first block."""
    (batch, _, length, _), block_size = inputs.q.shape, gate.block_size
    if length <= block_size:
        return None
    device = inputs.q.device
    count = min(_TOKENS, length - block_size)
    tokens = torch.linspace(block_size, length - 1, count, dtype=torch.float64, device=device).round().long()
    table = inputs.cos, inputs.sin
    queries = gate.encode_queries(inputs.q_pre, *table, rows=tokens)
    logits = gate.score(queries, gate.encode_keys(inputs.k_pre, *table), rows=tokens, span=Span(batch, length, length))
    ends = torch.full((batch,), length, device=device) if inputs.lengths is None else inputs.lengths
    valid = tokens < ends[:, None]
    # Each token is the only query of a row of its own.
    rows = logits.transpose(1, 2).flatten(0, 1)[:, :, None]
    span = Span.of_rows(1, length, start=tokens.repeat(batch), length=valid.long().flatten())
    selected = select_by_token(policy, rows, block_size=block_size, span=span).to_mask()
    tiles = pooled_attention_decode(
        inputs.q,
        inputs.k,
        block_size=block_size,
        scale=inputs.scale,
        rows=tokens,
        lengths=inputs.lengths,
        lse=inputs.lse,
        reduce="sum",
    )
    mass = tiles.mul_(selected[:, :, 0].unflatten(0, (batch, count)).transpose(1, 2)).sum(dtype=torch.float64)
    return torch.stack([mass, (valid.sum() * tiles.shape[1]).double()])
