"""Block recall, the share of the true attention mass that lies inside the selected blocks; and numbers that tell more.

:mod:`.kept` says what the others are; all are counted in one walk through the same true maps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ..blocks import BlockIndices, num_blocks
from ..gates import DecodeGate, select_by_token
from ..gates.window import largest_share
from ..hf.contexts import dense, observe
from ..hf.phases import DECODE, PREFILL
from ..hf.prompts import run_prompt
from ..hf.state import gates_of, state_of
from ..ops import Span, pooled_attention, pooled_attention_decode
from ..policies import Policy
from ..selectors import LayerInputs, Selector
from .kept import Recall, count_kept

__all__ = ["block_recall", "compare_recall", "measure_recall", "recall_sums"]

K = TypeVar("K")

# Query tokens of a prompt on which decoding is judged, evenly spaced behind the first block.
_TOKENS = 512
# Tiles of the map that are held at a time.
_SLICE = 1 << 24


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
    found = measure_recall(model, batches, policy, phase=phase).block_recall()
    if not found:
        raise ValueError(
            "no batch, or no layer with a gate that reads these as whole prompts, to measure block recall on; prompts "
            "must be longer than one token and not longer than the model's sliding window"
        )
    return found


def recall_sums(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], policy: Policy | None = None, *, phase: str = PREFILL
) -> dict[int, Tensor]:
    """What :func:`block_recall` divides, so that several processes can add up theirs first.

    Returns:
        Layer index -> float64 ``[2]`` on the layer's device: the attention mass inside the selected blocks, each query
        block (or token) of each head counting 1 in all; and how many of those there were.
    """
    return measure_recall(model, batches, policy, phase=phase).block_sums()


@torch.no_grad()
def measure_recall(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], policy: Policy | None = None, *, phase: str = PREFILL
) -> Recall:
    """Everything that is counted of what the selected blocks keep: ``measure_recall(...).numbers()["needle_heads"]``.

    Any text will do, as models look back in plain books too. What the numbers are of is what the text asks for: give
    prompts like those that the model is for.

    Args:
        model, batches, policy, phase: as of :func:`block_recall`.

    Returns:
        Sums, of no layer at all where none reads these batches as whole prompts.

    Raises:
        ValueError, TypeError: as :func:`block_recall`.
    """
    recall = Recall()
    gates = gates_of(model, DECODE) if phase == DECODE else []
    if phase == DECODE and all(gate is None for gate in gates):
        raise ValueError("this model has no gates for decoding to measure; attach some: GateConfig(decode=...)")

    def measure(inputs: LayerInputs, blocks: BlockIndices | None) -> None:
        if phase == DECODE:
            gate = gates[inputs.layer]
            chosen = policy or state_of(model).layers[inputs.layer].decode_policy
            if not isinstance(gate, DecodeGate) or chosen is None or inputs.q.shape[2] <= gate.block_size:
                return
            true_map = _map_of_tokens(inputs, gate.block_size)
            selected: Tensor | None = _of_tokens(inputs, gate, chosen, true_map)
        else:
            if policy is not None:
                if inputs.gate is None:
                    return
                blocks = _lists(inputs, policy)
            block_size = 64 if blocks is None else blocks.block_size
            true_map, selected = _map_of_blocks(inputs, block_size), None if blocks is None else blocks.to_mask()
        _count(inputs.layer, true_map, {0: selected}, {0: recall})

    with ExitStack() as stack:
        if policy is not None or phase == DECODE:
            stack.enter_context(dense(model))
        stack.enter_context(observe(model, measure))
        for batch in batches:
            run_prompt(model, batch)
    return recall


@torch.no_grad()
def compare_recall(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], choices: Mapping[K, Policy | Selector]
) -> dict[K, Recall]:
    """:func:`measure_recall` of several choices of blocks along one dense forward of each prompt.

    Args:
        model: an attached model.
        batches: as of :func:`block_recall`.
        choices: policies for the gates that are attached (layers without one are left out), and selectors.

    Raises:
        ValueError: nothing is attached, there is no choice, or choices of several block sizes.
        TypeError: a batch of the wrong type.
    """
    if not choices:
        raise ValueError("compare_recall needs at least one policy or selector")
    recalls = {name: Recall() for name in choices}

    def measure(inputs: LayerInputs, _: BlockIndices | None) -> None:
        lists: dict[K, BlockIndices] = {}
        for name, choice in choices.items():
            if isinstance(choice, Selector):
                if inputs.gate is not None or not choice.needs_gate:
                    lists[name] = choice.select(inputs)
            elif inputs.gate is not None:
                lists[name] = _lists(inputs, choice)
        sizes = {blocks.block_size for blocks in lists.values()}
        if len(sizes) > 1:
            raise ValueError(f"choices must have one block size to be compared on one map, got {sorted(sizes)}")
        if sizes:
            masks = {name: blocks.to_mask() for name, blocks in lists.items()}
            _count(inputs.layer, _map_of_blocks(inputs, sizes.pop()), masks, recalls)

    with dense(model), observe(model, measure):
        for batch in batches:
            run_prompt(model, batch)
    return recalls


def _lists(inputs: LayerInputs, policy: Policy) -> BlockIndices:
    assert inputs.gate is not None
    chooser = policy.of_layer(inputs.layer)
    return chooser.select(inputs.gate_logits(), block_size=inputs.gate.block_size, lengths=inputs.lengths)


class _Map(NamedTuple):
    """The true map of a layer.

    Attributes:
        pooled: float32 ``[B, H, R, N]`` of a reduction ("sum" or "max") and a slice of the rows.
        own: int64 ``[R]``, the block that each row lies in.
        valid: bool ``[B, R]``.
        heads, columns: H and N.
        rows: what ``pooled`` knows the rows by: query blocks, or tokens.
        queries: how many queries a row has.
    """

    pooled: Callable[[str, slice], Tensor]
    own: Tensor
    valid: Tensor
    heads: int
    columns: int
    rows: Tensor
    queries: int


def _count(layer: int, true_map: _Map, selected: Mapping[K, Tensor | None], recalls: Mapping[K, Recall]) -> None:
    """Add what each mask (None: everything) keeps of a map, some rows at a time."""
    batch, count = true_map.valid.shape
    step = max(1, _SLICE // (batch * true_map.heads * true_map.columns))
    for start in range(0, count, step):
        part = slice(start, min(start + step, count))
        masses, peaks = true_map.pooled("sum", part), true_map.pooled("max", part)
        for name, mask in selected.items():
            if mask is not None:
                mask = mask[:, :, part].repeat_interleave(true_map.heads // mask.shape[1], dim=1)
            found = count_kept(masses, peaks, mask, true_map.own[part], true_map.valid[:, part], true_map.queries)
            recalls[name].add(layer, *found)


def _pooled(
    op: Callable[..., Tensor], inputs: LayerInputs, block_size: int, rows: Tensor
) -> Callable[[str, slice], Tensor]:
    """A reduction of the true map, for a part of some rows."""

    def pooled(reduce: str, part: slice) -> Tensor:
        return op(
            inputs.q,
            inputs.k,
            block_size=block_size,
            scale=inputs.scale,
            rows=rows[part],
            lengths=inputs.lengths,
            lse=inputs.lse,
            reduce=reduce,
            normalize=reduce == "sum",
        )

    return pooled


def _map_of_blocks(inputs: LayerInputs, block_size: int) -> _Map:
    batch, heads, length, _ = inputs.q.shape
    # Made on the device: a copy from the host would wait for it in every layer.
    rows = torch.arange(num_blocks(length, block_size), device=inputs.q.device)
    valid = rows.expand(batch, -1) >= 0
    if inputs.lengths is not None:
        valid = rows * block_size < inputs.lengths[:, None]

    pooled = _pooled(pooled_attention, inputs, block_size, rows)
    return _Map(pooled, rows, valid, heads, len(rows), rows, block_size)


def _map_of_tokens(inputs: LayerInputs, block_size: int) -> _Map:
    """Of some query tokens behind the first block, by KV head."""
    batch, _, length, _ = inputs.q.shape
    device = inputs.q.device
    count = min(_TOKENS, length - block_size)
    tokens = torch.linspace(block_size, length - 1, count, dtype=torch.float64, device=device).round().long()
    ends = torch.full((batch,), length, device=device) if inputs.lengths is None else inputs.lengths

    pooled = _pooled(pooled_attention_decode, inputs, block_size, tokens)
    columns = num_blocks(length, block_size)
    return _Map(pooled, tokens // block_size, tokens < ends[:, None], inputs.k.shape[1], columns, tokens, 1)


def _of_tokens(inputs: LayerInputs, gate: DecodeGate, policy: Policy, true_map: _Map) -> Tensor:
    """The blocks that tokens would read if they were decoded, bool ``[B, Hkv, R, N]``."""
    batch, _, length, _ = inputs.q.shape
    tokens, keys = true_map.rows, gate.encode_keys(inputs.k_pre, inputs.cos, inputs.sin)
    parts = tokens.split(max(1, _TOKENS // gate.query_window))
    logits = torch.cat([_scores_of_tokens(inputs, gate, keys, part) for part in parts], 2)
    # Each token is the only query of a row of its own.
    rows = logits.transpose(1, 2).flatten(0, 1)[:, :, None]
    span = Span.of_rows(1, length, start=tokens.repeat(batch), length=true_map.valid.long().flatten())
    selected = select_by_token(policy, rows, block_size=gate.block_size, span=span).to_mask()
    return selected[:, :, 0].unflatten(0, (batch, len(tokens))).transpose(1, 2)


def _scores_of_tokens(inputs: LayerInputs, gate: DecodeGate, keys: Tensor, tokens: Tensor) -> Tensor:
    """``[B, Hkv, R, N]`` of single tokens, each with the tokens before it that choose with it."""
    batch, _, length, _ = inputs.q.shape
    size = gate.query_window
    members = tokens[:, None] - torch.arange(size, device=tokens.device)
    rows = members.clamp(min=0).flatten()
    queries = gate.encode_queries(inputs.q_pre, inputs.cos, inputs.sin, rows=rows)
    # Of all of them those blocks count that are complete at the token.
    logits = gate.score(queries, keys, rows=tokens.repeat_interleave(size), span=Span(batch, length, length))
    if size == 1:
        return logits
    together = logits.unflatten(2, (len(tokens), size))
    return largest_share(together, (together > float("-inf")) & (members >= 0)[..., None])
