"""The attention function and the mask function that transformers calls for the implementation named "seer".

A whole prompt that arrives in one forward is attended block-sparsely; everything else (decoding, chunks on a cache,
sliding windows, training, custom masks) goes to transformers' own ``sdpa`` function with the mask that it would have
got, so dense results are those of the untouched model. What cannot be right raises; what is dense against expectation
warns once.
"""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function, sdpa_mask

from ..blocks import BlockIndices, num_blocks, shift_left, shift_right
from ..ops.block_selection import dense_indices
from ..ops.block_sparse_attention import block_sparse_attention
from ..ops.indices import ordered_lists, read_lists
from ..policies import Dense
from .sdpa import Arguments, attend_densely, attend_densely_with_lse
from .state import NAME, Call, LayerInputs, LayerState

DEFAULT_MIN_CONTEXT = {"cpu": 2048, "cuda": 4096}
"""Prompts shorter than this many tokens are attended densely when ``min_context`` is None, by device type."""

_OTHER_DEVICES_MIN_CONTEXT = 4096

# Why a layer is dense where nobody expects otherwise: no warning, and observers are not called.
_DECODING = "it decodes one token"
_SLIDING = "the layer attends to a sliding window"
_SKIPPED_BY_OBSERVERS = (_DECODING, _SLIDING)


def register() -> None:
    """Make the implementation known to transformers; called on attach, never at import."""
    AttentionInterface.register(NAME, seer_attention)
    AttentionMaskInterface.register(NAME, seer_mask)


def seer_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """The mask that :func:`seer_attention` gets, made once per forward.

    Returns:
        None: nothing but causality. Bool ``[B, T]``: causality and padding, each row one run of valid tokens.
        Bool ``[B, 1, Tq, Tk]`` (the mask of ``sdpa``): anything else.
    """
    queries = kwargs["q_length"] if "q_length" in kwargs else kwargs["cache_position"].shape[0]
    keys, window = kwargs["kv_length"], kwargs.get("local_size")
    plain = kwargs.get("mask_function", causal_mask_function) is causal_mask_function or (
        window is not None and keys <= window
    )
    # transformers refuses to skip the mask where it is more than causal (packed sequences, mask overlays).
    plain = plain and kwargs.get("allow_is_causal_skip", True)
    if not plain or queries == 1 or queries != keys or kwargs.get("kv_offset", 0):
        return sdpa_mask(*args, **kwargs)
    padding = kwargs.get("attention_mask")
    if padding is None or bool(padding.all()):
        return None
    padding = padding.bool()
    if padding.shape[-1] != keys or not _contiguous(padding):
        return sdpa_mask(*args, **kwargs)
    return padding


def _contiguous(padding: Tensor) -> bool:
    """Whether each row is one run of valid tokens: it begins exactly once."""
    begins = padding[:, :1].int().sum(-1) + (padding[:, 1:] & ~padding[:, :-1]).sum(-1)
    return bool((begins == 1).all())


def seer_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    seer_call: Call | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of one layer, as transformers calls it.

    Args:
        module: the attention module.
        query: ``[B, Hq, Tq, D]`` after RoPE; key, value: ``[B, Hkv, Tk, D]``, the cache included.
        attention_mask: what :func:`seer_mask` made.
        dropout, scaling: as in every attention function of transformers.
        seer_call: what the layer's hooks saw; None in a module without gates, which is attended densely.

    Returns:
        ``[B, Tq, Hq, D]``, and the attention probabilities ``[B, Hq, Tq, Tk]`` where they were asked for, else None.
    """
    if kwargs.get("s_aux") is not None or kwargs.get("softcap") is not None:
        raise NotImplementedError("attention sinks and soft-capped attention are not supported by the seer attention")
    arguments = Arguments(module, query, key, value, attention_mask, dropout, scaling, kwargs)
    if seer_call is None or (query.shape[2] == 1 and not seer_call.layer.model.statistics):
        return attend_densely(arguments)
    return _attend(arguments, seer_call)


@torch.compiler.disable(reason="whether a prompt may be sparse is decided on its mask and positions, by their values")
def _attend(arguments: Arguments, call: Call) -> tuple[Tensor, Tensor | None]:
    """Everything but plain decoding, in the precision that sdpa has under autocast; scores stay float32."""
    device_type = arguments.query.device.type
    if not torch.is_autocast_enabled(device_type):
        return _prefill(arguments, call)
    # Rotated queries and keys are float32 there, values are not, and the gates' products would be rounded.
    dtype = torch.get_autocast_dtype(device_type)
    tensors = {name: getattr(arguments, name).to(dtype) for name in ("query", "key", "value")}
    with torch.autocast(device_type, enabled=False):
        return _prefill(arguments._replace(**tensors), call)


def _prefill(arguments: Arguments, call: Call) -> tuple[Tensor, Tensor | None]:
    """Decide, select, count, report, attend."""
    layer, state, mask = call.layer, call.layer.model, arguments.mask
    inputs: LayerInputs | None = None
    blocks: BlockIndices | None = None
    problem = _not_a_prompt(arguments, call)
    if problem is None:
        wants_sparse = _wants_sparse(arguments, layer)
        if wants_sparse or state.observers:
            inputs, starts = _layer_inputs(arguments, call)
        if wants_sparse:
            assert inputs is not None
            blocks = _select(layer, inputs)
    elif state.observers and problem not in _SKIPPED_BY_OBSERVERS:
        raise ValueError(f"observe() sees whole prompts only, but this forward is not one: {problem}")
    for statistics in state.statistics:
        lengths = None if inputs is None else inputs.lengths
        if inputs is None and mask is not None and mask.dim() == 2:
            lengths = mask.sum(-1)
        statistics.add(layer.index, blocks, lengths, arguments.query, arguments.key.shape[2], state.block_size)
    result: tuple[Tensor, Tensor | None] | None = None
    if inputs is not None and state.observers:
        if blocks is None:
            # Before the observers, who would otherwise compute its log-sum-exp again.
            result, lse = attend_densely_with_lse(arguments)
            inputs = dataclasses.replace(inputs, lse=lse)
        for observer in tuple(state.observers):
            observer(inputs, blocks)
    if result is not None:
        return result
    if blocks is None:
        return attend_densely(arguments)
    assert inputs is not None
    out = cast(Tensor, block_sparse_attention(inputs.q, inputs.k, inputs.v, blocks, scale=inputs.scale))
    if mask is not None:
        out = shift_right(out, starts).masked_fill(~mask[:, None, :, None], 0.0)
    return out.transpose(1, 2).contiguous(), None


def _not_a_prompt(arguments: Arguments, call: Call) -> str | None:
    """Why these tensors are not one whole prompt per row under plain causal attention, or None. Warns where one might
    expect sparsity."""
    state, mask, options = call.layer.model, arguments.mask, arguments.options
    length, key_length = arguments.query.shape[2], arguments.key.shape[2]
    if length == 1:
        return _DECODING
    window = options.get("sliding_window")
    window = call.layer.window if window is None else window
    reason = None
    if call.static_cache and length != key_length:
        reason = "StaticCache prefill is not sparse yet"
    elif length != key_length:
        reason = "a chunk of a prompt on top of a cache (chunked prefill, multi-turn) is not sparse yet"
    elif window is not None and length > window:
        return "the layer attends to a sliding window"
    elif not options.get("is_causal", True) or not getattr(arguments.module, "is_causal", True):
        reason = "attention is not causal"
    elif mask is not None and mask.dim() != 2:
        reason = "its mask is more than causal (a 4-D mask, packed sequences, or padding between valid tokens)"
    elif not state.positions_run_on(options.get("position_ids"), mask):
        reason = "its position_ids restart or jump (packed sequences)"
    if reason is not None:
        state.warn_once(reason, f"seerattention: this forward is attended densely, because {reason}")
    return reason


def _wants_sparse(arguments: Arguments, layer: LayerState) -> bool:
    """Whether a whole prompt is to be attended sparsely in this layer."""
    state, query = layer.model, arguments.query
    if state.dense_depth or (layer.gate is None and state.selector is None):
        return False
    if state.selector is None and isinstance(layer.policy or state.policy, Dense):
        return False
    if query.shape[2] < _min_context(layer, query.device):
        return False
    reason = None
    checkpointed = getattr(layer.decoder_layer, "gradient_checkpointing", False) and layer.decoder_layer.training
    if (torch.is_grad_enabled() and query.requires_grad) or checkpointed:
        reason = (
            "gradients are recorded and the sparse kernels have no backward pass (for inference, use torch.no_grad() "
            "or torch.inference_mode())"
        )
    elif arguments.dropout > 0:
        reason = "attention dropout is on (call model.eval() for inference)"
    elif arguments.wants_weights:
        reason = "output_attentions=True asks for the whole attention map"
    if reason is not None:
        state.warn_once(reason, f"seerattention: this forward is attended densely, because {reason}")
    return reason is None


def _min_context(layer: LayerState, device: torch.device) -> int:
    """Prompts of fewer tokens are attended densely."""
    minimum = layer.model.min_context
    return DEFAULT_MIN_CONTEXT.get(device.type, _OTHER_DEVICES_MIN_CONTEXT) if minimum is None else minimum


def _layer_inputs(arguments: Arguments, call: Call) -> tuple[LayerInputs, Tensor]:
    """The layer's tensors with content first in every row, and where the content started."""
    layer, padding = call.layer, arguments.mask
    query, key, value = arguments.query, arguments.key, arguments.value
    layer.place_gate(query.device)
    query_pre, key_pre = layer.take(call)
    cos, sin = call.cos.to(query.device), call.sin.to(query.device)
    lengths = starts = None
    if padding is not None:
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
        gate=layer.gate,
    )
    return inputs, starts  # type: ignore[return-value]


def _select(layer: LayerState, inputs: LayerInputs) -> BlockIndices:
    state = layer.model
    if state.selector is not None:
        blocks = state.selector(inputs.q, inputs.k, layer=layer.index, scale=inputs.scale, lengths=inputs.lengths)
        if not isinstance(blocks, BlockIndices):
            raise TypeError(f"a selector must return BlockIndices, got {type(blocks).__name__}")
    else:
        policy = layer.policy or state.policy
        logits = inputs.gate_logits(masked=False)
        blocks = policy.select(logits, block_size=state.block_size, lengths=inputs.lengths)
    blocks = blocks.checked()  # for statistics, observers and the op alike; the package's own lists as they are
    if inputs.lengths is None:
        return blocks
    return _complete_short_rows(blocks, inputs.lengths, _min_context(layer, inputs.q.device))


def _complete_short_rows(blocks: BlockIndices, lengths: Tensor, minimum: int) -> BlockIndices:
    """Rows of a padded batch that would be dense alone, for having fewer than ``minimum`` tokens, read everything."""
    longest = min(num_blocks(max(minimum - 1, 0), blocks.block_size), blocks.num_key_blocks)
    if longest == 0:
        return blocks
    short = (lengths < minimum)[:, None, None]
    indices, counts = read_lists(blocks)
    batch, heads, rows = counts.shape
    full = dense_indices(
        batch,
        heads,
        rows,
        blocks.num_key_blocks,
        block_size=blocks.block_size,
        lengths=lengths,
        device=counts.device,
    )
    full_indices, full_counts = read_lists(full)
    capacity = indices.shape[-1]
    if capacity < longest:
        indices, capacity = nn.functional.pad(indices, (0, longest - capacity)), longest
    indices = torch.where(short[..., None], full_indices[..., :capacity], indices)
    counts = torch.where(short, full_counts, counts)
    return ordered_lists(indices, counts, blocks.num_key_blocks, blocks.block_size)
