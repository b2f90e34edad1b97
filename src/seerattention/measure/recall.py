"""Block recall: the share of the true attention mass that lies inside the selected blocks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ..blocks import BlockIndices, num_blocks
from ..hf.contexts import dense, observe
from ..hf.prompts import run_prompt
from ..ops import pooled_attention
from ..policies import Policy
from ..selectors import LayerInputs

__all__ = ["block_recall", "recall_sums"]


def block_recall(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], policy: Policy | None = None
) -> dict[int, float]:
    """Share of the attention mass inside the selected blocks, by layer index, averaged over heads and query blocks.

    Args:
        model: an attached model.
        batches: iterable of prompts, each a mapping as in :func:`~seerattention.hf.prompts.check_batch`.
        policy: turns the gates' logits into blocks; the model itself runs densely, so every layer is judged on the
            queries and keys that distillation sees, and layers without a gate are left out. None: the model runs
            sparsely with what is attached to it (policies or a selector), and each layer is judged on what it then
            sees; a layer that ran densely has recall 1.

    Raises:
        ValueError: nothing is attached, there is no batch, a batch is not one whole prompt per row, or ``policy`` is
            given and no layer has a gate.
        TypeError: a batch of the wrong type.
    """
    sums = recall_sums(model, batches, policy)
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
    model: nn.Module, batches: Iterable[Mapping[str, Any]], policy: Policy | None = None
) -> dict[int, Tensor]:
    """What :func:`block_recall` divides, so that several processes can add up theirs first.

    Returns:
        Layer index -> float64 ``[2]`` on the layer's device: the attention mass inside the selected blocks, each query
        block of each head counting 1 in all; and how many of those there were.
    """
    sums: dict[int, Tensor] = {}

    def measure(inputs: LayerInputs, blocks: BlockIndices | None) -> None:
        if policy is not None:
            if inputs.gate is None:
                return
            block_size = inputs.gate.block_size
            blocks = policy.select(inputs.gate_logits(), block_size=block_size, lengths=inputs.lengths)
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
        both = torch.stack([mass, pairs])
        sums[inputs.layer] = sums[inputs.layer] + both if inputs.layer in sums else both

    with ExitStack() as stack:
        if policy is not None:
            stack.enter_context(dense(model))
        stack.enter_context(observe(model, measure))
        for batch in batches:
            run_prompt(model, batch)
    return sums
