"""Decoded tokens: a layer's decode gate scores the blocks before each, a policy chooses, the token reads those.

Usually that is one token on a cache. Candidates of speculative decoding are several, and without a cache all that was
decoded comes again in every step: each token is decided as it would be alone.

The gate's encoded keys stay with the cache layer (``kept.py``): a step encodes nothing but a block that it completes.
Where none are kept for the keys that are in the cache, they are made from these, turned back by the rotary table
(``history.py``), so what a step reads never depends on how the cache came to be what it is.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ..blocks import BlockIndices, completed, shift_left
from ..gates import DecodeGate, KeyState, TokenStep, select_by_token
from ..ops import inverse_rope
from ..ops.block_sparse_decode import block_sparse_decode
from ..ops.indices import read_lists
from ..ops.span import START, Span
from ..policies import Policy
from .conditions import (
    ASKED_FOR,
    BELOW_MIN_CONTEXT,
    DENSE_POLICY,
    NO_GATE,
    ONE_BLOCK,
    must_be_dense,
    records_gradients,
    warn_dense,
)
from .dense import Arguments
from .forward import Call, Forward
from .history import history_problem, history_table
from .kept import keep, take_kept

_NO_CACHE = "its cache has no layers, or it came without one"
_WINDOW = "it decodes behind the sliding window of its layers ({} tokens)"
_CACHE = "the cache ({}) does not hold the keys of a layer as they are (sliding, quantized or offloaded)"
_MASK = "its mask is more than causal (a 4-D mask, packed sequences, or padding between valid tokens)"
_POSITIONS = (
    "the position_ids of a decoded token do not count the tokens of its cache, or its row is padded on the right"
)


class _Rows(NamedTuple):
    """The rows of a left-padded batch.

    Attributes:
        lengths: tokens of each row, the decoded ones included; on the host, and ``[B]`` on the device.
        on_device: see there.
        padding: slots in front of each row's tokens, ``[B]``.
    """

    lengths: list[int]
    on_device: Tensor
    padding: Tensor


class Decoded(NamedTuple):
    """What became of decoded tokens.

    Attributes:
        out: ``[B, Tq, Hq, D]``.
        blocks: the lists that were read; None: nobody wanted to see them.
        step: what :func:`attend_one_token` did, where that was it.
        key, state: then the token's keys before RoPE, ``[B, Hkv, 1, D]``, and the state that took them.
    """

    out: Tensor
    blocks: BlockIndices | None = None
    step: TokenStep | None = None
    key: Tensor | None = None
    state: KeyState | None = None


def attend_tokens(
    arguments: Arguments, call: Call, forward: Forward, mask: tuple[bool, Tensor | None], minimum: int
) -> Decoded | None:
    """Attention of decoded tokens to the key blocks that are chosen for each, or None: the layer is dense, for
    ``call.reason``.

    Args:
        arguments: of decoded tokens, the last ones of the keys.
        call, forward: what hooks saw.
        mask: whether it is no more than padding, and the padding ``[B, Tk]``.
        minimum: tokens that see fewer, their own included, read everything.
    """
    layer, queries, keys = call.layer, arguments.query.shape[2], arguments.key.shape[2]
    gate, policy = layer.decode_gate, layer.decode_policy
    call.reason = _not_worth_a_warning(call, forward, keys, minimum)
    if call.reason is not None or gate is None or policy is None:
        return None
    (plain, padding), state = mask, call.state
    if call.position_ids is None:
        call.position_ids = arguments.options.get("position_ids")
    gradients = records_gradients(arguments)
    reason = _not_decoding(arguments, call, plain) or must_be_dense(arguments, layer, gradients)
    rows = None
    if reason is None and padding is not None:
        rows = _rows(call, forward, padding, queries)
        if rows is None:
            reason = _POSITIONS
        elif max(rows.lengths) < minimum:
            call.reason = BELOW_MIN_CONTEXT
            return None
    lengths = [keys] * len(arguments.key) if rows is None else rows.lengths
    if state is not None and state.lengths != [length - queries for length in lengths]:
        state = None
    if min(lengths) == keys:
        rows = None  # a mask, but no padding
    if reason is None and state is None:
        # Of kept keys this is known. The positions of a step on them are not looked at: that would wait for the device.
        if forward.positions_end_at(call.position_ids, padding, keys):
            reason = history_problem(call, forward, arguments.key)
        else:
            reason = _POSITIONS
    layer.model.note(reason is None, gradients)
    call.reason = reason
    if reason is not None:
        warn_dense(layer, reason)
        return None
    layer.place_gate(arguments.query.device)
    gate = cast("DecodeGate", layer.gate_of(arguments.query.shape[1], gate))
    if state is None:
        if call.past is not None:
            take_kept(call.past)
        state = _encode_cache(arguments.key, queries, call, forward, (gate, rows))
    at_once = queries == 1 and rows is None and not forward.statistics and keys >= minimum
    if at_once and call.past is not None and TokenStep.takes(policy, arguments.query.device):
        return attend_one_token(arguments, call, gate, policy, state)
    blocks = _select(arguments, call, forward, (gate, policy, state), rows, minimum)
    out = block_sparse_decode(arguments.query, arguments.key, arguments.value, blocks, scale=arguments.scale)
    return Decoded(cast(Tensor, out).transpose(1, 2).contiguous(), blocks)


@torch.no_grad()
def attend_one_token(arguments: Arguments, call: Call, gate: DecodeGate, policy: Policy, state: KeyState) -> Decoded:
    """The common step: one token on a cache without padding, whose lists nobody wants to see.

    Args:
        arguments: of the token.
        call: its queries and keys before RoPE are taken, and what is kept with its cache layer.
        gate, policy: what chooses.
        state: the encoded keys of what the cache held before the token.
    """
    query, key, keys = _encode_new(arguments, call, gate, state)
    attended = arguments.query, arguments.key, arguments.value
    asked = query if call.recent is None else call.recent
    step = TokenStep(gate, policy, asked, _tables(call, query), keys, attended, arguments.scale)
    return Decoded(step.run().transpose(1, 2).contiguous(), step=step, key=key, state=state)


def _tables(call: Call, x: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = call.cos, call.sin
    return (cos, sin) if cos.device == x.device else (cos.to(x.device), sin.to(x.device))


def _encode_new(arguments: Arguments, call: Call, gate: DecodeGate, state: KeyState) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys before RoPE, and the encoded keys of all complete sub-blocks, which are kept with the cache
    layer."""
    if call.past is not None:
        take_kept(call.past)
    query, key = call.layer.take(call)
    with torch.inference_mode(False), torch.no_grad():  # what is kept may go on in another mode
        encoded = gate.encode_keys(key.to(arguments.key.dtype), *_tables(call, key), state=state)
    if call.past is not None:
        keep(call.past, gate, state, call.last)
    return query, key, encoded


def _not_worth_a_warning(call: Call, forward: Forward, keys: int, minimum: int) -> str | None:
    """Why nobody expects these tokens to be sparse, or None."""
    gate = call.layer.decode_gate
    if gate is None:
        return NO_GATE
    if forward.dense:
        return ASKED_FOR
    if not call.layer.decodes:
        return DENSE_POLICY
    if keys < minimum:
        return BELOW_MIN_CONTEXT
    if keys <= gate.block_size:
        return ONE_BLOCK
    if call.past is None and forward.prepared is None:
        return _NO_CACHE
    return None


def _not_decoding(arguments: Arguments, call: Call, plain: bool) -> str | None:
    """Why these are not tokens of each row that see all before them, or None."""
    window = arguments.options.get("sliding_window")
    window = call.layer.geometry.window if window is None else window
    keys, past = arguments.key.shape[2], call.past
    if window is not None and keys >= window:
        return _WINDOW.format(window)
    # Without a cache what is given is all that there is.
    if past is not None and not holds_keys(past, call, arguments.key):
        return _CACHE.format(type(past).__name__)
    if not arguments.options.get("is_causal", True) or not getattr(arguments.module, "is_causal", True):
        return "attention is not causal"
    return None if plain else _MASK


def holds_keys(past: Any, call: Call, key: Tensor) -> bool:
    """Whether a cache layer holds these very keys, and behind them room at most."""
    held = getattr(past, "keys", None)
    if not isinstance(held, Tensor) or held.device != key.device:
        return False
    slots = held.shape[2] if call.valid_keys is None else call.valid_keys
    return (*held.shape[:2], slots, held.shape[3]) == tuple(key.shape)


def _rows(call: Call, forward: Forward, padding: Tensor, queries: int) -> _Rows | None:
    """The rows of a batch with padding ``[B, Tk]``, for which the host waits once a forward; None: a row does not end
    with the tokens, or has other positions."""
    name = ("rows of a token", id(padding), id(call.position_ids))
    if name not in forward.facts:
        lengths = padding.sum(-1)
        right = padding[:, -queries:].all(-1)
        if call.position_ids is not None and call.position_ids.dim() == 2:
            right = right & (call.position_ids[:, -1].to(lengths.device) == lengths - 1)
        else:
            right = torch.zeros_like(right)
        *listed, all_right = torch.cat((lengths, right.all()[None].long())).tolist()
        rows = _Rows(listed, lengths, padding.shape[1] - lengths) if all_right else None
        # The tensors are kept, so that their ids are their own.
        forward.facts[name] = rows, padding, call.position_ids
    return forward.facts[name][0]


@torch.no_grad()
def _select(
    arguments: Arguments,
    call: Call,
    forward: Forward,
    chooses: tuple[DecodeGate, Policy, KeyState],
    rows: _Rows | None,
    minimum: int,
) -> BlockIndices:
    gate, policy, state = chooses
    batch, _, queries, _ = arguments.query.shape
    keys = arguments.key.shape[2]
    query, _, encoded = _encode_new(arguments, call, gate, state)
    span = Span(batch, queries, keys) if rows is None else _span(rows, queries, keys, forward)
    if call.recent is None:
        logits = gate.score(gate.encode_queries(query, *_tables(call, query)), encoded, span=span)
    else:
        logits = gate.score_window(call.recent, encoded, span=span)
    blocks = select_by_token(policy, logits, block_size=gate.block_size, span=span)
    if (keys if rows is None else min(rows.lengths)) - queries + 1 < minimum:
        blocks = _complete_early_tokens(blocks, span, minimum)
    return blocks


def _encode_cache(
    key: Tensor, queries: int, call: Call, forward: Forward, chooses: tuple[DecodeGate, _Rows | None]
) -> KeyState:
    """Encoded keys of all but the last ``queries`` of ``key [B, Hkv, Tk, D]``, which are after RoPE."""
    (gate, rows), old = chooses, key.shape[2] - queries
    state = gate.new_state()
    if old == 0:
        return state
    cos, sin = (table.to(key.device)[:, :old] for table in history_table(call, forward, key.shape[2]))
    cached = key[:, :, :old]
    lengths = None
    if rows is not None:
        lengths = [length - queries for length in rows.lengths]
        cached = shift_left(cached, rows.padding)
    with torch.inference_mode(False), torch.no_grad():
        before = inverse_rope(call.layer.model.family.half_split(cached, cos.shape[-1]), cos, sin)
        gate.encode_keys(before, cos, sin, lengths=lengths, state=state)
    return state


def _span(rows: _Rows, queries: int, keys: int, forward: Forward) -> Span:
    """Where the tokens of left-padded rows are; one a forward and device."""
    name = ("span of tokens", queries, keys, id(rows))
    if name not in forward.facts:
        lengths = rows.on_device
        forward.facts[name] = Span.of_rows(
            queries, keys, start=lengths - queries, length=torch.full_like(lengths, queries), key_slot=rows.padding
        )
    return forward.facts[name]


def _complete_early_tokens(blocks: BlockIndices, span: Span, minimum: int) -> BlockIndices:
    """Tokens that would be dense alone, for seeing fewer than ``minimum``, read everything."""
    own = blocks.last_blocks(read_lists(blocks)[1].device)
    seen = span.column(START, own.device)[:, None] + torch.arange(1, span.queries + 1, device=own.device)
    return completed(blocks, seen < minimum, own + 1, minimum)
