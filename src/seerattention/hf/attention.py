"""The attention function that transformers calls for the implementation named "seer".

A whole prompt that arrives in one forward is attended block-sparsely, and so is a chunk of a prompt, or a later turn,
on the cache of what came before, and a decoded token where the layer has a gate for it (``decoding.py``). Everything
else (sliding windows, training, custom masks) goes to the implementation that the model came with, with the mask that
it would have got, so dense results are those of the untouched model. What cannot be right raises; what is dense against
expectation warns once.
"""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from ..blocks import BlockIndices, complete_short_rows, shift_left, shift_right
from ..ops.block_sparse_attention import block_sparse_attention
from ..ops.replay import capturing
from ..ops.span import Span
from ..selectors import GateSelector, LayerInputs, Selector
from .conditions import (
    ASKED_FOR,
    BELOW_MIN_CONTEXT,
    CAPTURED,
    DENSE_POLICY,
    NO_GATE,
    SHORT_CHUNK,
    UNKNOWN_PROMPT,
    must_be_dense,
    records_gradients,
    warn_dense,
)
from .decoding import attend_tokens
from .dense import Arguments, attend_densely, attend_densely_with_lse
from .dense_plan import make_dense_plan
from .forward import Attended, Call, Forward, current_forward, present_plan
from .generation import UNKNOWN
from .history import chunk_of, chunk_span, history_problem, history_table, keys_before_rope
from .implementation import NAME, decodes_sparsely, original_of
from .layer import LayerState
from .masks import read_mask, seer_mask
from .parking import passing
from .parts import join, split
from .phases import PREFILL, unnoticed
from .plan import make_plan
from .recent import keep_queries, remember
from .token_plan import make_token_plan
from .untraced import untraced

# Why a layer is dense where nobody expects otherwise: no warning, and observers are not called.
_SLIDING = "the layer attends to a sliding window"
_SKIPPED_BY_OBSERVERS = (_SLIDING,)


def register() -> None:
    """Make the implementation known to transformers; called on attach, never at import."""
    AttentionInterface.register(NAME, seer_attention)
    AttentionMaskInterface.register(NAME, seer_mask)


def seer_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of one layer, as transformers calls it.

    Args:
        module: the attention module.
        query: ``[B, Hq, Tq, D]`` after RoPE; key, value: ``[B, Hkv, Tk, D]``, the cache included.
        attention_mask: what :func:`~seerattention.hf.masks.seer_mask` made, or a mask of the user's own.
        dropout, scaling: as in every attention function of transformers.

    What the layer's hooks saw comes from the forward that is under way in this context; without one, and in modules
    without gates, attention is dense.

    Returns:
        ``[B, Tq, Hq, D]``, and the attention probabilities ``[B, Hq, Tq, Tk]`` where dense attention gives them.
    """
    plan = None
    if not torch.compiler.is_dynamo_compiling():
        plan = present_plan()
        if plan is None and (passed := passing()) is not None:
            return passed.attend(module, query, key, value, attention_mask, dropout, scaling, kwargs)
    arguments = Arguments(module, query, key, value, attention_mask, dropout, scaling, kwargs)
    if plan is not None and plan.single == (query.shape[2] == 1) and (out := plan.attend(arguments)) is not None:
        return out, None
    if kwargs.get("s_aux") is not None or kwargs.get("softcap") is not None:
        raise NotImplementedError("attention sinks and soft-capped attention are not supported by the seer attention")
    if unnoticed(query.shape[2], decodes_sparsely(module.config)):
        return attend_densely(arguments)
    return _attend(arguments)


@untraced("whether a prompt may be sparse is decided on its mask and positions, by their values")
def _attend(arguments: Arguments) -> tuple[Tensor, Tensor | None]:
    """Everything but dense decoding. Sparse attention has the precision that sdpa has under autocast; scores stay
    float32."""
    forward = current_forward()
    call = None if forward is None else forward.take_call(arguments.module)
    if forward is None or call is None:
        return attend_densely(arguments)
    forward.seen.add(call.layer.index)
    if call.unreadable:
        _note_dense(arguments, call, forward, CAPTURED)
        return attend_densely(arguments)
    device_type = arguments.query.device.type
    given, arguments = arguments, arguments.of_first_keys(call.valid_keys)
    if not torch.is_autocast_enabled(device_type):
        result = _attend_sparsely(arguments, call, forward)
    else:
        # Rotated queries and keys are float32 there, values are not, and the gates' products would be rounded.
        dtype = torch.get_autocast_dtype(device_type)
        tensors = {name: getattr(arguments, name).to(dtype) for name in ("query", "key", "value")}
        with torch.autocast(device_type, enabled=False):
            result = _attend_sparsely(arguments._replace(**tensors), call, forward)
    return attend_densely(given) if result is None else result


def _attend_sparsely(arguments: Arguments, call: Call, forward: Forward) -> tuple[Tensor, Tensor | None] | None:
    """None: nothing is attended yet, and it is to be dense."""
    queries = arguments.query.shape[2]
    decoded = forward.decoded_of(queries)
    if call.layer.remembers:
        remember(arguments, call, decoded)
    if decoded == 0:
        return _attend_prompt(arguments, call, forward)
    if decoded == queries:
        return _attend_tokens(arguments, call, forward)
    if decoded == UNKNOWN or call.valid_keys is not None:  # speculation on static caches is refused by transformers
        _note_dense(arguments, call, forward, UNKNOWN_PROMPT)
        return None
    mask = _read_mask(arguments, forward)
    prompt, tokens = split(arguments, call, forward, mask, decoded)
    outputs = _attend_prompt(*prompt, forward), _attend_tokens(*tokens, forward)
    return join(arguments, mask[1], *(output and output[0] for output in outputs))


def _note_dense(arguments: Arguments, call: Call, forward: Forward, reason: str) -> None:
    """Warn and count, where nobody can tell what is prompt, or what a cache holds."""
    layer = call.layer
    call.reason = reason
    if layer.may_be_sparse and arguments.key.shape[2] >= _min_context(layer, arguments.query.device):
        warn_dense(layer, reason)
    _count(arguments, call, forward, None, None)


def _attend_tokens(arguments: Arguments, call: Call, forward: Forward) -> tuple[Tensor, Tensor | None] | None:
    layer, device = call.layer, arguments.query.device
    if not layer.decodes and not forward.statistics:
        return None
    mask = _read_mask(arguments, forward)
    captured = call.query, call.key  # of which the call lets go
    decoded = attend_tokens(arguments, call, forward, mask, _min_context(layer, device))
    if forward.statistics:
        blocks, lengths = decoded and decoded.blocks, None if mask[1] is None else mask[1].sum(-1)
        _count(arguments, call, forward, blocks, lengths, decoding=True)
    if decoded is None:
        keep_queries(arguments, call)
        return None
    forward.sparse = True
    make_token_plan(forward, call, arguments, captured, decoded)
    return decoded.out, None


def _read_mask(arguments: Arguments, forward: Forward) -> tuple[bool, Tensor | None]:
    """Whether the mask is causality and padding, and the padding on the device of the queries; one a forward."""
    plain, padding = read_mask(arguments.mask, forward, original_of(arguments.module.config))
    device, keys = arguments.query.device, arguments.key.shape[2]
    if padding is None or (padding.device == device and padding.shape[1] == keys):
        return plain, padding
    name = ("padding", id(padding), keys, device)
    if name not in forward.facts:
        # Kept with what it was made of, so that its id is its own. There may be room behind the tokens.
        forward.facts[name] = padding[:, :keys].to(device), padding
    return plain and padding.shape[1] >= keys, forward.facts[name][0]


def _count(
    arguments: Arguments,
    call: Call,
    forward: Forward,
    blocks: BlockIndices | None,
    lengths: Tensor | None,
    decoding: bool = False,
    share: Tensor | None = None,
) -> None:
    if not forward.statistics:
        return
    layer, query = call.layer, arguments.query
    attended = Attended(
        blocks,
        tuple(query.shape),
        arguments.key.shape[2],
        query.device,
        lengths,
        layer.model.block_size,
        decoding,
        None if blocks is not None else call.reason,
        _min_context(layer, query.device),
        share,
    )
    for statistics in forward.statistics:
        statistics.add(layer.index, attended)


def _attend_prompt(arguments: Arguments, call: Call, forward: Forward) -> tuple[Tensor, Tensor | None] | None:
    """Decide, select, count, report, attend."""
    layer = call.layer
    inputs: LayerInputs | None = None
    blocks: BlockIndices | None = None
    plain, padding = _read_mask(arguments, forward)
    problem = call.reason = _not_a_prompt(arguments, call, forward, plain, padding)
    if problem is None:
        selector = layer.selector(PREFILL)
        padded = padding is not None
        wants_sparse = selector is not None and _wants_sparse(arguments, call, forward, selector, padded)
        if wants_sparse or forward.observers:
            captured = call.query, call.key  # of which the call lets go
            inputs, starts = _layer_inputs(arguments, call, forward, padding)
            seen = bool(forward.observers or forward.statistics)
            gated = selector if type(selector) is GateSelector and not seen else None
            if gated is not None and (out := gated.attend_at_once(inputs)) is not None:
                forward.sparse = True
                make_plan(forward, call, arguments, inputs, captured, gated)
                return out.transpose(1, 2).contiguous(), None
            if selector is not None and wants_sparse:
                blocks = _select(selector, inputs, _min_context(layer, inputs.q.device))
        else:
            make_dense_plan(forward, call, arguments)
        if selector is None:
            call.reason = NO_GATE
    elif forward.observers and problem not in _SKIPPED_BY_OBSERVERS:
        raise ValueError(f"observe() sees whole prompts only, but this forward is not one: {problem}")
    if forward.statistics:
        lengths = inputs.lengths if inputs is not None else None if padding is None else padding.sum(-1)
        share = None
        if blocks is not None and selector is not None and inputs is not None:
            share = selector.share_read(inputs)
        _count(arguments, call, forward, blocks, lengths, share=share)
    result: tuple[Tensor, Tensor | None] | None = None
    if inputs is not None and forward.observers:
        if blocks is None and not call.part and call.valid_keys is None:
            # Before the observers, who would otherwise compute its log-sum-exp again.
            result, lse = attend_densely_with_lse(arguments)
            inputs = dataclasses.replace(inputs, lse=lse)
        for observer in forward.observers:
            observer(inputs, blocks)
    if blocks is None:
        return result
    assert inputs is not None
    assert selector is not None
    forward.sparse = True
    out = selector.attend(inputs, blocks)
    if out is None:
        out = cast(Tensor, block_sparse_attention(inputs.q, inputs.k, inputs.v, blocks, scale=inputs.scale))
    if padding is not None:
        mine = padding[:, -out.shape[2] :]
        out = shift_right(out, starts).masked_fill(~mine[:, None, :, None], 0.0)
    return out.transpose(1, 2).contiguous(), None


def _not_a_prompt(
    arguments: Arguments, call: Call, forward: Forward, plain: bool, padding: Tensor | None
) -> str | None:
    """Why these tensors are not one whole prompt per row under plain causal attention, or None. Warns where one might
    expect sparsity."""
    layer, options = call.layer, arguments.options
    length, key_length = arguments.query.shape[2], arguments.key.shape[2]
    window = options.get("sliding_window")
    window = layer.geometry.window if window is None else window
    positions = call.position_ids if call.position_ids is not None else options.get("position_ids")
    chunk = length != key_length
    mine = chunk_of(padding, length, forward) if chunk and padding is not None else padding
    reason = None
    if chunk and capturing(arguments.query.device):
        reason = CAPTURED
    elif chunk and forward.observers:
        reason = "a chunk of a prompt on top of a cache"  # which observers do not take; see the caller
    elif chunk and length < layer.model.block_size and forward.prepared is None:
        if layer.may_be_sparse and key_length >= _min_context(layer, arguments.query.device) and not forward.dense:
            warn_dense(layer, SHORT_CHUNK)
        return SHORT_CHUNK
    elif window is not None and key_length > window:
        if layer.may_be_sparse:
            warn_dense(layer, f"it is longer than the sliding window of its layers ({window} tokens)")
        return _SLIDING
    elif not options.get("is_causal", True) or not getattr(arguments.module, "is_causal", True):
        reason = "attention is not causal"
    elif not plain:
        reason = "its mask is more than causal (a 4-D mask, packed sequences, or padding between valid tokens)"
    elif not forward.positions_run_on(positions, mine):
        reason = "its position_ids restart or jump (packed sequences)"
    elif chunk and not forward.positions_end_at(positions, padding, key_length):
        reason = "the position_ids of a chunk do not count the tokens of its cache, or its rows are padded on the right"
    if reason is not None and layer.may_be_sparse:
        warn_dense(layer, CAPTURED if capturing(arguments.query.device) else reason)
    return reason


def _wants_sparse(arguments: Arguments, call: Call, forward: Forward, selector: Selector, padded: bool) -> bool:
    """Whether a whole prompt, or a chunk of one, is to be attended sparsely in this layer."""
    layer = call.layer
    query, key = arguments.query, arguments.key
    if forward.dense or selector.dense:
        call.reason = ASKED_FOR if forward.dense else DENSE_POLICY
    elif key.shape[2] < _min_context(layer, query.device):
        call.reason = BELOW_MIN_CONTEXT
    if call.reason is not None:
        return False
    gradients = records_gradients(arguments)
    reason = must_be_dense(arguments, layer, gradients)
    if reason is None and query.shape[2] != key.shape[2]:
        reason = _not_a_chunk(call, forward, selector, key)
    if reason is None and padded and not selector.reads_blocks and _min_context(layer, query.device):
        reason = (
            f"the selector {selector.kind!r} reads single tokens, and rows of a padded batch that are shorter than "
            "min_context cannot be dense beside that (attach with min_context=0)"
        )
    if reason is not None:
        warn_dense(layer, reason)
    layer.model.note(reason is None, gradients)
    call.reason = reason
    return reason is None


def _not_a_chunk(call: Call, forward: Forward, selector: Selector, key: Tensor) -> str | None:
    """Why the selector cannot choose for a chunk on a cache, or None."""
    if not selector.takes_chunks:
        return f"the selector {selector.kind!r} chooses for whole prompts, and this is a chunk of a prompt on a cache"
    problem = history_problem(call, forward, key)
    return problem and f"it is a chunk of a prompt on a cache, and {problem}"


def _min_context(layer: LayerState, device: torch.device) -> int:
    """Prompts of fewer tokens, what is cached included, are attended densely."""
    minimum = layer.model.min_context
    return layer.model.default_min_context(device) if minimum is None else minimum


def _layer_inputs(
    arguments: Arguments, call: Call, forward: Forward, padding: Tensor | None
) -> tuple[LayerInputs, Tensor]:
    """The layer's tensors with content first in every row, and where the content started."""
    layer = call.layer
    query, key, value = arguments.query, arguments.key, arguments.value
    layer.place_gate(query.device)
    query_pre, key_pre = layer.take(call)
    cos, sin = call.cos, call.sin
    if cos.device != query.device:
        cos, sin = cos.to(query.device), sin.to(query.device)
    lengths = starts = span = None
    if query.shape[2] != key.shape[2]:
        queries, keys, half_split = query.shape[2], key.shape[2], layer.model.family.half_split
        cos, sin = (table.to(query.device) for table in history_table(call, forward, keys))
        if padding is None:
            span = Span(query.shape[0], queries, keys)
            key_pre = keys_before_rope(half_split(key, cos.shape[-1]), cos, sin, key_pre)
        else:
            lengths = padding.sum(-1)
            span = chunk_span(lengths, queries, keys)
            key, value = (shift_left(x, keys - lengths) for x in (key, value))
            key_pre = keys_before_rope(half_split(key, cos.shape[-1]), cos, sin)
            starts = (queries - lengths).clamp(min=0)
            query, query_pre = shift_left(query, starts), shift_left(query_pre, starts)
    elif padding is not None:
        lengths, starts = padding.sum(-1), padding.int().argmax(-1)
        query, key, value, query_pre, key_pre = (shift_left(x, starts) for x in (query, key, value, query_pre, key_pre))
        cos, sin = (shift_left(x.expand(query.shape[0], -1, -1), starts) for x in (cos, sin))
    inputs = LayerInputs(
        layer=layer.index,
        q=query,
        k=key,
        v=value,
        q_pre=query_pre,
        k_pre=key_pre,
        cos=cos,
        sin=sin,
        lengths=lengths,
        scale=arguments.scale,
        gate=layer.gate_of(query.shape[1], layer.gate),
        span=span,
    )
    return inputs, starts  # type: ignore[return-value]


def _select(selector: Selector, inputs: LayerInputs, min_context: int) -> BlockIndices:
    blocks = selector.select(inputs)
    if not isinstance(blocks, BlockIndices):
        raise TypeError(f"a selector must return BlockIndices, got {type(blocks).__name__}")
    blocks = blocks.checked()  # for statistics, observers and the op alike; the package's own lists as they are
    return blocks if inputs.lengths is None else complete_short_rows(blocks, inputs.lengths, min_context)
