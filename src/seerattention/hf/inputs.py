"""What the selector of a layer gets (``LayerInputs``), made of what its attention function was given."""

from __future__ import annotations

from torch import Tensor

from ..blocks import shift_left
from ..ops import Span, inverse_rope
from ..selectors import LayerInputs
from .dense import Arguments
from .forward import Call, Forward
from .history import chunk_span, history_table


def layer_inputs(
    arguments: Arguments, call: Call, forward: Forward, padding: Tensor | None
) -> tuple[LayerInputs, Tensor]:
    """The layer's tensors with content first in every row, and where the content started.

    Of a chunk on a cache of rows without padding ``k_pre`` may be that of the chunk alone, see
    :meth:`LayerInputs.turned_back`.
    """
    layer = call.layer
    query, key, value = arguments.query, arguments.key, arguments.value
    layer.place_gate(query.device)
    query_pre, key_pre = layer.take(call)
    cos, sin = call.cos, call.sin
    if cos.device != query.device:
        cos, sin = cos.to(query.device), sin.to(query.device)
    lengths = starts = span = None
    if query.shape[2] != key.shape[2]:
        queries, keys, family = query.shape[2], key.shape[2], layer.model.family
        cos, sin = (table.to(query.device) for table in history_table(call, forward, keys))
        if padding is None:
            span = Span(query.shape[0], queries, keys)
            if family.interleaved:
                key_pre = inverse_rope(family.half_split(key, cos.shape[-1]), cos, sin, recent=key_pre)
        else:
            lengths = padding.sum(-1)
            span = chunk_span(lengths, queries, keys)
            key, value = (shift_left(x, keys - lengths) for x in (key, value))
            key_pre = inverse_rope(family.half_split(key, cos.shape[-1]), cos, sin)
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
